"""Warm-up samples of a Triton model: one for each profile, run before the model counts as ready. No torch.

Token ids, positions and a key-value cache of zeros are valid in every model. An attention mask of zeros is
not (it hides all tokens), so masks are ones, read from a file, because Triton has no other source of ones.
Triton repeats a sample `batch_size` times, so that the file holds one row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qcompress.cli.bundle.triton_config import Tensor
from qcompress.engine.profiles import TOTAL
from qcompress.schema.recipe import Profile

FOLDER = "warmup"
MASK = "attention_mask"
FLOATS = ("TYPE_FP32", "TYPE_FP16", "TYPE_FP64")
PAST = "past"
NUMPY = {
    "TYPE_BOOL": np.bool_, "TYPE_INT32": np.int32, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32,
    "TYPE_FP16": np.float16,
}  # fmt: skip
"""Types of a mask that are supported."""


def samples(
    inputs: list[Tensor], profiles: list[Profile], batch: int, positions: int | None, folder: Path
) -> list[dict[str, Any]]:
    """Entries of `model_warmup`; writes their files to `folder`. `batch`: largest batch of the model, 0
    without batching; `positions`: largest number of tokens that the model takes.

    An external graph may have an axis that no profile covers: it has no warm-up samples.
    """
    entries = []
    for number, profile in enumerate(profiles):
        sizes = _sizes(profile, positions)
        axes = {axis for tensor in inputs for axis in tensor.axes if not isinstance(axis, int)}
        if axes - sizes.keys():
            return []
        rows = min(profile.batch[1], batch) if batch else 1
        given = {}
        for tensor in inputs:
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.axes]
            shape = shape[1:] if batch else shape
            given[tensor.name] = {
                "data_type": tensor.kind, "dims": shape, **_content(tensor, shape, number, folder),
            }  # fmt: skip
        entries.append({"name": f"profile-{number}", "batch_size": rows, "inputs": given})
    return entries


def _sizes(profile: Profile, positions: int | None) -> dict[str, int]:
    """Usual sizes of a profile. The cache holds at least one token, because Triton's samples have no empty
    dimension.
    """
    sizes = {name: opt for name, (_, opt, _) in profile.ranges.items()}
    sizes[PAST] = max(1, sizes[PAST])
    if positions is not None:  # a run for `cpu` does not check its profiles against the model
        sizes["sequence"] = max(1, min(sizes["sequence"], positions - 1))
        sizes[PAST] = max(1, min(sizes[PAST], positions - sizes["sequence"]))
    return sizes | {TOTAL: sizes["sequence"] + sizes[PAST]}


def _content(tensor: Tensor, shape: list[int], number: int, folder: Path) -> dict[str, Any]:
    if tensor.name == MASK and tensor.kind in NUMPY:
        name = f"{tensor.name}-{number}"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(np.ones(shape, NUMPY[tensor.kind]).tobytes())
        return {"input_data_file": name}
    if tensor.kind in FLOATS and PAST not in tensor.name:
        return {"random_data": True}
    return {"zero_data": True}
