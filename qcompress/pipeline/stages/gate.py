"""Stage `gate`: ParityReport, goals -> Verdict. No torch.

Reads parity.json and the recipe's goals. Writes verdict.json, and junit.xml for a CI server.
"""

from __future__ import annotations

from pathlib import Path

from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import read_json
from qcompress.verdict.judge import verdict_of, write_verdict


def gate(parity: Path, recipe: Recipe, out: Path, smoke: bool = False) -> None:
    """Judge the measurement in `parity` (parity.json) and write verdict.json and junit.xml to `out`."""
    write_verdict(out, verdict_of(read_json(parity), recipe, smoke), recipe.name)
