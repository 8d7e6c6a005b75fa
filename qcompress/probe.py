"""The probe kit: what a device needs to measure its engine, and how its answer is taken in again. No torch.

probe/inputs.npz     ids int32 [samples, longest], length, first, set (index into `sets`)
probe/reference.npz  logits [compared, positions, vocabulary] of the onnx row, and which positions these are:
                     all of them, or as many as fit into 20 MB, spread over the sequence
probe/probe.json     names of the sets, hashes of the graph and the plan
probe/measure_engine.py
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompress.artifacts import Engine, OnnxModel, read_json, sha256_file, write_json
from qcompress.errors import UsageError

KIT_BYTES = 20_000_000
"""Largest size of the kit."""

SPARE_BYTES = 2**17
"""Room for the script, probe.json and the headers of the archives."""

FEWEST_POSITIONS = 16
"""Rather fewer samples than fewer positions of each."""

FORMAT = 1
"""Version of engine.json."""

FAR = {"to", "max_abs", "mean_abs", "range", "cosine", "snr_db", "top1_agreement", "positions"}
"""Fields of a distance."""

SCRIPT = Path(__file__).parent / "probe_kit" / "measure_engine.py"


@dataclass(frozen=True)
class EngineMeasurement:
    """What a device measured: per-sample results by evaluation set, the distance to onnx, and where."""

    samples: dict[str, list[dict[str, float]]]
    distance: dict[str, object]
    facts: dict[str, object]


def write_probe(
    folder: Path, sets: dict[str, list[Any]], logits: Path, onnx: OnnxModel, engine: Engine | None
) -> None:
    """Fill `folder` with the kit; `logits` is the .npy file of the onnx row."""
    folder.mkdir(exist_ok=True)
    windows = [(index, window) for index, found in enumerate(sets.values()) for window in found]
    longest = max(len(window.ids) for _, window in windows)
    ids = np.zeros((len(windows), longest), np.int32)
    for row, (_, window) in enumerate(windows):
        ids[row, : len(window.ids)] = window.ids
    _save_npz(
        folder / "inputs.npz",
        ids=ids,
        length=np.array([len(window.ids) for _, window in windows], np.int32),
        first=np.array([window.first for _, window in windows], np.int32),
        set=np.array([index for index, _ in windows], np.int32),
    )
    reference = np.load(logits, mmap_mode="r")
    room = KIT_BYTES - (folder / "inputs.npz").stat().st_size - SPARE_BYTES
    count, positions = _affordable(*reference.shape[:2], room // int(reference[0, 0].nbytes))
    _save_npz(folder / "reference.npz", logits=reference[:count][:, positions], positions=positions)
    build = read_json(engine.path / "build.json") if engine else {}
    plan = engine.plan if engine else None
    write_json(
        folder / "probe.json",
        {
            "sets": list(sets),
            "onnx_sha256": sha256_file(onnx.file),
            "plan_sha256": sha256_file(plan) if plan else None,
            "backend": build.get("backend") or "tensorrt",
        },
    )
    shutil.copyfile(SCRIPT, folder / SCRIPT.name)


def _affordable(samples: int, context: int, room: int) -> tuple[int, np.ndarray]:
    """How many samples and which of their positions fit, where there is room for that many positions in all.

    >>> _affordable(4, 32, 1000)[1].size, _affordable(4, 32, 80)[0], _affordable(4, 32, 80)[1][:3].tolist()
    (32, 4, [0, 1, 3])
    """
    each = min(context, max(FEWEST_POSITIONS, room // samples))
    count = min(samples, max(1, room // each))
    return count, np.linspace(0, context - 1, each).astype(np.int32)


def _save_npz(file: Path, **arrays: np.ndarray) -> None:
    """Uncompressed, without time stamps: equal arrays give equal files."""
    np.savez(file, **arrays)


def read_measurement(file: Path, probe: Path, onnx: Path) -> EngineMeasurement:
    """engine.json, held against the kit and the graph it claims to belong to."""
    found = _parse(file)
    facts = read_json(probe / "probe.json")
    plan = facts["plan_sha256"] if found["measured"] == "plan" else None
    for what, claimed, own in (
        ("graph", found["onnx_sha256"], sha256_file(onnx)),
        ("inputs", found["inputs_sha256"], sha256_file(probe / "inputs.npz")),
        ("plan", found["file_sha256"], plan),
    ):
        if own is not None and claimed != own:
            raise UsageError(
                f"{file} was measured on another {what} (sha256 {str(claimed)[:12]}, here {own[:12]})",
                fix="copy probe/ and engine/ of this run to the device and measure again",
            )
    with np.load(probe / "inputs.npz") as archive:
        inputs = {name: archive[name] for name in ("length", "first", "set")}
    count = len(inputs["length"])
    for name in ("nll", "correct"):
        if len(found[name]) != count:
            raise UsageError(
                f"{file} has {len(found[name])} samples under {name!r}, the probe has {count}",
                fix="copy probe/ of this run to the device and measure again",
            )
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in facts["sets"]}
    for row in range(count):
        samples[facts["sets"][int(inputs["set"][row])]].append(
            {
                "nll": found["nll"][row],
                "correct": found["correct"][row],
                "tokens": int(inputs["length"][row] - inputs["first"][row]),
            }
        )
    kept = {key: found.get(key) for key in ("versions", "machine", "seconds", "measured", "file_sha256")}
    return EngineMeasurement(samples, found["distance"], kept)


def _parse(file: Path) -> dict[str, Any]:
    """Content of engine.json, as far as it is used here."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, and this version reads {FORMAT}")
        if missing := FAR - found["distance"].keys():
            raise KeyError(*missing)
        found["nll"] = [float(value) for value in found["nll"]]
        found["correct"] = [int(value) for value in found["correct"]]
        for key in ("measured", "file_sha256", "onnx_sha256", "inputs_sha256"):
            str(found[key])
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise UsageError(
            f"{file} is not a measurement ({error!r})", fix="name the file that measure_engine.py wrote"
        ) from None
    return found
