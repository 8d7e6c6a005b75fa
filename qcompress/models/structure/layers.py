"""Layers of a model: modules whose weight can be replaced by a rounded one without changing anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.models.architecture import Layer
from qcompress.models.structure.trace import Trace, trace_run
from qcompress.quant.conv import Geometry

UNQUANTIZED = (
    nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.EmbeddingBag,
    nn.Bilinear,
)  # fmt: skip
"""Classes with a weight matrix that have no quantized counterpart."""

Kind = Literal["linear", "embedding", "conv"]


def is_transposed(module: nn.Module) -> bool:
    """True for a Conv1D of transformers, a linear layer that stores [in, out]."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def kind_of(module: nn.Module) -> Kind | None:
    """Kind of a module with a weight matrix; None for other modules."""
    if isinstance(module, nn.Linear) or is_transposed(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(module, nn.Conv2d) else None


def find_layers(model: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Layer, ...], dict[str, str], Trace]:
    """Trace `run`, a call of the model. Returns the layers in call order, without their parts and batch
    norms, the layer-like modules that stay float with the reason, and the trace.
    """
    candidates = {
        name: module
        for name, module in model.named_modules()
        if kind_of(module) or isinstance(module, UNQUANTIZED)
    }
    tables: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def check(name: str, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> str:
        module = candidates[name]
        if isinstance(module, nn.Embedding) and not _is_stock(module):
            # judged after the run, since the judgement calls the module
            tables.setdefault(name, []).append((args, keywords))
        return _reason(module, args, keywords, output)

    trace = trace_run(model, run, candidates, check)
    floats = {}
    for name, module in candidates.items():
        if name not in trace.calls:
            floats[name] = "never called as a module"
        elif trace.results[name]:
            floats[name] = trace.results[name]
        elif name in tables and not all(is_lookup(module, *call) for call in tables[name]):
            floats[name] = _own(module)
        elif name in trace.read_outside:
            floats[name] = "its weight is read outside its module"
    order = {name: place for place, name in enumerate(trace.calls)}
    names = sorted(candidates.keys() - floats.keys(), key=order.__getitem__)
    return _described(model, {name: candidates[name] for name in names}, trace), floats, trace


def _described(model: nn.Module, modules: Mapping[str, nn.Module], trace: Trace) -> tuple[Layer, ...]:
    owners: dict[int, Layer] = {}
    head = _output_embeddings(model)
    layers = []
    for name, module in modules.items():
        layer = _layer(name, module, trace.nonnegative[name])
        owner = owners.setdefault(id(module.weight), layer)
        if owner is not layer:
            layer = dataclasses.replace(layer, tied_to=owner.name)
        is_head = module is head or owner.kind == "embedding"
        if layer.kind == "linear" and is_head:
            layer = dataclasses.replace(layer, kind="head")
        layers.append(dataclasses.replace(layer, calls=trace.calls[name]))
    return tuple(layers)


def _layer(name: str, module: nn.Module, nonnegative: bool) -> Layer:
    kind, weight = kind_of(module), module.weight
    if kind == "conv":
        outputs, inputs, height, width = weight.shape
        return Layer(
            name, kind, inputs * height * width, outputs, kernel=(height, width), groups=module.groups,
            nonnegative=nonnegative,
        )  # fmt: skip
    axis = 1 if is_transposed(module) else 0
    outputs, inputs = weight.shape[axis], weight.shape[1 - axis]
    return Layer(name, kind, inputs, outputs, nonnegative=nonnegative and kind == "linear", axis=axis)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    except NotImplementedError:  # what transformers raises for a model without token tables
        return None


def mark_head(layers: Sequence[Layer], trace: Trace, blocks: Sequence[str]) -> tuple[Layer, ...]:
    """Mark a classifier as head: the linear layer outside all blocks whose output is the model's `logits` or
    its only output. A head that is known already stays the only one.
    """
    last = trace.last_output
    if any(layer.kind == "head" for layer in layers) or block_of(last or "", blocks):
        return tuple(layers)
    return tuple(
        dataclasses.replace(layer, kind="head") if layer.name == last and layer.kind == "linear" else layer
        for layer in layers
    )


def block_of(name: str, blocks: Sequence[str]) -> str | None:
    """The block that a module belongs to."""
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


# Reasons to stay float ----------------------------------------------------------------------------


def _own(module: nn.Module) -> str:
    return f"{type(module).__name__} computes something of its own"


def _reason(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> str:
    """Reason for a called module to stay float, or an empty string. The forward of an embedding is not
    judged here but by `is_lookup`.
    """
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} has no quantized counterpart"
    parameters = dict(module.named_parameters(recurse=False))
    if "weight" not in parameters:
        return "its weight is computed"
    if any(True for _ in module.children()) or parameters.keys() - {"weight", "bias"}:
        return _own(module)
    if kind == "embedding":
        return "" if module.max_norm is None else "renormalizes its rows"
    if kind == "conv":
        if module.padding_mode != "zeros":
            return f"pads with {module.padding_mode}"
        try:
            Geometry.of(module)
        except ModelError:
            return "pads its sides unequally"
    is_stock = _is_stock(module) or _computes_stock(module, kind, args, keywords, output)
    return "" if is_stock else _own(module)


def _is_stock(module: nn.Module) -> bool:
    """True for a module whose forward is that of torch's class."""
    forward = getattr(module.forward, "__func__", None)
    return any(forward is base.forward for base in (nn.Linear, nn.Embedding, nn.Conv2d))


def _computes_stock(
    module: nn.Module, kind: Kind, args: tuple[Any, ...], keywords: dict[str, Any], output: Any
) -> bool:
    values = [*args, *keywords.values()]
    if len(values) != 1 or not isinstance(values[0], Tensor) or not isinstance(output, Tensor):
        return False
    (x,) = values
    if kind == "conv":
        expected = F.conv2d(
            x, module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups
        )
    elif is_transposed(module):
        expected = x @ module.weight + (0 if module.bias is None else module.bias)
    else:
        expected = F.linear(x, module.weight, module.bias)
    return _close(output, expected)


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding errors of sums in fp32."""
    if actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= 1e-4 * expected.abs().max())


def is_lookup(module: nn.Embedding, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """True if a forward looks up rows of any table that takes the place of its own, times one factor.

    A table of ones shows the factor, a table with the row's number in every column shows the rows.
    """
    rows, width = module.weight.shape
    numbers = torch.arange(rows, device=module.weight.device, dtype=module.weight.dtype)[:, None]

    def looked_up(table: Tensor) -> Any:
        return torch.func.functional_call(module, {"weight": table}, args, keywords)

    ones = looked_up(numbers.new_ones(1, 1).expand(rows, width))
    if not isinstance(ones, Tensor) or not ones.numel() or ones.shape[-1] != width:
        return False
    factor = ones.flatten()[0]
    if not bool((ones == factor).all()) or not bool(factor != 0):
        return False
    places = (looked_up(numbers.expand(rows, width)) / factor)[..., 0].round().long()
    if not bool(((places >= 0) & (places < rows)).all()):
        return False
    return _close(looked_up(module.weight), factor * module.weight[places])
