"""Validation of baseline.json, which may have been edited by hand. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qcompress.errors import UsageError
from qcompress.schema.goals import PARITY, Gate
from qcompress.system import strict_json
from qcompress.system.untrusted_file import JSON_LIMIT, demand_file

FORMAT = 1
"""Version of baseline.json; other versions are refused."""

FIX = "make it again: qcompress baseline promote RUN"


class _Row(BaseModel):
    """A row of the ladder; unknown keys are kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    stage: str
    status: str
    metrics: dict[str, float] = {}


class _Parity(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    rows: list[_Row]
    inputs: dict[str, str] = {}
    main: dict[str, list[str]] = {}


class Written(BaseModel):
    """Keys of baseline.json, as in the fields of `Snapshot`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    recipe: str
    row: str
    gate: Gate
    require: list[str]
    compute: str = Field(pattern=f"^(?:{'|'.join(PARITY)})$")
    float_trains: bool
    task: dict[str, Any]
    parity: _Parity
    known: dict[str, list[str]]
    readers: dict[str, str]
    resources: dict[str, float]
    latency: dict[str, float] | None = None
    device: str | None
    versions: dict[str, str]
    samples: dict[str, dict[str, list[Any]]]
    slices: dict[str, dict[str, list[str | None]]] = {}

    @model_validator(mode="after")
    def _adds_up(self) -> Written:
        """Check that the row was measured and that all columns of a set have equally many cells."""
        if not any(row.stage == self.row and row.status == "measured" for row in self.parity.rows):
            raise ValueError(f"parity.rows has no measured row {self.row}")
        if self.known.keys() != self.samples.keys():
            raise ValueError("known and samples are of different evaluation sets")
        for name, columns in self.samples.items():
            if missing := [column for column in self.known[name] if column not in columns]:
                raise ValueError(f"samples.{name} lacks the column {missing[0]}")
            lengths = {len(cells) for cells in (*columns.values(), *self.slices.get(name, {}).values())}
            if len(lengths) != 1 or lengths == {0}:
                raise ValueError(
                    f"samples.{name} has columns of {', '.join(map(str, sorted(lengths)))} cells"
                )
        return self


def read_written(file: Path) -> Written:
    """Read and validate a baseline.json. Raises UsageError with the invalid key."""
    demand_file(file, limit=JSON_LIMIT, fix=FIX)
    try:
        values = strict_json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is not a baseline ({error})", fix=FIX) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        version = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UsageError(
            f"{file} is not a baseline of this version (format {version!r}, expected {FORMAT})", fix=FIX
        )
    try:
        return Written.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        problem = f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{file} is not as it was written: {problem}", fix=FIX) from None
