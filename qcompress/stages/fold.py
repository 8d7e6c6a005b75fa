"""Stage `fold`: TrainedModel -> FoldedModel. Integers, scales, and a float rest without a trace of training.

Reads trained.safetensors and the float checkpoint (for what training left alone). Rescalings go into the
norms and their readers' weights, weights become int8 codes, stored [in, out]; tables stay [rows, width]. The
method is not an input, so nothing here can depend on it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from qcompress.artifacts import FloatModel, TrainedModel, read_json, write_json
from qcompress.errors import ContractError
from qcompress.plan import plans_to_json, points_to_json
from qcompress.prepare import Prepared, rebuild
from qcompress.quant.layers import QuantizedLinear, QuantizedWeight
from qcompress.tensorfile import save_tensors


@torch.no_grad()
def fold(float_model: FloatModel, trained: TrainedModel, out: Path) -> None:
    """Write folded.safetensors, folded.json, config.json and the tokenizer."""
    prepared = rebuild(float_model, trained)
    compute = read_json(trained.path / "trained.json")["compute"]
    quantized = _codes(prepared)
    tensors = {
        name: tensor.contiguous() for name, tensor in (quantized | _floats(prepared, quantized)).items()
    }
    save_tensors(out / "folded.safetensors", tensors, {"format": "pt"})
    write_json(
        out / "folded.json",
        {
            "family": prepared.family,
            "compute": compute,
            "plan": plans_to_json(prepared.plan),
            "points": points_to_json(prepared.points),
            "codes": sum(tensor.numel() for tensor in quantized.values() if tensor.dtype == torch.int8),
        },
    )
    for file in float_model.path.iterdir():
        if file.name not in ("float.json", "manifest.json"):
            shutil.copyfile(file, out / file.name)


def _codes(prepared: Prepared) -> dict[str, Tensor]:
    """Codes and scales of every quantized tensor, checked against the format."""
    found: dict[str, Tensor] = {}
    plans = {item.name: item for item in prepared.plan}
    for name, layer in prepared.layers.items():
        if isinstance(layer, QuantizedWeight):
            codes, scale = layer.codes()
            scale = layer.weight_quantizer.grid.spread(scale, codes.shape[layer.channel_axis])
            check_scale(scale, f"{name}.weight")
            low, high = plans[name].weights.bounds
            if int(codes.min()) < low or int(codes.max()) > high:
                raise ContractError(f"{name}: codes outside [{low}, {high}]")
            if isinstance(layer, QuantizedLinear) and layer.channel_axis == 0:
                codes, scale = codes.t(), scale if scale.dim() == 1 else scale.t()
            found[f"{name}.weight.codes"], found[f"{name}.weight.scale"] = codes, scale
        if getattr(layer, "input_quantizer", None) is not None:
            scale = layer.input_quantizer.scale_of()
            check_scale(scale, f"{name}.input")
            found[f"{name}.input.scale"] = scale
    for name, point in prepared.rounding.items():
        check_scale(point.scale_of(), name)
        found[f"{name}.scale"] = point.scale_of()
    return found


def _floats(prepared: Prepared, quantized: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter that stays float, norms with their rescaling in them."""
    floats = {
        name: parameter
        for name, parameter in prepared.model.named_parameters()
        if f"{name}.codes" not in quantized
    }
    for name, norm in prepared.norms.items():
        floats[f"{name}.weight"], floats[f"{name}.bias"] = norm.folded()
    return floats


def check_scale(scale: Tensor, name: str) -> None:
    """Refuse a scale that TensorRT would refuse: not positive, or not finite."""
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ContractError(f"{name}: scales must be positive and finite, found {float(scale.min()):.3g}")
