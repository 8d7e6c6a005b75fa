"""Experiment tracker process: one of accelerate's trackers, started by `tracking.py`.

    python -m qcompress.pipeline.tracker NAME FOLDER

Reads JSON lines: first {"project", "run", "recipe"}, then the records of log.jsonl, until end of file. The
last record is {"event": "ended", "status": finished | failed | interrupted}; a killed run sends none. An
error ends this process alone. Signals that stop a run are ignored here, because a job scheduler sends them to
all processes of a job; this process ends after the run's last record.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qcompress.system.stopping import SIGNALS

WHICH = ("least", "median", "largest")


def follow(name: str, folder: Path, lines: Iterable[str]) -> None:
    """Log every record of `lines` with a tracker whose files lie in `folder`."""
    records = (json.loads(line) for line in lines)
    first = next(records)
    accelerator = Accelerator(cpu=True, log_with=name, project_dir=str(folder))
    options = {
        "tensorboard": {},
        "mlflow": {"run_name": first["run"], "logging_dir": (folder / "artifacts").as_uri()},
        "wandb": {"name": first["run"]},
    }
    # for tensorboard the project is the folder of its run
    project = first["run"] if name == "tensorboard" else first["project"]
    clean = _for_mlflow if name == "mlflow" else dict
    accelerator.init_trackers(project, config=clean(flat(first["recipe"])), init_kwargs={name: options[name]})
    update, status = 0, "interrupted"
    for record in records:
        update = record.get("update", update)
        status = record["status"] if record.get("event") == "ended" else status
        if values := clean(values_of(record)):
            accelerator.log(values, step=update)
    _end(name, accelerator, status)
    accelerator.end_training()


def _end(name: str, accelerator: Accelerator, status: str) -> None:
    """Close the tracker's run with its status; accelerate would report success in any case."""
    if name == "mlflow":
        import mlflow

        words = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
        mlflow.end_run(words[status])
    elif name == "wandb":
        accelerator.get_tracker("wandb", unwrap=True).finish(exit_code=int(status != "finished"))


def _for_mlflow(values: dict[str, Any]) -> dict[str, Any]:
    """Replace characters that mlflow refuses in names, such as those of globs and slices."""
    return {re.sub(r"[^\w\-. /]", "_", key): value for key, value in values.items()}


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten a recipe into hyperparameters: dotted keys, and value types that every tracker accepts.

    >>> flat({"seed": 0, "data": {"train": {"text": ["a.txt"]}, "calibration": None}})
    {'seed': 0, 'data.train.text': '["a.txt"]', 'data.calibration': 'null'}
    """
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flattened |= flat(value, f"{above}{key}.")
        else:
            plain = isinstance(value, str | int | float)
            flattened[above + key] = value if plain else json.dumps(value)
    return flattened


def values_of(record: dict[str, Any]) -> dict[str, float]:
    """Values of a record to log, by name; empty for most kinds of records."""
    event = record.get("event")
    if event == "update":
        phase = record["phase"]
        terms = {f"{phase}/{name}": value for name, value in record.get("terms", {}).items()}
        rates = {f"lr/{role}": value for role, value in record["lr"].items()}
        return {f"{phase}/loss": record["loss"], **terms, **rates}
    if event == "scales":
        summaries: dict[str, float] = {}
        for name, scale in record["scales"].items():
            many = isinstance(scale, list)
            parts = (
                {f"/{which}": part for which, part in zip(WHICH, scale, strict=True)} if many else {"": scale}
            )
            summaries |= {f"scales/{name}{which}": part for which, part in parts.items()}
        return summaries
    if event == "metrics":
        return {f"{record['row']}/{name}": value for name, value in record["metrics"].items()}
    if event == "finished":
        return {f"seconds/{record['stage']}": record["seconds"]}
    if event == "verdict":
        return {f"verdict/{record['verdict']}": 1.0}
    return {}


if __name__ == "__main__":
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    follow(sys.argv[1], Path(sys.argv[2]), sys.stdin)
