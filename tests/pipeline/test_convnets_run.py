"""Whole runs of convolutional nets: from a local checkpoint to the graph, the plan and the verdict."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from lines import cli
from tiny_nets import recipe_values, save_images, save_net

from qcompress.system.artifacts import read_json

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


@needs_rtx
@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("basic", {"method": "saq", "format": "w8a8"}),
        pytest.param("efficientnet", {"format": {"preset": "w8a8"}}, marks=pytest.mark.slow),
    ],
    ids=["resnet", "efficientnet"],
)
@pytest.mark.slow
def test_a_run_ends_with_a_plan_and_a_verdict(kind: str, sections: dict, tmp_path: Path) -> None:
    save_net(tmp_path / "model", kind)
    archive = save_images(tmp_path / "images.npz")
    values = recipe_values(
        kind, archive.name, steps=2, **sections,
        build={"target": "rtx-ada", "profiles": [{"batch": [1, 4, 8]}]},
        # random weights: flips cascade, so the limits about distances say nothing here
        gate={"parity": {"folded": {"mean_abs": 0.05}, "onnx": {"mean_abs": 0.05}}},
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    done = cli("run", tmp_path / "recipe.yaml", "--out", tmp_path / "runs")
    assert done.code == 0, done.stderr
    run = next((tmp_path / "runs" / values["name"]).glob("latest")).resolve()
    verdict = read_json(run / "verdict.json")
    assert verdict["verdict"] == "accept" and verdict["not_measured"] == ["engine"]
    parity = {row["stage"]: row for row in read_json(run / "parity.json")["rows"]}
    flipped = parity["folded"]["flipped"]
    assert flipped["samples"] == 48 and flipped["codes"] > 10**5
    goals = {goal["metric"]: goal for goal in verdict["goals"]}
    assert goals["parity.folded.flipped"]["passed"]
    assert goals["parity.folded.flipped"]["value"] == flipped["flipped"] / flipped["codes"]
    assert set(parity["onnx"]["metrics"]) >= {"test.accuracy", "test.cross_entropy"}
    assert read_json(run / "engine" / "build.json")["status"] == "built"
    assert (run / "engine" / "model.plan").stat().st_size > 10**4
    assert read_json(run / "lint.json")["findings"] == []
    assert read_json(run / "certificate.json")["complete"]
    layers = cli("verify", run, "--layers", "--json")
    assert layers.code == 0, layers.stderr
    found = read_json(run / "layers.json")
    assert found["unexplained"] == 0 and len(found["layers"]) == len(
        read_json(run / "certificate.json")["layers"]
    )


def test_what_no_convolution_can_be_is_refused_before_anything_runs(tmp_path: Path) -> None:
    save_net(tmp_path / "model", "cifar")
    archive = save_images(tmp_path / "images.npz")
    for form, said in (
        ({"preset": "w4a16-g32"}, "not blocks of 32"),
        ({"weights": {"bits": 4}, "activations": "int8"}, "not int4"),
        ({"weights": "codebook"}, "vectors of 8 do not divide the 27 inputs of conv1"),
        ({"preset": "w8a8", "activations": {"bits": 8, "signed": False}}, "do not fit into int8"),
        ({"preset": "w8a8", "attention": "int8"}, "no points of this kind"),
    ):
        values = recipe_values("cifar", archive.name, format=form)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        done = cli("check", tmp_path / "recipe.yaml")
        assert done.code == 2 and said in done.stderr, done.stderr
