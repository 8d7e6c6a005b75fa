"""The trained model, rebuilt from the float model and the train stage's files, with fixed scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qcompress.models import FAMILIES
from qcompress.models.plan import LayerPlan, PointPlan, plans_from_json, points_from_json, site_from_json
from qcompress.models.prepare import Prepared, install, own_tensors, round_points
from qcompress.quant.quantizers import FrozenActivation
from qcompress.quant.rescaling import FixedScale
from qcompress.quant.weight_formats import quantizers_of
from qcompress.quant.weight_quantizer import CodedWeight
from qcompress.system.artifacts import FloatModel, TrainedModel, read_json


def rebuild(float_model: FloatModel, trained: TrainedModel) -> Prepared:
    """Rebuild the trained model from its artifact, with fixed scales and no trainable parameter."""
    facts = read_json(trained.path / "trained.json")
    tensors = load_file(trained.path / "trained.safetensors")
    family = facts["family"]
    plan = plans_from_json(facts["plan"])
    points = points_from_json(facts.get("points", []))
    model = FAMILIES[family].load_float(float_model.source, float_model.path)
    with torch.no_grad():
        own = own_tensors(model)
        for name in facts["changed"]:
            own[name].copy_(tensors[name])

    def weight_quantizer(item: LayerPlan, weight: Tensor, axis: int) -> nn.Module:
        return frozen_weight(item, tensors, axis)

    def input_quantizer(item: LayerPlan) -> nn.Module | None:
        if item.activations is None:
            return None
        return FrozenActivation(tensors[f"{item.name}.input.scale"], item.activations.bounds)

    def point_quantizer(item: PointPlan) -> nn.Module:
        return FrozenActivation(tensors[f"{item.name}.scale"], item.activations.bounds)

    prepared = install(model, family, plan, weight_quantizer, input_quantizer)
    prepared = round_points(prepared, points, point_quantizer)
    for value in facts["rescalings"]:
        site = site_from_json(value)
        prepared.rescale(site, FixedScale(tensors[f"{site.writer}.rescale"]))
    prepared.model.requires_grad_(False).eval()
    return prepared


def frozen_weight(item: LayerPlan, tensors: Mapping[str, Tensor], axis: int) -> CodedWeight:
    """Build a layer's weight quantizer from the tensors of trained.safetensors; `axis`: axis of the output
    channels.
    """
    maker = quantizers_of(item.weights)
    parts = {part: tensors.get(f"{item.name}.weight.{part}") for part in maker.parts}
    return maker.frozen(parts, item.weights, axis)
