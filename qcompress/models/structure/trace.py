"""One observed run of a model: calls of modules, and what each layer-like module computed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qcompress.models.structure.nonnegative import Nonnegative, first_tensor
from qcompress.models.structure.running import tensors_of

MIXERS = ("softmax", "scaled_dot_product_attention")
"""Functions that an attention calls on tensors with three axes or more."""


@dataclass
class Trace:
    """Record of one forward pass. Names are module names."""

    calls: Counter[str] = field(default_factory=Counter)
    """Number of calls of each called module, in the order of their first call."""
    passed: dict[str, set[str]] = field(default_factory=dict)
    """Module -> modules inside it whose output is one of its outputs, as the same tensor object."""
    reads: dict[str, str] = field(default_factory=dict)
    """Module -> the module whose output, as the same tensor object, was its first input."""
    nonnegative: dict[str, bool] = field(default_factory=dict)
    """Whether every first input of a module came from operations without negative results."""
    mixers: dict[str, None] = field(default_factory=dict)
    """Modules whose forward calls softmax or scaled dot-product attention itself, in call order."""
    read_outside: set[str] = field(default_factory=set)
    """Modules with a parameter that was read while another module ran."""
    results: dict[str, Any] = field(default_factory=dict)
    """Results of `check` for each module that it was called with."""
    last_output: str | None = None
    """The module whose output, as the same tensor object, is the model's `logits` or its only output."""


class _Observer(TorchFunctionMode):
    """Follows every torch function of a run."""

    def __init__(self, trace: Trace, owners: Mapping[int, set[str]]) -> None:
        super().__init__()
        self.trace, self.owners = trace, owners
        self.stack: list[str] = []
        self.nonnegative = Nonnegative()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not self.stack:
            return result
        top = self.stack[-1]
        if function.__name__ in MIXERS and isinstance(args[0], Tensor) and args[0].dim() > 2:
            self.trace.mixers.setdefault(top)
        if tensors_of(result):
            for value in (*args, *kwargs.values()):
                owners = self.owners.get(id(value), set()) if isinstance(value, nn.Parameter) else set()
                if owners and top not in owners:
                    self.trace.read_outside |= owners
        self.nonnegative.observe(function, args, kwargs, result)
        return result


def trace_run(
    model: nn.Module,
    run: Callable[[], Any],
    layer_like: Mapping[str, nn.Module],
    check: Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any],
) -> Trace:
    """Observe `run`, a call of the model.

    `layer_like`: the modules whose parameters are watched. `check` is called with the name, the arguments and
    the output of each of their first calls; `Trace.results` keeps what it returns.
    """
    trace = Trace()
    owners: dict[int, set[str]] = {}
    for name, module in layer_like.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    observer = _Observer(trace, owners)
    makers: dict[int, tuple[weakref.ref[Tensor], list[str]]] = {}

    def makers_of(tensor: object) -> list[str]:
        reference, names = makers.get(id(tensor), (lambda: None, []))
        return names if reference() is tensor else []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            observer.stack.append(name)
            trace.calls[name] += 1
            first = first_tensor(args, keywords)
            trace.nonnegative[name] = trace.nonnegative.get(name, True) and observer.nonnegative.holds(first)
            if names := makers_of(first):
                trace.reads.setdefault(name, names[0])

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if name in layer_like and name not in trace.results:
                trace.results[name] = check(name, args, keywords, output)
            observer.stack.pop()
            for tensor in tensors_of(output):
                names = makers_of(tensor)
                trace.passed.setdefault(name, set()).update(names)
                makers[id(tensor)] = weakref.ref(tensor), [*names, name]

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        with observer:
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    outputs = tensors_of(output)
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if logits is None and len(outputs) == 1:
        logits = outputs[0]
    trace.last_output = next(iter(makers_of(logits)), None)
    return trace
