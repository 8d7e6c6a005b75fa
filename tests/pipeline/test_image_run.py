"""The whole line on images: what a run leaves behind, what a device needs of it, and one answer from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from lines import ENVIRONMENT, cli, environment, plain_session
from PIL import Image
from tiny_vit import LABELS, SIZE, draw, save_vit, values, write_images
from transformers import AutoImageProcessor, ViTForImageClassification

from qcompress import api
from qcompress.cli.predict import answer, classify_image
from qcompress.engine.probe import SCRIPT
from qcompress.errors import ExportError, UsageError
from qcompress.parity.sample_results import read_samples
from qcompress.pipeline.run import Run
from qcompress.system.artifacts import read_json

SECTIONS: dict[str, Any] = {
    "method": "saq",
    "format": {"preset": "w8a8", "attention": "int8", "residual": "int8"},
    "objective": "distillation",
    "build": {"target": "rtx-ada", "profiles": [{"batch": [1, 2, 4]}]},
    # random weights: flipped roundings cascade, so the default limits say nothing about this model
    "gate": {
        "float_floor": {"test.accuracy": 0.0},
        "parity": {"onnx": {"mean_abs": 0.05, "top1_agreement": 0.8}},
    },
}


def started(recipe: Path, *overrides: str, **options: Any) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        return api.run(recipe, recipe.parent / "runs", overrides=overrides, **options)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, images and a recipe. Read only."""
    folder = write_images(tmp_path_factory.mktemp("project"))
    save_vit(folder / "model")
    recipe = values(steps=4, **SECTIONS)
    recipe["data"]["train"]["augment"] = {"flip": True, "crop": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def run(project: Path) -> Run:
    return started(project / "recipe.yaml")


def test_a_run_has_the_files_of_images_and_is_measured(run: Run, project: Path) -> None:
    assert run.verdict == "accept"
    assert (run.path / "preprocessor_config.json").read_bytes() == (
        project / "model" / "preprocessor_config.json"
    ).read_bytes()
    assert not list(run.path.glob("*token*")) and (run.path / "engine" / "model.plan").is_file()
    parity = read_json(run.path / "parity.json")
    rows = {row["stage"]: row for row in parity["rows"]}
    assert set(rows["onnx"]["metrics"]) == {"test.accuracy", "test.cross_entropy"}
    assert parity["main"] == {"test": ["accuracy"]} and rows["onnx"]["samples"] == 24
    assert rows["folded"]["distance"]["max_abs"] == 0 and rows["onnx"]["distance"]["positions"] == 24
    model = ViTForImageClassification.from_pretrained(project / "model").eval()
    images, labels = draw(60)
    processor = AutoImageProcessor.from_pretrained(project / "model", backend="pil")
    given = processor(list(images[:24]), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        logits = model(**given).logits
    right = float((logits.argmax(-1).numpy() == labels[:24]).mean())
    assert rows["float"]["metrics"]["test.accuracy"] == right
    found = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[:24])))
    assert rows["float"]["metrics"]["test.cross_entropy"] == pytest.approx(found, rel=1e-5)
    entry = read_samples(run.path / "samples.json.gz")["test"]
    assert entry["label"] == labels[:24].tolist()
    assert set(entry["rows"]["float"]) == {"prediction", "rank", "loss"}


def test_an_equal_run_makes_nothing_and_moved_images_change_nothing(
    run: Run, project: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    shutil.copyfile(project / "images.npz", tmp_path / "other" / "images.npz")
    moved = json.dumps({"npz": [str(tmp_path / "other" / "images.npz")], "limit": 24})
    again = started(project / "recipe.yaml", f"data.evaluate.test={moved}")
    assert all(step.reused for step in again.steps)
    checked = cli("check", project / "recipe.yaml", "--out", project / "runs", "--json")
    assert checked.code == 0, checked.stderr


def test_every_code_of_the_graph_is_the_folded_models(run: Run) -> None:
    found = api.compare_layers(run.path)
    assert found["unexplained"] == 0 and found["first_unexplained"] is None
    assert sum(place.get("codes") or 0 for place in found["layers"]) > 100_000
    assert found["windows"] == 24


def test_what_a_device_measures_comes_back_as_the_engine_row(run: Run, project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    with np.load(folder / "probe" / "inputs.npz") as kit:
        assert kit["input.pixel_values"].shape == (24, 3, SIZE, SIZE)
        assert kit["input.pixel_values"].dtype == np.float32 and kit["length"].tolist() == [1] * 24
    command = [sys.executable, str(folder / "probe" / SCRIPT.name), "--onnx", "../model.onnx", "--batch", "5",
               "--out", "../engine.json"]  # fmt: skip
    done = subprocess.run(command, env=environment(), cwd=folder / "probe", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = cli("verify", folder, "--engine", folder / "engine.json")
    assert found.code == 0, found.stderr
    rows = {row["stage"]: row for row in read_json(folder / "parity.json")["rows"]}
    assert rows["engine"]["status"] == "measured" and rows["engine"]["samples"] == 24
    assert rows["engine"]["metrics"] == pytest.approx(rows["onnx"]["deployed"]["metrics"], rel=1e-3)
    # the script compares with the row at the basic level; a batch of 5 flips what a batch of 8 does not
    assert rows["engine"]["distance"]["top1_agreement"] >= 0.9


def test_predict_says_what_the_graph_says_of_a_file(run: Run, project: Path, tmp_path: Path) -> None:
    image = draw(3, size=30, seed=5)[0][1]
    Image.fromarray(image).save(tmp_path / "one.png")
    loaded = api.load(run.path)
    found = classify_image(loaded, tmp_path / "one.png")
    processor = AutoImageProcessor.from_pretrained(run.path, backend="pil")
    pixels = processor([image], return_tensors="np", input_data_format="channels_last")["pixel_values"]
    session = plain_session(run.path / "model.onnx", optimized=True)
    logits = session.run(["logits"], {"pixel_values": pixels})[0][0].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum()
    assert dict(found) == pytest.approx(dict(zip(LABELS, shares, strict=True)), rel=1e-5)
    assert [label for label, _ in found] == [LABELS[place] for place in np.argsort(-shares)]
    printed = cli("predict", run.path, tmp_path / "one.png")
    assert printed.code == 0 and printed.stdout == answer(loaded, str(tmp_path / "one.png"), None, 1) + "\n"
    assert printed.stdout.splitlines()[0] == f"{found[0][0]}\t{found[0][1]:.4f}"
    with pytest.raises(UsageError, match="one image is classified"):
        answer(loaded, str(tmp_path / "one.png"), "text", 1)
    with pytest.raises(UsageError, match=r"none\.png does not exist"):
        answer(loaded, str(tmp_path / "none.png"), None, 1)


def test_the_recipes_own_preparation_travels_with_the_run(project: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(project, tmp_path / "project", ignore=shutil.ignore_patterns("runs"))
    (folder / "model" / "preprocessor_config.json").unlink()
    missing = cli("run", folder / "recipe.yaml", "--out", folder / "runs", "--until", "load")
    assert missing.code == 2, missing.stderr
    assert "holds no preprocessor_config.json" in missing.stderr and "`mean`, `std`" in missing.stderr
    own = "task={name: image-classification, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], size: [16, 16]}"
    short = started(folder / "recipe.yaml", own, "build.target=cpu", until="fold")
    (step,) = [step for step in short.steps if step.stage == "fold"]
    written = read_json(step.path / "preprocessor_config.json")
    assert written["image_mean"] == [0.5] * 3 and written["size"] == {"height": 16, "width": 16}


@pytest.mark.slow
def test_a_graph_made_elsewhere_is_taken_in(run: Run, project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    shutil.copytree(project / "model", folder / "model")
    shutil.copyfile(project / "images.npz", folder / "images.npz")
    shutil.copyfile(run.path / "model.onnx", folder / "theirs.onnx")
    recipe = {
        "name": "theirs", "model": {"family": "vit", "source": "model"},
        "task": {"name": "image-classification"},
        "data": {"evaluate": {"test": {"npz": ["images.npz"], "limit": 24}}},
        "export": {"graph": "theirs.onnx"}, "build": {"target": "cpu"}, "train": {"device": "cpu"},
        "gate": {"parity": {"onnx": {"mean_abs": 1.0, "max_abs": 2.0, "top1_agreement": 0.0}}},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    theirs = started(folder / "recipe.yaml")
    ours, found = (read_json(one.path / "parity.json")["rows"] for one in (run, theirs))
    metrics = [{row["stage"]: row for row in rows}["onnx"]["metrics"] for rows in (ours, found)]
    assert metrics[0] == metrics[1]
    model = onnx.load(str(folder / "theirs.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 8
    onnx.save(model, str(folder / "theirs.onnx"))
    with pytest.raises(ExportError, match=r"must be \[batch, 3, 16, 16\], the batch of any size, and is"):
        started(folder / "recipe.yaml")


@pytest.mark.slow
def test_a_smoke_run_is_whole(project: Path) -> None:
    found = cli(
        "run", project / "recipe.yaml", "--out", project / "runs", "--smoke", "--set", "build.target=cpu"
    )
    assert found.code == 0, found.stderr
    assert found.stdout.splitlines()[-1].startswith("unjudged  tiny-vit-smoke")
