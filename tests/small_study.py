"""The modules of recipes/studies, which are no package, and a study of a tiny GPT-2 to run with them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

STUDIES = Path(__file__).parent.parent / "recipes" / "studies"

MODULES = ("jobs", "plot", "results", "run", "study", "table")


@dataclass(frozen=True)
class Machinery:
    """The modules beside run.py, which are no package."""

    jobs: ModuleType
    plot: ModuleType
    results: ModuleType
    run: ModuleType
    study: ModuleType
    table: ModuleType


@contextmanager
def machinery() -> Iterator[Machinery]:
    """The modules, found for as long as it lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STUDIES)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Machinery(*(importlib.import_module(name) for name in MODULES))


README = "# A study\n\n{begin}\n{end}\n\nWhat it means.\n"

STUDY: dict[str, Any] = {
    "title": "lsq for longer",
    "seeds": [0, 1],
    "tasks": {"letters": {"train": "train.txt", "test": "test.txt", "key": "text", "holdout": 0.3}},
    "start": {"recipe": "float.yaml", "set": {"model.source": "{data}/model"}},
    "arms": {
        "lsq": {
            "recipe": "lsq.yaml",
            "trials": [
                {"train.lr.weight": 1e-5, "train.lr.other": 1e-5},
                {"train.lr.weight": 0.2, "train.lr.other": 0.2},
            ],
        },
        "lsq-long": {"recipe": "lsq.yaml", "set": {"train.phases.finetune.steps": 20}, "trials": "lsq"},
    },
    "tables": {"longer": {"arms": ["lsq", "lsq-long"], "baseline": "lsq"}},
    "plot": {"series": {"lsq": ["lsq", "lsq-long"]}},
}

COMMON: dict[str, Any] = {
    "model": {"family": "gpt2", "source": "float"},
    "task": {"name": "causal-lm", "context": 32},
    "data": {
        "train": {"text": ["train.txt"]},
        "calibration": {"text": ["train.txt"], "limit": 8},
        "evaluate": {"test": {"text": ["test.txt"]}},
    },
    "build": {"here": "never"},
    "verify": {"samples": 8, "distance_samples": 2},
}


def write_study(folder: Path, tools: Machinery, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    (folder / "README.md").write_text(README.format(begin=tools.table.BEGIN, end=tools.table.END))
    train = {"device": "cpu", "batch_size": 4, "phases": {"finetune": {"steps": 10}}}
    recipes = {"float": {"format": "float", "method": "float"}, "lsq": {"format": "w8a8", "method": "lsq"}}
    for name, values in recipes.items():
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"name": name, **COMMON, "train": train, **values})
        )
    return folder
