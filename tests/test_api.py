"""The Python API: the calls that the command line is made of."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
from lines import NAME, Project, finished, make_project, python

import qcompress
from qcompress import api
from qcompress.errors import ExportError, ModelError, RecipeError, UsageError
from qcompress.pipeline.run import Run
from qcompress.schema.recipe import STAGES
from qcompress.system.artifacts import read_json


@pytest.fixture(scope="module")
def project(tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file)


@pytest.fixture
def mine(project: Project, tmp_path: Path) -> Project:
    return project.copy(tmp_path / "mine")


# Names --------------------------------------------------------------------------------------------


def test_the_api_is_four_callables_that_the_package_hands_out() -> None:
    assert qcompress.__all__ == ["gate", "load", "run", "verify"]
    for name in qcompress.__all__:
        assert callable(getattr(api, name)) and getattr(qcompress, name) is getattr(api, name)
        assert inspect.getdoc(getattr(api, name))


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = python("import sys, qcompress; print(sorted(set(sys.modules) & {'torch', 'pydantic', 'onnx'}))")
    assert done.code == 0 and done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="module 'qcompress' has no attribute 'nonsense'"):
        qcompress.nonsense  # noqa: B018


# run ----------------------------------------------------------------------------------------------


def test_run_returns_the_folder_the_verdict_and_every_step(mine: Project) -> None:
    run = mine.run()
    assert isinstance(run, Run) and run.path == mine.out / NAME / mine.latest.name
    assert run.verdict == "accept" and [step.stage for step in run.steps] == list(STAGES)


def test_a_cache_may_lie_elsewhere_and_serve_several_folders(mine: Project, tmp_path: Path) -> None:
    run = mine.run()
    assert all(step.path.is_relative_to(mine.cache) for step in run.steps)
    moved = api.run  # the same recipe into another folder, with the first one's cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        other = moved(mine.recipe, tmp_path / "other", cache=mine.cache)
    assert all(step.reused for step in other.steps) and other.path.is_relative_to(tmp_path / "other")
    assert (other.path / "model.onnx").read_bytes() == (run.path / "model.onnx").read_bytes()


def test_run_raises_what_is_wrong_with_a_recipe(mine: Project, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the recipe has 2 mistakes") as found:
        mine.run("train.batch=4", "build.target=abacus")
    assert [mistake.key for mistake in found.value.mistakes] == ["build.target", "train.batch"]
    with pytest.raises(RecipeError, match="transformer.nonsense"):
        mine.run('format.layers."transformer.nonsense"=float')
    shutil.rmtree(mine.folder / "model")
    (mine.folder / "model").mkdir()
    with pytest.raises(ModelError, match="holds no config.json"):
        mine.run()


# load ---------------------------------------------------------------------------------------------


def test_load_opens_a_run(project: Project) -> None:
    loaded = api.load(str(project.latest))
    assert loaded.recipe.name == NAME and loaded.recipe.method == "quadapter"
    assert loaded.verdict["verdict"] == "accept" and len(loaded.parity["rows"]) == 5
    assert loaded.stage("export") == project.entry("export")


def test_load_refuses_what_is_no_finished_run(mine: Project, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe.resolved.yaml is missing"):
        api.load(tmp_path)
    (mine.latest / "verdict.json").unlink()
    with pytest.raises(UsageError, match="is not a finished run: verdict.json is missing"):
        api.load(mine.latest)


def test_a_stage_that_is_gone_from_the_cache_is_none(mine: Project) -> None:
    shutil.rmtree(mine.entry("train"))
    assert api.load(mine.latest).stage("train") is None


def test_a_run_can_be_opened_when_its_data_and_its_model_are_gone(mine: Project) -> None:
    shutil.rmtree(mine.folder / "model")
    (mine.folder / "text.txt").unlink()
    assert api.load(mine.latest).recipe.data.evaluate.keys() == {"test", "other"}


# gate and verify ----------------------------------------------------------------------------------


def test_gate_judges_what_parity_json_says_now(mine: Project) -> None:
    assert api.gate(mine.latest)["verdict"] == "accept"
    file = mine.latest / "parity.json"
    file.write_text(file.read_text().replace('"max_abs": 0.0', '"max_abs": 1.0', 1))
    assert suite_of(mine)["failures"] == "0"
    verdict = api.gate(mine.latest)
    assert verdict["verdict"] == "regression" and verdict == read_json(mine.latest / "verdict.json")
    assert suite_of(mine)["failures"] == "2"  # the goal, and the verdict


def suite_of(project: Project) -> dict[str, str]:
    """Counts of the run's junit.xml."""
    return ElementTree.parse(project.latest / "junit.xml").getroot().attrib


def test_verify_finds_what_the_run_found(mine: Project) -> None:
    before = (mine.latest / "parity.json").read_bytes()
    (mine.latest / "parity.json").write_bytes(before.replace(b'"measured"', b'"not-run"'))
    assert api.verify(mine.latest)["verdict"] == "accept"
    assert (mine.latest / "parity.json").read_bytes() == before
    assert not [path for path in mine.latest.iterdir() if path.name.startswith("tmp")]


def test_verify_holds_the_graph_against_the_folded_model_first(mine: Project) -> None:
    file = mine.latest / "model.onnx"
    model = onnx.load(str(file))
    (scale,) = [item for item in model.graph.initializer if item.name == "lm_head.input.scale"]
    scale.raw_data = bytes([scale.raw_data[0] ^ 1]) + scale.raw_data[1:]
    onnx.save(model, str(file))
    with pytest.raises(ExportError, match="lm_head: the input's scale") as refused:
        api.verify(mine.latest)
    assert "run the recipe again" in refused.value.fix


def test_verify_needs_the_folded_model(mine: Project) -> None:
    shutil.rmtree(mine.entry("fold"))
    with pytest.raises(UsageError, match="the folded model of .* is gone from the cache"):
        api.verify(mine.latest)


def test_verify_without_the_float_model_measures_the_rest_and_cannot_accept(mine: Project) -> None:
    (mine.folder / "model").rename(mine.folder / "moved")
    verdict = api.verify(mine.latest)
    assert verdict["verdict"] == "anomalous" and verdict["not_measured"] == ["float", "trained", "engine"]
    assert any("required row float was not measured" in reason for reason in verdict["reasons"])


@pytest.mark.slow
def test_a_ptq_run_on_the_processor_alone_is_accepted(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    other = make_project(
        tmp_path / "other", tiny_model, text_file, method="ptq", train={"device": "cpu"},
        build={"target": "cpu"}, format="w4a16-g32",
    )  # fmt: skip
    run = other.run()
    assert run.verdict == "accept"
    engine = read_json(run.path / "parity.json")["rows"][-1]
    assert engine["status"] == "not-run" and "runs the ONNX file itself" in engine["reason"]
