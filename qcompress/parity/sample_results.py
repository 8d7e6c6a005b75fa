"""Per-sample results, samples.json.gz, from which tables are rebuilt without a model. No torch.

{"sets": {name: {"ids": [...], <known>: [...], "slices": {column: [...]}, "rows": {stage: {<field>: [...]}}}}}

<known> are the fields that do not depend on the model (tokens of a window, label), one value a sample; the
fields of a row are its model's results for each sample (nll and correct of a language model, loss and
prediction otherwise). `slices`, if the recipe names some, are values of the user's own columns: text, or null
for a sample without a value.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompress.system import strict_json
from qcompress.system.untrusted_file import read_gzip
from qcompress.tasks.scores import spans

Columns = Mapping[str, list[Any]]
"""Per-sample results and known fields by name, one value a sample."""

REFERENCE = "reference"
"""Name of the float model's predictions among the columns of a row."""


APART = ("ids", "slices", "rows")
"""Keys of a set that are not known fields."""


def write_samples(
    file: Path,
    rows: dict[str, dict[str, list[dict[str, Any]]]],
    known: tuple[str, ...],
    slices: Mapping[str, dict[str, list[str | None]]] = {},
) -> None:
    """Write the results of each stage and set; `known` names the fields that do not depend on the model."""
    sets: dict[str, dict[str, Any]] = {}
    for stage, by_set in rows.items():
        for name, results in by_set.items():
            if name not in sets:
                ids = [f"{name}:{index}" for index in range(len(results))]
                constant = {key: [sample[key] for sample in results] for key in known if key in results[0]}
                parts = {"slices": slices[name]} if name in slices else {}
                sets[name] = {"ids": ids, **constant, **parts, "rows": {}}
            sets[name]["rows"][stage] = fields_of(results, known)
    pack_samples(file, sets)


def fields_of(results: list[dict[str, Any]], known: tuple[str, ...]) -> dict[str, list[Any]]:
    """Per-sample results that belong to this row, as columns."""
    return {key: [sample[key] for sample in results] for key in results[0] if key not in known}


def known_in(results: list[dict[str, Any]], known: tuple[str, ...]) -> list[dict[str, Any]]:
    """Row-independent fields of each sample, from one row's results; `known` as in `write_samples`."""
    return [{name: sample[name] for name in known if name in sample} for sample in results]


def known_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Row-independent fields of each sample in a set of samples.json.gz."""
    names = [name for name in entry if name not in APART]
    return [{name: entry[name][index] for name in names} for index in range(len(entry["ids"]))]


def results_of(entry: dict[str, Any], stage: str) -> list[dict[str, Any]] | None:
    """A row's results in a set, in the form of the task's `metrics`; None without such a row."""
    fields = entry["rows"].get(stage)
    if fields is None:
        return None
    return [
        {**known, **{name: values[index] for name, values in fields.items()}}
        for index, known in enumerate(known_of(entry))
    ]


def pack_samples(file: Path, sets: dict[str, dict[str, Any]]) -> None:
    """Write sets in the file's format; equal sets give equal bytes."""
    file.write_bytes(gzip.compress(strict_json.dumps({"sets": sets}, sort_keys=True).encode(), mtime=0))


def read_samples(file: Path) -> dict[str, dict[str, Any]]:
    """Read the sets of a file."""
    return strict_json.loads(read_gzip(file))["sets"]


def with_entities(columns: Columns, labels: Sequence[str] | None) -> Columns:
    """Add the columns of `span_f1`, for labelled sequences: the number of correct entities, and the total
    number in label and prediction. `labels`: names of the model's outputs.
    """
    if "positions" not in columns or not labels or "label" not in columns or None in columns["prediction"]:
        return columns
    pairs = [
        [spans([labels[index] for index in sequence]) for sequence in pair]
        for pair in zip(columns["label"], columns["prediction"], strict=True)
    ]
    return {
        **columns,
        "spans_right": [len(label & answer) for label, answer in pairs],
        "spans_total": [len(label) + len(answer) for label, answer in pairs],
    }
