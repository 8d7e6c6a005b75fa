"""Batch norms that fold into the convolution before them, proven by folding them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.models.architecture import Layer
from qcompress.models.structure.trace import Trace
from qcompress.quant.batchnorm import BATCH_NORMS


def find_batch_norms(
    model: nn.Module, layers: Sequence[Layer], trace: Trace, run: Callable[[], list[Tensor]]
) -> dict[str, str]:
    """Convolution -> the batch norm that alone reads its output.

    `run` calls the model and returns its outputs. A pair is proven by moving the norm into the convolution:
    the convolution's output is normalized at once, the norm's module returns its input, and the outputs of
    the model must not change by a bit.
    """
    convolutions = {layer.name for layer in layers if layer.kind == "conv" and trace.calls[layer.name] == 1}
    pairs = {
        trace.reads[name][0]: name
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS)
        and module.running_mean is not None
        and trace.calls[name] == 1
        and trace.reads.get(name, [""])[0] in convolutions
    }
    if not pairs:
        return {}
    outputs = run()
    if _is_same(model, pairs, run, outputs):
        return pairs
    return {
        convolution: norm
        for convolution, norm in pairs.items()
        if _is_same(model, {convolution: norm}, run, outputs)
    }


def _is_same(
    model: nn.Module, pairs: Mapping[str, str], run: Callable[[], list[Tensor]], expected: list[Tensor]
) -> bool:
    """True if the outputs stay bit-identical while each norm runs inside its convolution."""

    def normalized(norm: nn.Module) -> Callable[..., Tensor]:
        return lambda module, args, output: norm.forward(output)

    def skipped(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return args[0]

    handles = []
    for convolution, name in pairs.items():
        norm = model.get_submodule(name)
        handles.append(model.get_submodule(convolution).register_forward_hook(normalized(norm)))
        handles.append(norm.register_forward_hook(skipped))
    try:
        actual = run()
    finally:
        for handle in handles:
            handle.remove()
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))
