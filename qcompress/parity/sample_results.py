"""Per-sample results, samples.json.gz: what tables are rebuilt from without a model. No torch.

{"sets": {name: {"ids": [...], <known>: [...], "slices": {column: [...]}, "rows": {stage: {<field>: [...]}}}}}

<known> are the fields that no model changes (tokens of a window, label), one value a sample; a row's fields
are what its model made of each sample (nll and correct of a language model, loss and prediction otherwise).
`slices`, where the recipe names some, are values of the user's own columns: text, or null where a sample has
none.
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
"""Per-sample results by name, one value a sample, with what is known of the samples."""

REFERENCE = "reference"
"""The float model's predictions among the columns of a row."""


APART = ("ids", "slices", "rows")
"""Keys of a set that are no known fields."""


def write_samples(
    file: Path,
    rows: dict[str, dict[str, list[dict[str, Any]]]],
    known: tuple[str, ...],
    slices: Mapping[str, dict[str, list[str | None]]] = {},
) -> None:
    """Write the results of each stage and set; `known` names the fields that no model changes."""
    sets: dict[str, dict[str, Any]] = {}
    for stage, by_set in rows.items():
        for name, found in by_set.items():
            if name not in sets:
                ids = [f"{name}:{index}" for index in range(len(found))]
                constant = {key: [sample[key] for sample in found] for key in known if key in found[0]}
                parts = {"slices": slices[name]} if name in slices else {}
                sets[name] = {"ids": ids, **constant, **parts, "rows": {}}
            sets[name]["rows"][stage] = fields_of(found, known)
    pack_samples(file, sets)


def fields_of(found: list[dict[str, Any]], known: tuple[str, ...]) -> dict[str, list[Any]]:
    """What a row has of its own of each sample."""
    return {key: [sample[key] for sample in found] for key in found[0] if key not in known}


def known_in(found: list[dict[str, Any]], known: tuple[str, ...]) -> list[dict[str, Any]]:
    """What is known of each sample whatever the row, of the results of one; `known` as in `write_samples`."""
    return [{name: sample[name] for name in known if name in sample} for sample in found]


def known_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """What is known of each sample of a set of samples.json.gz, whatever the row."""
    names = [name for name in entry if name not in APART]
    return [{name: entry[name][place] for name in names} for place in range(len(entry["ids"]))]


def results_of(entry: dict[str, Any], stage: str) -> list[dict[str, Any]] | None:
    """A row's results of a set, as the task's `metrics` takes them; None where there is no such row."""
    fields = entry["rows"].get(stage)
    if fields is None:
        return None
    return [
        {**known, **{name: values[place] for name, values in fields.items()}}
        for place, known in enumerate(known_of(entry))
    ]


def pack_samples(file: Path, sets: dict[str, dict[str, Any]]) -> None:
    """Write the sets as they are in the file; equal sets give equal bytes."""
    file.write_bytes(gzip.compress(strict_json.dumps({"sets": sets}, sort_keys=True).encode(), mtime=0))


def read_samples(file: Path) -> dict[str, dict[str, Any]]:
    """The sets of a file."""
    return strict_json.loads(read_gzip(file))["sets"]


def with_entities(columns: Columns, labels: Sequence[str] | None) -> Columns:
    """The columns with what `span_f1` is made of, where they are of sequences of labelled words: the entities
    that are right, and those of label and prediction together. `labels`: names of the model's outputs.
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
