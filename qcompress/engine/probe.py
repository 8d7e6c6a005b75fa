"""Probe kit: the files with which a device measures its engine, and the import of its measurement. No torch.

probe/inputs.npz     length [samples], set (index into `sets`), and the task's arrays: ids and first of a
                     language model, the graph's inputs of any other, int32 [samples, longest] or, for images,
                     fp32 [samples, channels, height, width]
probe/reference.npz  logits [compared, positions, outputs] of the onnx row, and the indices of these
positions:
                     all of them, or as many as fit into 20 MB, spread over the sequence
probe/probe.json     names of the sets, hashes of the graph and the plan, the kind of per-sample results
probe/measure_engine.py, with engine_runners.py, engine_speed.py and strict_json.py beside it
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompress.errors import UsageError
from qcompress.system import strict_json
from qcompress.system.artifacts import (
    Engine,
    OnnxModel,
    disabled_optimizers,
    read_json,
    sha256_file,
    write_json,
)
from qcompress.system.untrusted_file import JSON_LIMIT, demand_file

KIT_BYTES = 20_000_000
"""Upper limit of the kit's size."""

SPARE_BYTES = 2**17
"""Bytes reserved for the script, probe.json and the headers of the archives."""

FEWEST_POSITIONS = 16
"""Minimum number of positions of a sample; the number of samples is reduced first."""

FORMAT = 1
"""Version of engine.json."""

FAR = {"to", "max_abs", "mean_abs", "range", "cosine", "snr_db", "top1_agreement", "positions"}
"""Fields of a distance."""

SCRIPT = Path(__file__).parent / "probe_kit" / "measure_engine.py"


@dataclass(frozen=True)
class EngineMeasurement:
    """A device's measurement: the distance to onnx, facts about the device, and by evaluation set either
    `samples`, results of a language model, or `logits` [samples, ...] of any other model, from which its task
    computes results.
    """

    samples: dict[str, list[dict[str, float]]] | None
    logits: dict[str, np.ndarray] | None
    distance: dict[str, object]
    facts: dict[str, object]


def write_probe(
    folder: Path,
    sets: Mapping[str, int],
    arrays: dict[str, np.ndarray],
    logits: Path,
    onnx: OnnxModel,
    engine: Engine | None,
    ranked: bool = True,
    outputs: Sequence[str] = (),
) -> None:
    """Write the kit into `folder`.

    `sets`: number of samples in each set; `arrays`: the task's arrays for all samples, in that order;
    `logits`: the .npy file of the onnx row; `ranked`: the largest of them is the answer; `outputs`: names of
    the compared outputs, where they are not the logits alone.
    """
    folder.mkdir(exist_ok=True)
    set_index = np.repeat(np.arange(len(sets), dtype=np.int32), list(sets.values()))
    np.savez_compressed(folder / "inputs.npz", **arrays, set=set_index)  # equal arrays give equal files
    reference = np.load(logits, mmap_mode="r")
    room = KIT_BYTES - (folder / "inputs.npz").stat().st_size - SPARE_BYTES
    count, positions = _affordable(*reference.shape[:2], room // int(reference[0, 0].nbytes))
    np.savez(folder / "reference.npz", logits=reference[:count][:, positions], positions=positions)
    build = read_json(engine.path / "build.json") if engine else {}
    plan = engine.plan if engine else None
    write_json(
        folder / "probe.json",
        {
            "sets": list(sets),
            "onnx_sha256": sha256_file(onnx.file),
            "plan_sha256": sha256_file(plan) if plan else None,
            "backend": build.get("backend") or "tensorrt",
            "disabled_optimizers": disabled_optimizers(onnx.file),
            "per_sample": "nll" if arrays.keys() & {"first", "targets"} else "logits",
            **({} if ranked else {"ranked": False}),
            **({"outputs": list(outputs)} if outputs else {}),
        },
    )
    for script in (*SCRIPT.parent.glob("*.py"), Path(strict_json.__file__)):
        shutil.copyfile(script, folder / script.name)


def _affordable(samples: int, context: int, room: int) -> tuple[int, np.ndarray]:
    """Number of samples, and indices of their positions, that fit into `room` positions in all.

    >>> _affordable(4, 32, 1000)[1].size, _affordable(4, 32, 80)[0], _affordable(4, 32, 80)[1][:3].tolist()
    (32, 4, [0, 1, 3])
    """
    each = min(context, max(FEWEST_POSITIONS, room // samples))
    count = min(samples, max(1, room // each))
    return count, np.linspace(0, context - 1, each).astype(np.int32)


def read_measurement(file: Path, probe: Path, onnx: Path) -> EngineMeasurement:
    """Read engine.json. Raises UsageError if it was measured on another graph, plan or kit."""
    facts = read_json(probe / "probe.json")
    measurement = _parse(file, facts["per_sample"])
    plan = facts["plan_sha256"] if measurement["measured"] == "plan" else None
    for item, claimed, expected in (
        ("graph", measurement["onnx_sha256"], sha256_file(onnx)),
        ("inputs", measurement["inputs_sha256"], sha256_file(probe / "inputs.npz")),
        ("plan", measurement["file_sha256"], plan),
    ):
        if expected is not None and claimed != expected:
            raise UsageError(
                f"{file} was measured on another {item} (sha256 {str(claimed)[:12]}, here {expected[:12]})",
                fix="copy probe/ and engine/ of this run to the device and measure again",
            )
    with np.load(probe / "inputs.npz") as archive:
        inputs = {
            name: archive[name] for name in ("length", "first", "targets", "set") if name in archive.files
        }
    count = len(inputs["length"])
    fields = ("nll", "correct") if facts["per_sample"] == "nll" else ("logits",)
    for name in fields:
        if len(measurement[name]) != count:
            raise UsageError(
                f"{file} has {len(measurement[name])} samples under {name!r}, the probe has {count}",
                fix="copy probe/ of this run to the device and measure again",
            )
    names = ("versions", "machine", "seconds", "measured", "file_sha256", "speed", "consistency", "device",
             "kernels")  # fmt: skip
    kept = {key: measurement.get(key) for key in names}
    samples = logits = None
    if facts["per_sample"] == "nll":
        samples = _results(measurement, inputs, facts["sets"])
    else:
        logits = {
            name: measurement["logits"][inputs["set"] == set_index]
            for set_index, name in enumerate(facts["sets"])
        }
    return EngineMeasurement(samples, logits, measurement["distance"], kept)


def _results(
    measurement: dict[str, Any], inputs: dict[str, np.ndarray], sets: list[str]
) -> dict[str, list[dict[str, float]]]:
    """Results of a language model, by set."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in sets}
    for row, set_index in enumerate(inputs["set"]):
        if "targets" in inputs:
            tokens = int((inputs["targets"][row] >= 0).sum())
        else:
            tokens = int(inputs["length"][row] - inputs["first"][row])
        samples[sets[int(set_index)]].append(
            {"nll": measurement["nll"][row], "correct": measurement["correct"][row], "tokens": tokens}
        )
    return samples


def _parse(file: Path, per_sample: str) -> dict[str, Any]:
    """Parse the fields of engine.json that are used here. Raises UsageError for any other file."""
    demand_file(file, limit=JSON_LIMIT, fix="name the file that measure_engine.py wrote")
    try:
        measurement = strict_json.loads(file.read_text(encoding="utf-8"))
        if measurement["format"] != FORMAT:
            raise ValueError(f"format {measurement['format']!r}, and this version reads {FORMAT}")
        if missing := FAR - measurement["distance"].keys():
            raise KeyError(*missing)
        if per_sample == "nll":
            measurement["nll"] = [float(value) for value in measurement["nll"]]
            measurement["correct"] = [int(value) for value in measurement["correct"]]
        else:
            measurement["logits"] = _unpacked(measurement["logits"])
        for key in ("measured", "file_sha256", "onnx_sha256", "inputs_sha256"):
            str(measurement[key])
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise UsageError(
            f"{file} is not a measurement ({error!r})", fix="name the file that measure_engine.py wrote"
        ) from None
    return measurement


def _unpacked(value: dict[str, Any]) -> np.ndarray:
    """Decode logits as packed by the script, fp32."""
    content = base64.b64decode(value["float32"], validate=True)
    return np.frombuffer(content, "<f4").reshape(value["shape"])
