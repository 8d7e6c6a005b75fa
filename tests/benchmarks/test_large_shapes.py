"""Fold and export of GPT-2's 355 M and 774 M shapes with random weights: peak memory by stage against the
float weights, external data, reload, certificate.

    pytest -m benchmark -s -n 0 tests/benchmarks/test_large_shapes.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from gpt2_shapes import make_checkpoint, run_line

LIMIT, AIM = 2.5, 1.6


@pytest.mark.benchmark
@pytest.mark.parametrize("shape", ["355M", "774M"])
@pytest.mark.parametrize("form", ["w8a8", "w4a16-g128"])
def test_memory_of_fold_and_export(shape: str, form: str, tmp_path: Path, text_file: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", text_file, shape)
    weights = (checkpoint / "model.safetensors").stat().st_size
    cost = run_line(tmp_path / "run", checkpoint, text_file, "export", format=form)
    stages = cost.json("manifest.json")["stages"]
    peaks = {name: stages[name]["peak_mib"] * 2**20 / weights for name in ("train", "fold", "export")}
    words = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in peaks.items())
    print(f"{shape} {form}: float weights {weights / 1e9:.2f} GB; peak of {words}; {cost.seconds:.0f} s")
    file = cost.folder / "model.onnx"
    onnx.checker.check_model(str(file))
    assert cost.json("certificate.json")["complete"]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    ids = np.arange(8)[None]
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids}
    assert np.isfinite(session.run(["logits"], feed)[0]).all()
    assert max(peaks["fold"], peaks["export"]) <= LIMIT
