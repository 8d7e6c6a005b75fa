"""One bit of a file turns over, in the cache and in the run; of half of them the times are kept."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lines import Project, finished

from qcompress.system.digests import Seen
from qcompress.system.reporter import Reporter

CACHE, RUN = "bit rot in the cache", "bit rot in the run"

STAGES = ("load", "train", "fold", "export", "build", "verify", "gate")

SLOW = tuple(pytest.param(name, marks=pytest.mark.slow) for name in STAGES[:-1])

PLACES = (0.02, 0.5, 0.97)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Iterator[Project]:
    yield finished(tiny_model, text_file).copy(tmp_path_factory.mktemp("rot") / "project")


def flip(file: Path, where: float, bit: int, keep_times: bool) -> None:
    data, state = bytearray(file.read_bytes()), file.stat()
    data[min(int(len(data) * where), len(data) - 1)] ^= 1 << bit
    file.write_bytes(data)
    if keep_times:
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def content(project: Project) -> dict[str, bytes]:
    """Files that a user trusts: all files of the stages except costs and dates, and all placed files."""
    contents = {}
    for stage in STAGES:
        entry = project.entry(stage)
        for path in entry.rglob("*"):
            if path.is_file() and path.name != "manifest.json":
                contents[f"{stage}/{path.relative_to(entry)}"] = path.read_bytes()
    for path in project.latest.rglob("[!.]*"):
        if path.is_file() and path.name not in ("manifest.json", "log.jsonl", "report.html"):
            contents[f"run/{path.relative_to(project.latest)}"] = path.read_bytes()
    return contents


def run_again(project: Project, **options: object) -> str:
    """The recipe again; what it said."""
    said: list[str] = []
    reporter = Reporter(silent=True)
    reporter.say = said.append  # type: ignore[method-assign]
    assert project.run(reporter=reporter, **options).verdict == "accept"
    return "\n".join(said)


def rotten(project: Project, file: Path, tell: str) -> list[str]:
    """Flip a bit of `file` in three places, one after another, and run again each time: the failures."""
    before, failures = content(project), []
    chance = random.Random(str(file.name))
    for where in PLACES:
        flip(file, where, chance.randrange(8), keep_times=chance.random() < 0.5)
        said = run_again(project)
        after = content(project)
        changed = [name for name in before if after.get(name) != before[name]]
        if changed or after.keys() != before.keys():
            failures.append(f"{where}: {changed} differ")
        if tell not in said:
            failures.append(f"{where}: nothing said, only: {said}")
    return failures


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.attack(CACHE)
@pytest.mark.parametrize(
    "stage", [*(pytest.param(name, marks=pytest.mark.slow) for name in STAGES[:-1]), "gate"]
)
def test_a_flipped_bit_in_a_finished_stage_makes_it_again(
    project: Project, stage: str, tried: Callable[[int], None]
) -> None:
    names = files_of(project.entry(stage))
    tried(len(names) * len(PLACES))
    failures = {
        name: wrong
        for name in names
        if (wrong := rotten(project, project.entry(stage) / name, f"{stage}: runs (damaged: {name} "))
    }
    assert not failures


@pytest.mark.slow
@pytest.mark.attack(CACHE)
def test_a_flipped_bit_beside_the_entries_changes_nothing(
    project: Project, tried: Callable[[int], None]
) -> None:
    """Locks, and what is remembered of digests."""
    names = [path for path in project.cache.rglob(".*") if path.is_file() and path.stat().st_size]
    assert len(names) > len(STAGES)
    tried(len(names) * len(PLACES))
    assert not {path.name: wrong for path in names if (wrong := rotten(project, path, ""))}


@pytest.mark.attack(CACHE)
def test_a_model_that_lost_its_fold_is_not_folded_from_rotten_weights(project: Project) -> None:
    before = content(project)
    shutil.rmtree(project.entry("fold"))
    flip(project.entry("train") / "trained.safetensors", 0.6, 2, keep_times=True)
    assert "train: runs (damaged: trained.safetensors has other content" in run_again(project)
    assert content(project) == before


@pytest.mark.attack(RUN)
def test_a_flipped_bit_in_the_run_is_put_back(project: Project, tried: Callable[[int], None]) -> None:
    names = [name for name in files_of(project.latest) if name not in (".lock", "log.jsonl", "manifest.json")]
    names = [name for name in names if name != "recipe.resolved.yaml" and not name.startswith(".placed")]
    tried(len(names) * len(PLACES))
    failures = {
        name: wrong
        for name in names
        if (
            wrong := rotten(project, project.latest / name, f"{name} in the run was changed, and is put back")
        )
    }
    assert not failures


@pytest.mark.attack(RUN)
@pytest.mark.parametrize("name", [".placed.json", ".lock", "recipe.resolved.yaml", "manifest.json"])
def test_files_that_the_run_itself_writes_are_written_anew(project: Project, name: str) -> None:
    resolved = (project.latest / "recipe.resolved.yaml").read_bytes()
    assert not rotten(project, project.latest / name, "")
    assert (project.latest / "recipe.resolved.yaml").read_bytes() == resolved


@pytest.mark.attack(CACHE)
def test_a_whole_check_needs_no_trust_in_the_file_system(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk returns other bits, and every time that the system knows is as it was."""
    monkeypatch.setattr(Seen, "holds", lambda self, path: path.is_file())
    flip(project.entry("fold") / "folded.safetensors", 0.5, 1, keep_times=True)
    assert "damaged" not in run_again(project)  # what a cheap check cannot see
    assert "damaged: folded.safetensors has other content" in run_again(project, check_cache=True)
