"""The study of mixtures that ships: its table is made of its results, and its results are of its recipes."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_study import STUDIES

from qcompress.errors import UsageError

FOLDER = STUDIES / "sensitivity"


@pytest.fixture(scope="module")
def tools() -> Iterator[tuple[ModuleType, ModuleType]]:
    """mixtures.py and mixture_table.py, which are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDIES)
        yield importlib.import_module("mixtures"), importlib.import_module("mixture_table")


def results() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((FOLDER / "results").glob("*.json"))]


def test_the_table_is_made_of_the_results(tools: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    mixtures, table = tools
    folder = tmp_path / "sensitivity"
    shutil.copytree(FOLDER, folder)
    table.rebuild(folder, mixtures.read_mixtures(folder))
    assert (folder / "README.md").read_bytes() == (FOLDER / "README.md").read_bytes()


def test_results_are_those_of_the_study_and_small(tools: tuple[ModuleType, ModuleType]) -> None:
    mixtures, _ = tools
    names = {mixtures.name_of(*job) for job in mixtures.read_mixtures(FOLDER).jobs()}
    files = list((FOLDER / "results").glob("*.json"))
    assert files and {file.stem for file in files} <= names
    assert max(file.stat().st_size for file in files) < 100_000


def test_a_mixture_was_judged_at_equal_bytes_by_samples_that_did_not_choose_it() -> None:
    count = 0
    for item in results():
        for budget, mixture in item.get("mixtures", {}).items():
            uniform = item["formats"][budget]["bytes"]
            assert 0.99 * uniform < mixture["bytes"] <= uniform
            assert mixture["fresh"] is True
            for control in mixture["controls"].values():
                assert 0.99 * mixture["bytes"] < control["bytes"] <= mixture["bytes"]
            count += 1
    assert count >= 4


def test_the_table_counts_and_averages_as_by_hand(tools: tuple[ModuleType, ModuleType]) -> None:
    _, table = tools
    mean, interval, below = table._over_seeds([[-1.0, 0.1], [-2.0, 0.1], [-3.0, 2.0]])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2)
    assert (mean, below) == ("-2", "2 of 3")
    assert interval == f"{-2 - half:+.2g} to {-2 + half:+.2g}"
    (line,) = table._alone("dev", [{"only_right": {"uniform": 1, "mixture": 5}}])
    assert "1 and 5 (p = 0.22)" in line  # 2 * (1 + 6) / 2**6


def test_a_study_with_a_word_too_many_is_refused(
    tools: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    mixtures, _ = tools
    text = (FOLDER / "mixtures.yaml").read_text()
    (tmp_path / "mixtures.yaml").write_text(text.replace("controls:", "contols:"))
    with pytest.raises(UsageError, match="contols"):
        mixtures.read_mixtures(tmp_path)


def test_a_result_that_is_there_is_not_made_again(
    tools: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the bundled GPT-2, with the digest of its recipe, texts and weights as they are here."""
    mixtures, _ = tools

    def refuse(*_: Any) -> None:
        raise AssertionError("made")

    monkeypatch.setattr(mixtures.Runner, "chosen", refuse)
    study = mixtures.read_mixtures(FOLDER)
    runner = mixtures.Runner(study, FOLDER, tmp_path, tmp_path / "work")
    assert runner.make("gpt2", 0, None) is None
    options = study.models["gpt2"]
    more = options.model_copy(update={"samples": options.samples + 1})
    changed = study.model_copy(update={"models": study.models | {"gpt2": more}})
    with pytest.raises(AssertionError, match="made"):
        mixtures.Runner(changed, FOLDER, tmp_path, tmp_path / "work").make("gpt2", 0, None)


@pytest.mark.slow
def test_both_sides_on_the_test_data_are_the_recipes_with_their_formats(
    tools: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    """The whole study of the bundled GPT-2 with few samples."""
    mixtures, _ = tools
    folder = tmp_path / "studies" / "sensitivity"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("results"))
    shutil.copytree(STUDIES.parent / "quickstart", tmp_path / "quickstart")
    recipe = folder / "gpt2.yaml"
    recipe.write_text(recipe.read_text().replace("samples: 192", "samples: 8"))
    text = (folder / "mixtures.yaml").read_text()
    (folder / "mixtures.yaml").write_text(
        text.replace("samples: 32", "samples: 4").replace("fresh: 96", "fresh: 8")
    )
    mixtures.main(
        [str(folder), "--only", "gpt2-0*", "--out", str(tmp_path / "runs"), "--data", str(tmp_path)]
    )
    chosen = json.loads((folder / "results" / "gpt2-0.json").read_text())
    tested = json.loads((folder / "results" / "gpt2-0-int4-g32.json").read_text())
    assert chosen["samples"] == 4 and chosen["digest"] == tested["digest"]
    assert tested["sets"].keys() == {"shakespeare", "wikitext2"}
    for found in tested["sets"].values():
        assert found["float"] < found["uniform"] and found["uniform"] != found["mixture"]
        assert found["loss"] == pytest.approx(found["mixture"] - found["uniform"])
    # at equal bytes of weights the files are equally large, but for the zero points of int8 layers
    assert tested["onnx_bytes"]["mixture"] == pytest.approx(tested["onnx_bytes"]["uniform"], rel=0.02)
    assert os.listdir(folder / "results") and "int4-g32 everywhere" in (folder / "README.md").read_text()
