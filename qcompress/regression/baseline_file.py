"""Writing baseline.json. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from qcompress.regression.standing import Standing


def write_baseline(standing: Standing, file: Path) -> None:
    """Write it whole or not at all: goals in their order, one line for each column of the samples."""
    values = standing.to_json()
    samples = values.pop("samples")
    head = json.dumps(values, indent=1)
    columns = ",\n".join(
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(key)}: {json.dumps(cells)}" for key, cells in sorted(found.items()))
        + "\n  }"
        for name, found in samples.items()
    )
    partial = file.with_name(file.name + ".partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(f'{head[:-2]},\n "samples": {{\n{columns}\n }}\n}}\n', encoding="utf-8")
    os.replace(partial, file)
