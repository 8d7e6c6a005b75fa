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

ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")


@dataclass
class Trace:
    """Record of one forward pass. Names are module names."""

    calls: Counter[str] = field(default_factory=Counter)
    """Number of calls of each called module, in the order of their first call."""
    added: dict[str, set[str]] = field(default_factory=dict)
    """Module -> modules whose output its own forward adds to another tensor, as a residual block does."""
    reads: dict[str, list[str]] = field(default_factory=dict)
    """Module -> modules whose output, as the same tensor object, was its first input, the innermost first."""
    nonnegative: dict[str, bool] = field(default_factory=dict)
    """True if operations without negative results made every first input of a module."""
    mixers: dict[str, None] = field(default_factory=dict)
    """Modules whose forward calls softmax or scaled dot-product attention itself, in call order."""
    read_outside: set[str] = field(default_factory=set)
    """Modules with a parameter that was read while another module ran."""
    results: dict[str, Any] = field(default_factory=dict)
    """Results of `check` for each module that it was called with."""
    last_output: str | None = None
    """The module whose output, as the same tensor object, is the model's `logits` or its only output; for
    answers as parts of a context the last module.
    """


class _Makers:
    """Modules that returned a tensor, the innermost first."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[weakref.ref[Tensor], list[str]]] = {}

    def of(self, tensor: object) -> list[str]:
        """Names of the modules, also after a change in place; empty for other values."""
        reference, names = self._names.get(id(tensor), (lambda: None, []))
        return names if tensor is not None and reference() is tensor else []

    def add(self, tensor: Tensor, name: str) -> None:
        self._names[id(tensor)] = weakref.ref(tensor), [*self.of(tensor), name]


class _Observer(TorchFunctionMode):
    """Follows every torch function of a run."""

    def __init__(self, trace: Trace, owners: Mapping[int, set[str]]) -> None:
        super().__init__()
        self.trace, self.owners = trace, owners
        self.stack: list[str] = []
        self.makers = _Makers()
        self.nonnegative = Nonnegative()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not self.stack:
            return result
        top, title = self.stack[-1], getattr(function, "__name__", "")
        first = first_tensor(args, kwargs)
        if title in MIXERS and first is not None and first.dim() > 2:
            self.trace.mixers.setdefault(top)
        if title in ADDITIONS:
            operands = (self.makers.of(value) for value in args)
            self.trace.added.setdefault(top, set()).update(name for names in operands for name in names)
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

    `check` is called with the name, the arguments and the output of each call of the modules `layer_like`;
    `Trace.results` keeps its first result that is not empty, and later calls are not checked.
    """
    trace = Trace()
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    observer = _Observer(trace, owners)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            observer.stack.append(name)
            trace.calls[name] += 1
            first = first_tensor(args, keywords)
            trace.nonnegative[name] = trace.nonnegative.get(name, True) and observer.nonnegative.holds(first)
            if names := observer.makers.of(first):
                trace.reads.setdefault(name, names)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if name in layer_like and not trace.results.get(name):
                trace.results[name] = check(name, args, keywords, output)
            observer.stack.pop()
            for tensor in tensors_of(output):
                observer.makers.add(tensor, name)

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
    trace.last_output = next(iter(observer.makers.of(logits)), None)
    if isinstance(output, Mapping) and "start_logits" in output:  # the halves of one layer's output
        trace.last_output = list(trace.calls)[-1]
    return trace
