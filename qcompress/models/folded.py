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
from qcompress.quant.conv import Geometry
from qcompress.quant.folded import FoldedEmbedding, FoldedLinear, FoldedTiedHead, Rounding
from qcompress.quant.folded_conv import FoldedConv
from qcompress.system.artifacts import FoldedModel, read_json


def _stored_weight(item: LayerPlan, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Build the decoder of a folded weight; its tensors are removed from `tensors`."""
    encoding = encoding_of(item.weights)
    parts = {part: tensors.pop(f"{item.name}.weight.{part}", None) for part in encoding.parts}
    return encoding.decoder(parts, item, dtype)


def assemble(folded: FoldedModel, dtype: torch.dtype = torch.float32, integer: bool = False) -> nn.Module:
    """Build the folded model in torch; scales and unquantized tensors have type `dtype`. With `integer`,
    matmuls are computed like int8 GEMMs. Raises ContractError if the tensors do not fit the model.
    """
    facts = read_json(folded.path / "folded.json")
    tensors = load_file(folded.path / "folded.safetensors")
    plan = plans_from_json(facts["plan"])
    model = FAMILIES[facts["family"]].empty(folded.path)
    layers: dict[str, nn.Module] = {}
    for item in plan:
        if item.weights is None:
            continue
        rounding = None
        if item.activations is not None:
            scale = tensors.pop(f"{item.name}.input.scale").to(dtype)
            rounding = Rounding(scale, item.activations.bounds)
        bias = tensors.pop(f"{item.name}.bias", None)
        bias = None if bias is None else bias.to(dtype)
        owner = layers.get(item.layer.tied_to or "")
        if isinstance(owner, FoldedLinear):
            layer = FoldedLinear(owner.weight, owner.bias, rounding, integer)
        elif owner is not None:
            layer = FoldedTiedHead(owner.weight, rounding, integer)
        elif item.layer.kind == "conv":
            weight = _stored_weight(item, tensors, dtype)
            gain = tensors.pop(f"{item.name}.gain", None)
            geometry = Geometry.of(model.get_submodule(item.name))
            layer = FoldedConv(
                weight, bias, rounding, geometry, integer, None if gain is None else gain.to(dtype)
            )
        else:
            table = item.layer.kind == "embedding"
            weight = _stored_weight(item, tensors, dtype)
            layer = FoldedEmbedding(weight) if table else FoldedLinear(weight, bias, rounding, integer)
        replace_module(model, item.name, layer)
        layers[item.name] = layer
        if item.layer.norm:
            replace_module(model, item.layer.norm, nn.Identity())
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
