"""The recipes of images that ship, run for a few steps on a few images: from random weights to a plan."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from lines import ENVIRONMENT
from tiny_vit import draw

from qcompress import api
from qcompress.system.artifacts import read_json

RECIPES = Path(__file__).parent.parent / "recipes"

pytestmark = pytest.mark.slow


GOES_ON = {"vit-cifar10": "vit-cifar10-saq-w8a8", "efficientnet-cifar10": "efficientnet-cifar10-ipq"}
"""Folder that makes a random model, whose float recipe is called like it, and the recipe that goes on."""


@pytest.mark.parametrize("name", GOES_ON)
def test_float_then_quantized_from_a_local_checkpoint_to_a_plan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    file = RECIPES / name / "make_model.py"
    spec = importlib.util.spec_from_file_location("make_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_model(tmp_path / "model")
    images, labels = draw(64, size=32)
    np.savez_compressed(tmp_path / "images.npz", x=images, y=labels)
    data = f"{{npz: [{tmp_path / 'images.npz'}], columns: {{image: x, label: y}}, limit: 32}}"
    common = [f"data.train={data}", f"data.evaluate={{test: {data}}}", "train.device=cpu"]
    common += ["train.batch_size=8", "train.phases={finetune: {steps: 3}}"]
    start = [*common, f"model.source={tmp_path / 'model'}"]
    made = api.run(RECIPES / f"{name}-float.yaml", tmp_path / "runs", overrides=start)
    assert made.verdict == "accept" and (made.path / "model.safetensors").is_file()
    resolved = (made.path / "recipe.resolved.yaml").read_text()
    assert "flip: true" in resolved and "crop: 4" in resolved  # another origin keeps how images are varied
    goals = [
        "gate.float_floor={}",
        "gate.recovery={}",
        "gate.parity={onnx: {mean_abs: 0.05, top1_agreement: 0.5}}",
    ]
    phases = ["train.phases.rest.steps=2"] if name == "efficientnet-cifar10" else []
    then = [*common, *phases, f"data.calibration={data}", f"model.run={made.path}", *goals]
    found = api.run(RECIPES / f"{GOES_ON[name]}.yaml", tmp_path / "runs", overrides=then)
    assert found.verdict == "accept" and (found.path / "engine" / "model.plan").stat().st_size > 0
    certificate = read_json(found.path / "certificate.json")
    points, layers = (4 * 8, 4 * 6) if name == "vit-cifar10" else (0, 26)
    assert certificate["complete"] and certificate.get("expected_points", 0) == points
    assert len([layer for layer in certificate["layers"] if layer["passed"]]) == layers
