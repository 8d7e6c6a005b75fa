"""Models of a user's Python function: from the file to a verdict, refusals, and code that never runs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strangers_net
import torch
import yaml
from lines import cli

from qcompress.errors import ModelError
from qcompress.models import FAMILIES, describe
from qcompress.models.architecture import Head
from qcompress.models.checkpoint_files import read_config
from qcompress.models.python_child import main
from qcompress.models.python_source import called, make_checkpoint
from qcompress.pipeline.stages.load import locate
from qcompress.schema.recipe import Model
from qcompress.system.artifacts import read_json

HERE, HEAD = Path(__file__).parent, Head("image-classification")
W4A16 = {"weights": {"bits": 4, "container": "int8"}, "activations": "float"}


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of made checkpoints, of this module alone."""
    folder = tmp_path_factory.getbasetemp() / "kept"
    monkeypatch.setenv("QCOMPRESS_STRUCTURES", str(folder / "structures"))
    return folder / "python"


def copied(folder: Path) -> Path:
    """The stranger's two files in a folder."""
    for name in ("strangers_net.py", "strangers_blocks.py"):
        shutil.copyfile(HERE / name, folder / name)
    return folder


def recipe(folder: Path, **sections: Any) -> Path:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (24, 16, 16, 3), np.uint8), np.arange(24) % 3
    np.savez(folder / "images.npz", image=images, label=labels)
    data = {"npz": ["images.npz"], "columns": {"image": "image", "label": "label"}}
    values = {
        "name": "stranger", "model": {"python": "strangers_net.py"}, "format": "w8a8", "method": "ptq",
        "task": {"name": "image-classification", "mean": [0.5] * 3, "std": [0.5] * 3},
        "data": {"calibration": data, "evaluate": {"test": data}}, "build": {"target": "cpu"}, **sections,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def test_the_made_checkpoint_is_the_module(tmp_path: Path) -> None:
    source = make_checkpoint("strangers_net.py:make", HERE)
    config = read_config(source)
    assert config["image_size"] == [16, 16] and len(config["id2label"]) == 3
    assert [Path(name).name for name in config["python"]["files"]] == [
        "strangers_net.py", "strangers_blocks.py"
    ]  # fmt: skip
    family = FAMILIES["image-model"]
    model, (stock, _) = family.load_float(source), strangers_net.make()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images).logits, stock.eval()(images))
    architecture = describe("image-model", source, HEAD)
    assert architecture.parameters == sum(one.numel() for one in stock.parameters())
    assert {layer.name for layer in architecture.layers} == {
        f"model.{name}"
        for name, module in stock.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert [layer.name for layer in architecture.layers if layer.kind == "head"] == ["model.head"]
    assert {site.writer: site.readers for site in architecture.sites} == {
        "model.gated.0.spread": ("model.gated.0.out",),
        "model.gated.1.spread": ("model.gated.1.out",),
        "model.norm": ("model.attention.qkv",),
        "model.attention.qkv": ("model.attention.project",),
        "model.value": ("model.back",),
    }
    unset = family.empty(source)
    assert all(parameter.is_meta for parameter in unset.parameters())
    assert not any(buffer.is_meta for buffer in unset.buffers())


@pytest.mark.parametrize("form", ["w8a8", pytest.param(W4A16, marks=pytest.mark.slow)])
def test_a_strangers_module_runs_from_recipe_to_verdict(form: Any, tmp_path: Path) -> None:
    file = recipe(copied(tmp_path), format=form)
    said = cli("check", file)
    assert said.code == 0 and "the code of strangers_net.py makes the model" in said.stdout
    done = cli("run", file, "--out", tmp_path / "runs")
    assert done.code == 0, done.stderr
    run = (tmp_path / "runs" / "stranger" / "latest").resolve()
    assert read_json(run / "verdict.json")["verdict"] == "accept"
    assert read_json(run / "certificate.json")["complete"]


def test_a_module_with_layers_that_stay_float_runs_from_recipe_to_verdict(tmp_path: Path) -> None:
    file = recipe(copied(tmp_path), model={"python": "strangers_net.py:fused"})
    said = cli("check", file)
    for line in (
        "model.grow: float, ConvTranspose2d has no quantized counterpart",
        "layers hold 52 % of the values of the model's matrices",
    ):
        assert line in said.stdout
    done = cli("run", file, "--smoke", "--out", tmp_path / "runs")
    assert done.code == 0, done.stderr
    (certificate,) = (tmp_path / "runs" / "stranger-smoke").glob("*/certificate.json")
    named = {layer["name"] for layer in read_json(certificate)["layers"]}
    assert named == {"model.encoder.linear1", "model.encoder.linear2", "model.twice", "model.head"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("half", r"the parameter share is torch.float16, and must be fp32"),
        ("alone", r"alone of strangers_net.py returned Stranger"),
        ("maps", r"the module returns \[1, 4, 14, 14\], and images need logits \[batch, labels\]"),
        ("of_other_size", r"strangers_net.py: the module fails on its example \(RuntimeError"),
        ("absent", r"has no function absent"),
    ],
)
def test_a_function_that_makes_no_classifier_is_refused(
    function: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The child process, in this one."""
    monkeypatch.setattr(sys, "argv", ["", str(HERE / "strangers_net.py"), function, "images", str(tmp_path)])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert main() == 1
    said, fix = capsys.readouterr().out.splitlines()
    assert re.search(message, said) and fix


def test_a_refusal_and_an_exception_of_the_users_code_are_reported() -> None:
    with pytest.raises(ModelError, match=r"share is torch.float16, and must be fp32") as refused:
        make_checkpoint("strangers_net.py:half", HERE)
    assert refused.value.fix == "return `module.float()`"
    with pytest.raises(ModelError, match=r"ended with code 1: ZeroDivisionError: none"):
        make_checkpoint("strangers_net.py:broken", HERE)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused = cli("check", recipe(tmp_path))
    assert refused.code == 2 and "strangers_net.py does not exist" in refused.stderr


def test_a_changed_import_is_another_checkpoint_and_ends_a_run_at_work(tmp_path: Path) -> None:
    net = copied(tmp_path)
    source = make_checkpoint("strangers_net.py", net)
    blocks = net / "strangers_blocks.py"
    blocks.write_text(blocks.read_text().replace("torch.sigmoid", "torch.tanh"))
    with pytest.raises(ModelError, match=r"strangers_blocks.py was changed after the run had read it"):
        FAMILIES["image-model"].load_float(source)
    again = make_checkpoint("strangers_net.py", net)
    assert again != source and make_checkpoint("strangers_net.py", net) == again
    FAMILIES["image-model"].load_float(again)
    assert all(len(folder.name) == 24 for folder in again.parent.iterdir())


def test_an_installed_package_below_the_file_is_none_of_its_imports(tmp_path: Path) -> None:
    """A project's `.venv`: forgotten and imported again, torch's extensions would end the process."""
    net, packages = copied(tmp_path) / "strangers_net.py", tmp_path / ".venv" / "lib" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "strangers_package.py").write_text(
        "import sys\nassert not hasattr(sys, 'strangers_package')\nsys.strangers_package = True\n"
    )
    path = f"import sys\nsys.path.append({str(packages)!r})\nimport strangers_package\n"
    net.write_text(net.read_text().replace("import math\n", f"import math\n{path}"))
    try:
        for _ in range(2):
            _, files = called(net, "make", "images")
    finally:
        sys.path = [entry for entry in sys.path if entry != str(packages)]
        sys.modules.pop("strangers_package", None)
        del sys.strangers_package
    assert str(net) in files and not any("site-packages" in file for file in files)


@pytest.mark.parametrize("key", ["source", "run"])
def test_a_checkpoint_runs_no_code(key: str, tmp_path: Path) -> None:
    net = copied(tmp_path)
    source = make_checkpoint("strangers_net.py", net)
    trap = net / "strangers_net.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + trap.read_text())
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "verdict.json").write_text("{}")
    values = json.loads((other / "config.json").read_text())
    values["python"]["files"] = {}
    (other / "config.json").write_text(json.dumps(values))
    file = recipe(tmp_path, model={"family": "image-model", key: "other"})
    for command in ("check", "run"):
        refused = cli(command, file)
        assert refused.code == 2 and "which no checkpoint may" in refused.stderr
    with pytest.raises(ModelError, match="which no checkpoint may"):
        locate(Model(family="image-model", **{key: "other"}), tmp_path)
    with pytest.raises(ModelError, match="which no checkpoint may"):
        describe("image-model", other, HEAD)
    assert not (tmp_path / "ran").exists()


def test_other_families_and_origins_beside_it_are_refused(tmp_path: Path) -> None:
    copied(tmp_path)
    for model, said in (
        ({"family": "bert", "python": "strangers_net.py"}, "`python` makes a model of images"),
        ({"source": "x", "python": "strangers_net.py"}, "exactly one of `source`, `run` and `python`"),
    ):
        refused = cli("check", recipe(tmp_path, model=model))
        assert refused.code == 2 and said in refused.stderr
