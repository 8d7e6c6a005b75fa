"""Fixtures that many tests share. What they build is described in `tiny.py`."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from once import once, shared_root
from tiny import Line, make_checkpoint, make_recipe, start_line, write_text

from qcompress.models.kept_folder import FOLDER


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors this small gain nothing from threads, and on a busy machine threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_collection() -> Iterator[None]:
    """Stages collect garbage to free a model before the next one; those of tests are tiny."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("train", "fold", "verify"):
            nothing = SimpleNamespace(collect=lambda: 0)
            patch.setattr(f"qcompress.pipeline.stages.{stage}.gc", nothing)
        yield


@pytest.fixture(autouse=True)
def _no_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page at the end of a run takes seconds, and many tests run a line; tests/report makes it."""
    if request.path.parent.name != "report":
        monkeypatch.setattr("qcompress.report.html.subprocess_writer.write_beside", lambda folder, say: None)


@pytest.fixture(scope="session", autouse=True)
def _edited_runs() -> Iterator[None]:
    """Tests edit files of a run to make the case that they are about; tests/faults is about edits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompress.verdict.run_directory.check_files", lambda run: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _structures(session_folder: Path) -> Iterator[None]:
    """Discovered structures are kept among the workers, and not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(session_folder / "structures"))
        yield


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what all workers read; see `once`."""
    return shared_root(tmp_path_factory) / "shared"


@pytest.fixture(scope="session")
def text_file(session_folder: Path) -> Path:
    """A UTF-8 text file of about 25,000 characters."""

    def make(folder: Path) -> None:
        folder.mkdir()
        write_text(folder / "text.txt")

    return once(session_folder / "text", make) / "text.txt"


@pytest.fixture(scope="session")
def tiny_model(session_folder: Path, text_file: Path) -> Path:
    """A checkpoint of a tiny GPT-2 with its tokenizer. Read only: copy it before changing it."""
    return once(session_folder / "tiny", lambda folder: make_checkpoint(folder, text_file))


@pytest.fixture(scope="session")
def without_dropout(session_folder: Path, tiny_model: Path) -> Path:
    """The same without dropout. Read only."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_model, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        (folder / "config.json").write_text(json.dumps(config))

    return once(session_folder / "calm", make)


@pytest.fixture(scope="session")
def untied_model(session_folder: Path, text_file: Path) -> Path:
    """The same with a head of its own. Read only."""
    return once(session_folder / "untied", lambda folder: make_checkpoint(folder, text_file, tied=False))


@pytest.fixture(scope="session")
def outlier_model(session_folder: Path, text_file: Path) -> Path:
    """The same function as `tiny_model`, one channel of every rescaled norm 40 times as large. Read only."""
    return once(session_folder / "outlier", lambda folder: make_checkpoint(folder, text_file, outliers=40.0))


@pytest.fixture
def line(tmp_path: Path, tiny_model: Path, text_file: Path) -> Callable[..., Line]:
    """Makes a recipe (see `make_recipe`) and loads its model: `line(method="lsq").train().fold()`."""
    count = 0

    def make(source: Path = tiny_model, **options: Any) -> Line:
        nonlocal count
        count += 1
        return start_line(tmp_path / f"line-{count}", source, text_file, make_recipe(text_file, **options))

    return make


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real models and texts, where the environment names their directory."""
    directory = os.environ.get("QCOMPRESS_ASSETS")
    if not directory:
        pytest.skip("QCOMPRESS_ASSETS does not name a directory of real models and texts")
    return Path(directory)


def pytest_collection_finish() -> None:
    """Imported modules and collected tests stay, so that no collection of garbage needs to visit them. Fold,
    train and verify collect garbage after each model, which would take longer than the tests of a tiny one.
    """
    _freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The modules that the tests of a file imported stay, too."""
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()
