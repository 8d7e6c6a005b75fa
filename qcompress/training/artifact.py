"""Writer of the train stage's files: trained.safetensors (final tensors of every quantizer, every rescaling,
and the float tensors that training changed) and trained.json.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qcompress.errors import ModelError
from qcompress.models.plan import plans_to_json, points_to_json, site_to_json
from qcompress.models.prepare import own_tensors
from qcompress.quant.codebook import is_codebook
from qcompress.quant.types import COMPUTE
from qcompress.system.artifacts import write_json
from qcompress.system.tensor_file import save_tensors
from qcompress.training.methods.protocols import Adapter
from qcompress.training.state import Training


@torch.no_grad()
def save_trained(
    training: Training, adapter: Adapter, float_names: set[str], frozen: bool, digest: str | None,
    ranges: dict[str, dict[str, float]], out: Path,
) -> dict[str, Tensor]:  # fmt: skip
    """Write both files into `out` and return the tensors.

    `float_names`: the parameters of the float model; `frozen`: training changed none of them, and `digest` is
    their SHA-256; `ranges`: the static activation ranges of `make_static`.
    """
    recipe, prepared = training.recipe, training.prepared
    compute = COMPUTE[recipe.format.compute]
    tensors: dict[str, Tensor] = {}
    books = {}
    for name, quantizer in prepared.weight_quantizers():
        parts = quantizer.parts(prepared.layers[name].coded_weight())
        if "scale" in parts:
            parts["scale"] = snap(parts["scale"], compute, f"{name}.weight")
        tensors |= {f"{name}.weight.{part}": tensor for part, tensor in parts.items()}
        if is_codebook(quantizer):
            used = len(parts["assignments"].unique())
            books[name] = {"centroids": len(parts["centroids"]), "unused": len(parts["centroids"]) - used}
    for name, quantizer in prepared.activation_quantizers():
        tensors[f"{name}.scale"] = snap(quantizer.scale_of(), compute, name)
    rescalings = adapter.fold()
    tensors |= {f"{writer}.rescale": scale for writer, scale in rescalings.items()}
    changed = []
    if not frozen:
        looked_up = {f"{name}.weight" for name in books}  # replaced by assignments and centroids
        model_tensors = own_tensors(prepared.model)
        changed = [name for name in model_tensors if name in float_names and name not in looked_up]
        tensors |= {name: model_tensors[name] for name in changed}
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(out / "trained.safetensors", contents)
    sites = {site.writer: site for site in training.architecture.sites}
    write_json(
        out / "trained.json",
        {
            "family": prepared.family,
            "compute": recipe.format.compute,
            "plan": plans_to_json(prepared.plan),
            "points": points_to_json(prepared.points),
            "rescalings": [site_to_json(sites[writer]) for writer in rescalings],
            "changed": changed,
            "weights_unchanged": {"sha256": digest} if frozen else None,
            "static_ranges": ranges,
            "codebooks": books,
            "phases": training.facts,
        },
    )
    return contents


def snap(scale: Tensor, compute: torch.dtype, name: str) -> Tensor:
    """Round a scale to the nearest value of the compute type, returned in fp32. Raises ModelError unless the
    result is positive and finite.

    Rounding scales here, and not at export, keeps the integers of training and deployment equal.
    """
    smallest = torch.finfo(compute).smallest_normal
    if compute == torch.float16:
        smallest = 2.0**-24  # fp16 kernels keep subnormal numbers
    snapped = scale.detach().float().clamp_min(smallest).to(compute).float()
    if not bool((snapped.isfinite() & (snapped > 0)).all()):
        raise ModelError(
            f"{name}: a scale of {float(scale.abs().max()):.3g} does not fit into {compute}",
            fix="use format.compute: fp32, or leave this layer in float under format.layers",
        )
    return snapped
