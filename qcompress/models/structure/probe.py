"""Runs of a model with the channels of a writer multiplied by powers of two.

A factor 2^e is exact in fp32 and passes every linear step without a rounding error. Where the input of a
reader is the clean input times a power of two for each channel, the clean input is put back. Such a factor
can be folded into the writer and divided out of the reader's weight, provided that it has reached nothing
else: then all outputs of the model are bit-identical to the clean ones.

A reader whose input is clean, or is put back, returns the output that it had then: after the first run no
reader computes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.models.structure.running import tensors_of

Exponents = Tensor
"""One exponent of two for each channel, int64."""


class _LeakError(Exception):
    """A factor has reached a reader in another form than one power of two for each channel."""


def channel_axis(module: nn.Module, tensor: Tensor) -> int | None:
    """Axis of the channels in the input or the output of a layer, and in the output of a norm; None if no
    axis of the output has as many entries as the norm's weight.
    """
    if isinstance(module, nn.Conv2d):
        return 1
    if isinstance(module, nn.Linear) or module.weight.dim() > 1:
        return tensor.dim() - 1
    fits = [axis for axis in (1, tensor.dim() - 1) if tensor.shape[axis:][:1] == module.weight.shape]
    is_first = isinstance(module, nn.GroupNorm) or "running_mean" in dict(module.named_buffers())
    return None if not fits else fits[0] if is_first else fits[-1]


class Probe:
    """A model with example inputs, its clean outputs, and the clean input and output of every reader."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        readers: Sequence[str],
        ends: Mapping[str, str],
        overrides: Mapping[str, Tensor],
    ) -> None:
        """`readers`: names of layers, each called once. `ends`: convolution -> the batch norm whose output
        stands for its own. `overrides`: values that take the place of parameters and buffers.
        """
        self._model, self._inputs, self._overrides = model, dict(inputs), dict(overrides)
        self._modules = dict(model.named_modules())
        self._readers, self._ends = tuple(readers), dict(ends)
        self._clean: dict[str, tuple[Tensor, Tensor]] = {}
        keep = {name: self._keep(name) for name in self._readers}
        with _hooks(self._modules, keep):
            self._outputs = self._run()
        self.silent = {name: self._zeros(name) for name in self._readers}
        """Reader -> which of its input channels are zero everywhere, so that no factor shows. All are for a
        reader that these inputs do not call, such as an expert.
        """

    def channels(self, writer: str) -> int:
        """Number of output channels of a norm or a layer."""
        module = self._modules[writer]
        is_stored_last = module.weight.dim() == 2 and not isinstance(module, nn.Linear | nn.Conv2d)
        return module.weight.shape[1 if is_stored_last else 0]

    def scaled(self, factors: Mapping[str, Exponents]) -> dict[str, Exponents] | None:
        """Multiply the outputs of writers, and return the exponents that arrived at the readers whose input
        has changed (0 at silent channels). None if a factor leaked.
        """
        arrived: dict[str, Exponents] = {}
        multiply = {self._ends.get(name, name): self._multiply(name, e) for name, e in factors.items()}
        try:
            with self._replayed(arrived), _hooks(self._modules, multiply):
                outputs = self._run()
        except _LeakError:
            return None
        is_same = len(outputs) == len(self._outputs) and all(map(torch.equal, outputs, self._outputs))
        return arrived if is_same else None

    def _zeros(self, name: str) -> Tensor:
        if name in self._clean:
            return _channels_last(self._modules[name], self._clean[name][0]).eq(0).all(0).cpu()
        module = self._modules[name]
        if isinstance(module, nn.Conv2d):
            return torch.ones(module.in_channels, dtype=torch.bool)
        return torch.ones(module.weight.numel() // self.channels(name), dtype=torch.bool)

    def _run(self) -> list[Tensor]:
        output = torch.func.functional_call(self._model, self._overrides, (), self._inputs)
        return [tensor.clone() for tensor in tensors_of(output)]

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
            self._clean[name] = _input(args, keywords).clone(), output.clone()

        return hook

    def _multiply(self, name: str, exponents: Exponents) -> Callable[..., Tensor]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Tensor
        ) -> Tensor:
            shape = [1] * output.dim()
            shape[channel_axis(self._modules[name], output)] = -1
            return output * torch.exp2(exponents.to(output)).view(shape)

        return hook

    @contextmanager
    def _replayed(self, arrived: dict[str, Exponents]) -> Iterator[None]:
        """Replace the forward of each reader, and restore it."""
        before = {name: vars(self._modules[name]).get("forward") for name in self._readers}
        for name in self._readers:
            self._modules[name].forward = self._replay(name, arrived)
        try:
            yield
        finally:
            for name, forward in before.items():
                del self._modules[name].forward
                if forward is not None:
                    self._modules[name].forward = forward

    def _replay(self, name: str, arrived: dict[str, Exponents]) -> Callable[..., Tensor]:
        module = self._modules[name]
        clean, output = self._clean.get(name, (None, None))

        def forward(*args: Any, **keywords: Any) -> Tensor:
            x = _input(args, keywords)
            if clean is None or x.shape != clean.shape:
                raise _LeakError
            if not torch.equal(x, clean):
                arrived[name] = _exponents(_channels_last(module, x), _channels_last(module, clean))
            return output.clone()

        return forward


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks on modules, for one run."""
    handles = [modules[name].register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input(args: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """The only argument of a layer."""
    return args[0] if args else next(iter(keywords.values()))


def _channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as [values of a channel, channels]."""
    return x.movedim(channel_axis(module, x), -1).flatten(0, -2)


def _exponents(scaled: Tensor, clean: Tensor) -> Exponents:
    """Exponents e of `scaled = clean * 2^e`, both [values of a channel, channels]; 0 for a channel of zeros.
    Raises _LeakError if there are none.
    """
    place = clean.ne(0).long().argmax(0, keepdim=True)
    before, after = clean.gather(0, place)[0], scaled.gather(0, place)[0]
    factor = torch.where(before == 0, 1.0, after / before)
    if not bool((factor > 0).all()) or not torch.equal(clean * factor, scaled):
        raise _LeakError
    mantissa, exponent = torch.frexp(factor)
    if not bool((mantissa == 0.5).all()):
        raise _LeakError
    return exponent.long().cpu() - 1
