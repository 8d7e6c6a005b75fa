"""The studies that ship: their tables are made of their results, and every run that they ask for is valid."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_study import STUDIES, Machinery, machinery

from qcompress.recipe.load import examine

SHIPPED = sorted(file.parent.name for file in STUDIES.glob("*/study.yaml"))


@pytest.fixture(scope="module")
def tools() -> Iterator[Machinery]:
    with machinery() as found:
        yield found


def test_there_are_studies() -> None:
    assert SHIPPED == ["compositions", "quadapter", "quant-noise", "saq-images", "squat-saq", "ti"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_table_of_a_study_is_made_of_its_results(tools: Machinery, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    shutil.copytree(STUDIES / name, folder)
    tools.table.rebuild(folder, tools.study.read_study(STUDIES / name))
    for file in ("README.md", "score.svg"):
        if (STUDIES / name / file).exists() or (folder / file).exists():
            assert (folder / file).read_bytes() == (STUDIES / name / file).read_bytes()


@pytest.mark.parametrize("name", SHIPPED)
def test_results_are_those_of_the_study(tools: Machinery, name: str) -> None:
    """Every result is a run that study.yaml asks for; every arm had as many trials."""
    study = tools.study.read_study(STUDIES / name)
    jobs = {"{}-{}-{}".format(*job) for job in study.jobs()}
    files = list((STUDIES / name / "results").glob("*.json"))
    for file in files:
        assert file.stem in jobs | {"trials"} and file.stat().st_size < 200_000
    measured = {result["arm"] for result in tools.results.read_results(STUDIES / name)}
    choosers = {study.chooser(arm) for arm in measured} - {None}
    trials = STUDIES / name / "results" / "trials.json"
    made = json.loads(trials.read_text()) if trials.exists() else {}
    assert choosers <= set(made) <= {study.chooser(arm) for arm in study.arms} - {None}
    for arm in choosers:  # an arm that is not measured yet may have some of its trials
        tasks = [task for task in study.trials.tasks or study.tasks if task in study.tasks_of(arm)]
        found = [(trial["set"], trial["task"]) for trial in made[arm]["trials"]]
        assert found == [(settings, task) for settings in study.arms[arm].trials for task in tasks]
        assert made[arm]["chosen"] in study.arms[arm].trials


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_run_of_a_study_is_a_valid_recipe(
    tools: Machinery, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resolved as run.py does, with the real data; the float model's run is not there, and need not be."""
    study = tools.study.read_study(STUDIES / name)
    if not os.environ.get("QCOMPRESS_ASSETS"):
        pytest.skip("QCOMPRESS_ASSETS does not name a directory of real models and texts")
    place = tools.jobs.Place(STUDIES / name, Path(os.environ["QCOMPRESS_ASSETS"]).resolve(), tmp_path)
    monkeypatch.setattr(tools.jobs, "fingerprint", lambda folder: folder.name)  # such a model has no weights
    for model in re.findall(r"\{made\}/([\w-]+)", (STUDIES / name / "study.yaml").read_text()):
        (place.made / model).mkdir(parents=True, exist_ok=True)  # as the study's own script would
    count = 0
    for arm, task, seed in study.jobs():
        chooser = study.chooser(arm)
        trials = [{}] if chooser is None else study.arms[chooser].trials
        start = None
        if study.start is not None:
            start = tools.jobs.start_job(study, task, place), tmp_path / "float"
            start[1].mkdir(exist_ok=True)
        for chosen in trials:
            job = tools.jobs.arm_job(study, arm, task, seed, place, start, chosen)
            document, recipe = examine(job.recipe, job.overrides)
            assert recipe is not None and document.mistakes == []
            assert recipe.seed == seed
            assert start is None or recipe.model.run == str(tmp_path / "float")
            count += 1
    assert count >= len(set(study.jobs())) > 20
