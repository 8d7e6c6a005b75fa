"""The folded model in torch: layers with stored codes and scales (`quant/folded.py`)."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qcompress.encodings import encoding_of
from qcompress.errors import ContractError
from qcompress.models import FAMILIES
from qcompress.models.plan import LayerPlan, plans_from_json, points_from_json, rounded
from qcompress.models.prepare import own_tensors, replace_module
from qcompress.quant.batchnorm import after_norm
from qcompress.quant.conv import Geometry
from qcompress.quant.folded import (
    FoldedEmbedding,
    FoldedLinear,
    FoldedStockEmbedding,
    FoldedTiedHead,
    Rounding,
)
from qcompress.quant.folded_conv import FoldedConv
from qcompress.quant.layers import is_lookup
from qcompress.system.artifacts import FoldedModel, read_json


def _stored_weight(item: LayerPlan, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Build the decoder of a folded weight; its tensors are removed from `tensors`."""
    encoding = encoding_of(item.weights)
    parts = {part: tensors.pop(f"{item.name}.weight.{part}", None) for part in encoding.parts}
    return encoding.decoder(parts, item, dtype)


def _bias(name: str, stock: nn.Module, tensors: dict[str, Tensor], shared: dict[int, str]) -> Tensor | None:
    """The bias of layer `name`, which is removed from `tensors`. A bias that the model holds under another
    name as well (`shared`: the name of each parameter by its id), such as that of BERT's masked language
    model, stays there.
    """
    other = shared.get(id(getattr(stock, "bias", None)), f"{name}.bias")
    return tensors.pop(other, None) if other == f"{name}.bias" else tensors.get(other)


def assemble(folded: FoldedModel, dtype: torch.dtype = torch.float32, integer: bool = False) -> nn.Module:
    """Build the folded model in torch; scales and unquantized tensors have type `dtype`. With `integer`,
    matmuls are computed like int8 GEMMs. Raises ContractError if the tensors do not fit the model.
    """
    facts = read_json(folded.path / "folded.json")
    tensors = load_file(folded.path / "folded.safetensors")
    plan = plans_from_json(facts["plan"])
    model = FAMILIES[facts["family"]].empty(folded.path)
    layers: dict[str, nn.Module] = {}
    shared = {id(parameter): name for name, parameter in model.named_parameters()}
    for item in plan:
        if item.weights is None:
            continue
        rounding = None
        if item.activations is not None:
            scale = tensors.pop(f"{item.name}.input.scale").to(dtype)
            rounding = Rounding(scale, item.activations.bounds)
        stock = model.get_submodule(item.name)
        bias = _bias(item.name, stock, tensors, shared)
        bias = None if bias is None else bias.to(dtype)
        owner = layers.get(item.layer.tied_to or "")
        if isinstance(owner, FoldedLinear):
            layer = FoldedLinear(owner.weight, owner.bias, rounding, integer)
        elif owner is not None and item.layer.kind == "embedding":
            layer = FoldedStockEmbedding(owner.weight, stock)
        elif owner is not None:
            layer = FoldedTiedHead(owner.weight, rounding, integer, bias)
        elif item.layer.kind == "conv":
            weight = _stored_weight(item, tensors, dtype)
            gain = tensors.pop(f"{item.name}.gain", None)
            geometry = Geometry.of(stock)
            layer = FoldedConv(
                weight, bias, rounding, geometry, integer, None if gain is None else gain.to(dtype)
            )
        else:
            weight = _stored_weight(item, tensors, dtype)
            if item.layer.kind != "embedding":
                layer = FoldedLinear(weight, bias, rounding, integer)
            else:
                layer = FoldedEmbedding(weight) if is_lookup(stock) else FoldedStockEmbedding(weight, stock)
        replace_module(model, item.name, layer)
        layers[item.name] = layer
        if item.layer.norm:
            replace_module(model, item.layer.norm, after_norm(model.get_submodule(item.layer.norm)))
    points = rounded(points_from_json(facts.get("points", [])))
    rounding = {
        item.name: Rounding(tensors.pop(f"{item.name}.scale").to(dtype), item.activations.bounds)
        for item in points
    }
    FAMILIES[facts["family"]].install_points(model, rounding)
    own = own_tensors(model)
    if set(own) != set(tensors):
        raise ContractError(
            f"{folded.path}: the model and the file differ in {sorted(set(own) ^ set(tensors))[:5]}"
        )
    for name, value in tensors.items():
        value = value.to(dtype) if value.is_floating_point() else value
        is_parameter = isinstance(own[name], nn.Parameter)
        replace_module(model, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    FAMILIES[facts["family"]].tie(model)
    return model.requires_grad_(False).eval()
