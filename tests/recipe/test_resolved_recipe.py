"""recipe.resolved.yaml depends on no default, and is the same recipe again wherever it is loaded from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lines import Project, cli, finished, make_project

from qcompress.pipeline import keys
from qcompress.recipe.load import dump_recipe, load_recipe
from qcompress.schema import recipe
from qcompress.schema.axes import PHASES
from qcompress.schema.recipe import LEARNING_RATES, STAGES

RECIPES: dict[str, dict[str, Any]] = {
    "ptq": {"method": "ptq", "train": {"device": "cpu"}},
    "lsq": {"method": "lsq", "train": {"device": "cpu", "lr": {"scale": 0.01}}},
    "quadapter": {"method": "quadapter", "train": {"phases": {"finetune": {"steps": 3}}}},
    "saq": {"method": "saq", "train": {"phases": {"finetune": {"steps": 3, "lr": {"weight": 0.5}}}}},
    "ipq": {"method": "ipq", "format": "ipq", "train": {"lr": {"centroid": 0.1}}},
}


@pytest.fixture(params=RECIPES)
def project(request: pytest.FixtureRequest, tiny_model: Path, text_file: Path, tmp_path: Path) -> Project:
    return make_project(tmp_path / "project", tiny_model, text_file, **RECIPES[request.param])


def test_every_rate_and_every_number_of_steps_is_written(project: Project) -> None:
    written = yaml.safe_load(project.recipe.read_text())["train"]
    text = dump_recipe(load_recipe(project.recipe).recipe)
    train, schedule = yaml.safe_load(text)["train"], yaml.safe_load(text)["schedule"]["name"]
    assert list(train["phases"]) == list(PHASES[schedule])
    for name, phase in PHASES[schedule].items():
        own = written.get("phases", {}).get(name, {"steps": phase.steps})
        assert train["phases"][name]["steps"] == own["steps"]
    trained = {role for phase in PHASES[schedule].values() for role in phase.roles}
    assert train["lr"] == {
        role: written.get("lr", {}).get(role, rate)
        for role, rate in LEARNING_RATES.items()
        if role in trained
    }


def test_it_loads_as_the_same_recipe_with_the_same_keys_and_no_default_changes_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys.prepare(load_recipe(project.recipe))
    again = project.folder / "again.yaml"
    again.write_text(dump_recipe(before.recipe))
    for role in LEARNING_RATES:
        monkeypatch.setitem(recipe.LEARNING_RATES, role, 123.0)
    for phases in PHASES.values():
        for name, phase in phases.items():
            monkeypatch.setitem(phases, name, replace(phase, steps=77))
    after = keys.prepare(load_recipe(again))
    assert after.recipe == before.recipe
    assert keys.run_key(after) == keys.run_key(before)
    for stage in STAGES:
        assert keys.parts(after, stage, {}) == keys.parts(before, stage, {}), stage


def test_a_run_directory_is_run_again_from_its_own_recipe(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another directory, with paths that are relative to the recipe's."""
    made = finished(tiny_model, text_file).copy(tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    resolved = made.latest / "recipe.resolved.yaml"
    assert cli("check", resolved, "--out", made.out).code == 0
    done = cli("run", resolved, "--out", made.out, "--json")
    assert done.code == 0, done.stderr
    assert Path(done.json()["path"]).resolve() == made.latest
    assert all(stage["reused"] for stage in done.json()["stages"].values())
    moved = tmp_path / "alone"
    moved.mkdir()
    (moved / "recipe.resolved.yaml").write_text(resolved.read_text())
    assert cli("check", moved / "recipe.resolved.yaml").code == 2  # without a manifest, paths start here
    (moved / "manifest.json").write_text(json.dumps({"base": str(tmp_path / "gone")}))
    assert cli("check", moved / "recipe.resolved.yaml").code == 2
