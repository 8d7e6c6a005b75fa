"""Stage `fold`: TrainedModel -> FoldedModel, with integer weights, constant scales and plain float tensors.

Reads trained.safetensors, and the float checkpoint for tensors that training did not change. Rescalings are
multiplied into norms or value projections and divided out of their readers' weights. Weights become int8
codes: linear layers [in, out], tables [rows, width], convolutions [out, in / groups, height, width]. The
batch norm behind a quantized convolution is folded into scales and bias; a float convolution keeps its batch
norm. A weight scale is raised if a runtime's int32 bias would saturate (`quant/int32_bias.py`). The training
method is not an input of this stage.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompress.encodings import CODES, encoding_of
from qcompress.errors import ContractError, ExportError
from qcompress.models.plan import plans_to_json, points_to_json
from qcompress.models.prepare import Prepared, QuantizedLayer, own_tensors
from qcompress.models.rebuild import rebuild
from qcompress.quant.batchnorm import fold_batch_norm, gain_and_bias
from qcompress.quant.conv import QuantizedConv
from qcompress.quant.int32_bias import least_scales, raise_scales
from qcompress.quant.layers import QuantizedLinear, QuantizedTied, QuantizedWeight
from qcompress.quant.types import COMPUTE
from qcompress.system.artifacts import FloatModel, TrainedModel, read_json, write_json
from qcompress.system.tensor_file import save_tensors


@torch.no_grad()
def fold(float_model: FloatModel, trained: TrainedModel, out: Path) -> list[str]:
    """Write folded.safetensors, folded.json, config.json and the tokenizer; returns notes for the user.

    Raises ExportError if the compute type cannot represent a scale or a float.
    """
    compute = read_json(trained.path / "trained.json")["compute"]
    tensors, facts, notes = _folded(rebuild(float_model, trained), COMPUTE[compute])
    gc.collect()  # frees the float model, whose modules form reference cycles
    imprecise = check_compute(tensors, compute)
    save_tensors(out / "folded.safetensors", tensors, {"format": "pt"})
    write_json(
        out / "folded.json",
        {
            **facts,
            "compute": compute,
            "codes": sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == torch.int8),
        },
    )
    for file in float_model.path.iterdir():
        if file.name not in ("float.json", "manifest.json", "model.safetensors"):
            shutil.copyfile(file, out / file.name)
    if not imprecise:
        return notes
    worst = max(imprecise, key=imprecise.__getitem__)
    return [
        *notes,
        f"scales below the smallest normal {compute} lose digits in {len(imprecise)} tensors: "
        f"{100 * imprecise[worst]:.2g} % in {worst}; `compute: bf16` or `fp32` keeps them",
    ]


def _folded(prepared: Prepared, compute: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Return the tensors (copies, so that the float model can be freed), the content of folded.json, and
    notes for the user.
    """
    quantized = _codes(prepared)
    notes = _fold_norms(prepared, quantized, compute)
    raised = _raise_scales(prepared, quantized, compute)
    if raised:
        scales, codes = (sum(counts[key] for counts in raised.values()) for key in ("scales", "codes"))
        notes.append(
            f"{scales} weight scales of {len(raised)} layers are raised, so that their int32 biases do not "
            f"saturate in a runtime; {codes} codes change"
        )
    floats = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in _floats(prepared, quantized).items()
    }
    plan, points = plans_to_json(prepared.plan), points_to_json(prepared.points)
    facts = {"family": prepared.family, "plan": plan, "points": points, "raised": raised}
    return quantized | floats, facts, notes


def _fold_norms(prepared: Prepared, tensors: dict[str, Tensor], compute: torch.dtype) -> list[str]:
    """Fold batch norms into the scales and biases of the quantized convolutions in front of them, in place in
    `tensors`. For a codebook weight the batch norm becomes a gain and a bias. Returns notes for the user.
    """
    zeroed, plans = 0, {item.name: item for item in prepared.plan}
    for name, layer in prepared.layers.items():
        if isinstance(layer, QuantizedConv) and layer.norm is not None:
            rescaling = None if layer.gain is None else layer.gain()
            if not plans[name].integers:
                gain, bias = gain_and_bias(layer.bias, layer.norm, rescaling)
                tensors |= {f"{name}.gain": gain, f"{name}.bias": bias}
                continue
            codes, scale = (tensors[f"{name}.weight.{part}"] for part in ("codes", "scale"))
            codes, scale, bias, zeros = fold_batch_norm(
                codes, scale, layer.bias, layer.norm, compute, rescaling
            )
            check_scale(scale, f"{name}.weight")
            tensors |= {f"{name}.weight.codes": codes, f"{name}.weight.scale": scale, f"{name}.bias": bias}
            zeroed += zeros
    return [f"batch norms multiply {zeroed} channels by 0: only their shifts are left"] if zeroed else []


def _raise_scales(
    prepared: Prepared, quantized: dict[str, Tensor], compute: torch.dtype
) -> dict[str, dict[str, int]]:
    """Raise the weight scales of layers whose int32 bias would saturate, in place in `quantized`; returns the
    counts of raised scales and changed codes by layer.

    Skips layers without a bias, layers with a float input, and weights with scales per block or per codebook,
    which no runtime multiplies as integers.
    """
    raised = {}
    for name, layer in prepared.layers.items():
        inputs = _input_scales(prepared, name, quantized)
        scale = quantized.get(f"{name}.weight.scale")
        bias = _deployed_bias(name, layer, quantized)
        if bias is None or not inputs or scale is None or scale.dim() != 1:
            continue
        codes = quantized[f"{name}.weight.codes"]
        channels_last = isinstance(layer, QuantizedLinear)
        least = least_scales(bias, torch.stack(inputs).to(compute).min())
        changed, scale, scales, count = raise_scales(
            codes.t() if channels_last else codes, scale, least, compute
        )
        if scales:
            check_scale(scale, f"{name}.weight")
            changed = changed.t().contiguous() if channels_last else changed
            quantized |= {f"{name}.weight.codes": changed, f"{name}.weight.scale": scale}
            raised[name] = {"scales": scales, "codes": count}
    return raised


def _input_scales(prepared: Prepared, name: str, quantized: dict[str, Tensor]) -> list[Tensor]:
    """Input scales of a layer and of the layers that share its weight and bias; float inputs have none."""
    owner = prepared.layers[name]
    sharers = [
        other
        for other, layer in prepared.layers.items()
        if isinstance(layer, QuantizedTied) and layer.owner is owner
    ]
    keys = [f"{one}.input.scale" for one in (name, *sharers)]
    return [quantized[key].reshape(()) for key in keys if key in quantized]


def _deployed_bias(name: str, layer: QuantizedLayer, quantized: dict[str, Tensor]) -> Tensor | None:
    """Deployed bias of a linear or convolution layer, [out], or None."""
    if f"{name}.bias" in quantized:
        return quantized[f"{name}.bias"]
    return layer.rescaled_bias() if isinstance(layer, QuantizedWeight) else None


def _codes(prepared: Prepared) -> dict[str, Tensor]:
    """Codes and scales of every quantized tensor, checked against the format."""
    tensors: dict[str, Tensor] = {}
    plans = {item.name: item for item in prepared.plan}
    for name, layer in prepared.layers.items():
        if isinstance(layer, QuantizedWeight):
            parts = encoding_of(plans[name].weights).fold(layer, plans[name])
            if "scale" in parts:
                check_scale(parts["scale"], f"{name}.weight")
            tensors |= {f"{name}.weight.{part}": tensor for part, tensor in parts.items()}
        if getattr(layer, "input_quantizer", None) is not None:
            scale = layer.input_quantizer.scale_of()
            check_scale(scale, f"{name}.input")
            tensors[f"{name}.input.scale"] = scale
    for name, point in prepared.rounding.items():
        check_scale(point.scale_of(), name)
        tensors[f"{name}.scale"] = point.scale_of()
    return tensors


def _floats(prepared: Prepared, quantized: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that stay float; rescalings are folded into norms and biases."""
    norms = {item.layer.norm for item in prepared.plan if item.weights and item.layer.norm}
    floats = {
        name: tensor
        for name, tensor in own_tensors(prepared.model).items()
        if not {name, *(f"{name}.{codes}" for codes in CODES)} & quantized.keys()
        and name.rpartition(".")[0] not in norms
    }
    for name, layer in prepared.layers.items():
        if f"{name}.bias" in floats and getattr(layer, "gain", None) is not None:
            floats[f"{name}.bias"] = layer.rescaled_bias()
    for name, norm in prepared.norms.items():
        floats |= {f"{name}.{part}": tensor for part, tensor in norm.folded().items()}
    return floats


def check_compute(tensors: dict[str, Tensor], compute: str) -> dict[str, float]:
    """Raise ExportError for floats that overflow and scales that become 0 in the compute type. Returns, for
    each tensor with scales below the smallest normal number of the type, their largest relative error.
    """
    dtype, imprecise = COMPUTE[compute], {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        cast = tensor.to(dtype).float()
        beyond = cast.isinf() & tensor.isfinite()
        if bool(beyond.any()):
            raise ExportError(
                f"{name}: {float(tensor[beyond].abs().max()):.3g} is beyond the largest {compute}, "
                f"{torch.finfo(dtype).max:.6g}",
                fix="set `format.compute: bf16` or `fp32`",
            )
        if not name.endswith(".scale"):
            continue
        if bool((cast == 0).any()):
            raise ExportError(
                f"{name}: the scale {float(tensor.min()):.3g} becomes 0 in {compute}",
                fix="set `format.compute: bf16` or `fp32`, or keep the layer float in format.layers",
            )
        small = tensor < torch.finfo(dtype).tiny
        worst = float(((cast - tensor).abs() / tensor)[small].max()) if bool(small.any()) else 0.0
        if worst > 0:
            imprecise[name] = worst
    return imprecise


def check_scale(scale: Tensor, name: str) -> None:
    """Raise ContractError for scales that are not positive and finite, which TensorRT refuses."""
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ContractError(f"{name}: scales must be positive and finite, found {float(scale.min()):.3g}")
