"""Writer of baseline.json. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcompress.system import strict_json
from qcompress.system.places import write_named
from qcompress.verdict.baseline.snapshot import Snapshot


def write_baseline(snapshot: Snapshot, file: Path) -> None:
    """Write a baseline.json atomically: goals in their order, one line for each column of the samples."""
    values = strict_json.finite(snapshot.to_json())
    parts = [f' "{key}": {_columns(values.pop(key))}' for key in ("slices", "samples")]
    head = json.dumps(values, indent=1)
    write_named(file, ",\n".join([head[:-2], *parts]) + "\n}\n")


def _columns(sets: dict[str, dict[str, list[Any]]]) -> str:
    entries = ",\n".join(
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(key)}: {json.dumps(cells)}" for key, cells in sorted(columns.items()))
        + "\n  }"
        for name, columns in sets.items()
    )
    return f"{{\n{entries}\n }}" if entries else "{}"
