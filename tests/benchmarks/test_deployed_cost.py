"""GPT-2's 124 M shape with random weights, from a recipe to a TensorRT-RTX plan and into ONNX Runtime.

Bytes of the ONNX files against fp32, time and memory from recipe to plan, and latency in ONNX Runtime (batch
1, 128 tokens, one thread; interleaved, the least of all rounds, CPU time), with the profile by operator.

    pytest -m benchmark -s -n 0 tests/benchmarks/test_deployed_cost.py
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from gpt2_shapes import CONTEXT, GIB, Cost, make_checkpoint, run_line

ROUNDS = 20
FORMATS = {
    "fp32": {"format": "float", "method": "float"},
    "w8a8": {"format": "w8a8"},
    "w4a16": {"format": "w4a16-g128"},
}
BYTES = {"w8a8": (0.27, 0.26), "w4a16": (0.19, 0.17)}
LATENCY = {"w8a8": (0.55, 0.40)}
SECONDS, MEMORY = (90, 60), (3, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> dict[str, Cost]:
    folder = tmp_path_factory.mktemp("shape")
    checkpoint = make_checkpoint(folder / "model", text_file, "124M")
    return {
        name: run_line(folder / name, checkpoint, text_file, "export" if name == "fp32" else "build", **form)
        for name, form in FORMATS.items()
    }


def session(file: Path, profile: str = "") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling, options.profile_file_prefix = bool(profile), profile
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def inputs() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 300, (1, CONTEXT))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(CONTEXT)[None]}


@pytest.mark.benchmark
def test_bytes_time_and_memory_from_recipe_to_plan(made: dict[str, Cost]) -> None:
    whole = made["fp32"].onnx_bytes
    for name, (limit, aim) in BYTES.items():
        cost = made[name]
        ratio = cost.onnx_bytes / whole
        engine = cost.json("engine/build.json")
        print(
            f"{name}: {cost.onnx_bytes / 1e6:.1f} MB, {ratio:.3f}x of fp32 ({limit} / {aim}); plan "
            f"{engine['plan']['bytes'] / 1e6:.1f} MB, predicted {engine['predicted_bytes'] / 1e6:.1f} MB; "
            f"{cost.seconds:.0f} s, {cost.peak / GIB:.2f} GiB from recipe to plan"
        )
        assert engine["status"] == "built" and ratio <= limit and cost.peak <= MEMORY[0] * 1e9
        assert cost.seconds <= SECONDS[0]


@pytest.mark.benchmark
def test_latency_in_onnxruntime(made: dict[str, Cost], tmp_path: Path) -> None:
    sessions = {name: session(cost.folder / "model.onnx") for name, cost in made.items()}
    least = dict.fromkeys(sessions, float("inf"))
    for _ in range(ROUNDS):
        for name, one in sessions.items():
            began = time.process_time()
            one.run(["logits"], inputs())
            least[name] = min(least[name], time.process_time() - began)
    for name, seconds in least.items():
        print(f"{name}: {1e3 * seconds:.1f} ms, {seconds / least['fp32']:.3f}x of fp32")
        print("  " + ", ".join(profile(made[name].folder / "model.onnx", tmp_path / name)))
    assert least["w8a8"] <= LATENCY["w8a8"][0] * least["fp32"]


def profile(file: Path, prefix: Path) -> list[str]:
    """Share of each kind of operator, the largest first."""
    one = session(file, str(prefix))
    for _ in range(5):
        one.run(["logits"], inputs())
    events = json.loads(Path(one.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    whole = sum(spent.values())
    return [f"{name} {100 * part / whole:.0f} %" for name, part in spent.most_common(8)]
