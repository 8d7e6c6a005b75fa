"""Tables of examples: .tsv, .csv, .jsonl and .parquet files, and rows of `datasets`. Torch-free.

Only the columns that a task needs are kept. The source of every cell is kept for error messages.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from qcompress.errors import UsageError
from qcompress.schema.recipe import TextData
from qcompress.system.untrusted_file import demand_file, unpacked_limit
from qcompress.tasks.columns import ColumnError, columns_in, missing_column
from qcompress.tasks.text import is_text, open_dataset, open_text, printable

CELL = 2**24
"""Largest number of characters of a cell. Python's own limit is 131,072."""

LINE = 2**25
"""Largest number of characters of a row in one line."""

MOST_COLUMNS = 20_000

BATCH = 256
"""Rows of a parquet file that are unpacked at once."""

ROW_BYTES, RATIO, LEAST_MIB = 64, 20, 256
"""Bytes of a cell besides its content (`ROW_BYTES`), and the largest unpacked size of a parquet file: `RATIO`
times its own size, or `LEAST_MIB` MiB.
"""

Row = tuple[str, dict[str, Any]]
"""Source of a row (`train.tsv:17`), and its cells by column name."""


@dataclass(frozen=True)
class Wanted:
    """Columns that a task reads, by role, and the roles that may be missing.

    `slices` are the user's slice columns, whose cells may be missing. `header`: column names of files without
    a header line. `broken`: share of rows that may lack a column and are skipped, as the hub's GLUE does with
    the few broken lines of QQP; more are refused.
    """

    columns: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    header: tuple[str, ...] | None = None
    broken: float = 0.0
    slices: tuple[str, ...] = ()
    most: int | None = None
    """Number of rows to read of each file; None: all."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all columns to read."""
        return frozenset((*self.columns.values(), *self.slices))


@dataclass(frozen=True)
class Table:
    """Columns by role, all of one length, and the source of each row."""

    columns: dict[str, list[Any]]
    places: list[str]
    names: tuple[str, ...] | None = None
    """Names that a dataset gives to its integer labels."""
    slices: dict[str, list[Any]] = field(default_factory=dict)
    """Cells of `Wanted.slices` by column name, None if missing."""

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Slices:
    """Cells of slice columns by column name, None if missing; `places`: source of each row."""

    columns: dict[str, list[Any]]
    places: list[str]


def read_table(data: TextData, base: Path, wanted: Wanted) -> Table:
    """Read the table of a recipe's section. A role that may be missing must be missing in all files or in
    none.
    """
    if data.table is not None:
        tables = [_read_file(base / name, wanted) for name in data.table]
    else:
        tables = [_read_dataset(data, base, wanted)]
    roles = [set(table_of_file.columns) for table_of_file in tables]
    if any(other_roles != roles[0] for other_roles in roles):
        names = ", ".join(
            sorted(wanted.columns[role] for role in set.union(*roles) - set.intersection(*roles))
        )
        raise UsageError(f"only some of {', '.join(data.table or ())} have the column {names}",
                         fix="give all tables of one list the same columns")  # fmt: skip
    columns = {
        role: [cell for table_of_file in tables for cell in table_of_file.columns[role]]
        for role in tables[0].columns
    }
    places = [place for table_of_file in tables for place in table_of_file.places]
    slices = {
        name: [cell for table_of_file in tables for cell in table_of_file.slices[name]]
        for name in wanted.slices
    }
    table = Table(columns, places, tables[0].names, slices)
    if not len(table):
        raise UsageError(
            f"{', '.join(data.table or [str(data.dataset)])} has no row", fix="name a larger table"
        )
    return table


def table_slices(data: TextData, base: Path, wanted: Wanted) -> Slices:
    """Slice columns of the rows that `read_table` returns for these columns."""
    table = read_table(data, base, replace(wanted, slices=tuple(data.slices or ())))
    return Slices(table.slices, table.places)


def _read_file(file: Path, wanted: Wanted) -> Table:
    readers = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    return _collect(file.name, *readers[file.suffix](file, wanted), wanted)


def read_whole(file: Path) -> tuple[list[str], list[Row]]:
    """Read all columns and rows of a file. A .csv or .tsv must begin with its column names."""
    reader = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[file.suffix]
    header = list(reader(file, Wanted({}))[0])
    _refuse_other_separator(file.name, header)
    header, rows = reader(file, Wanted({name: name for name in header}))
    return list(header), list(rows)


def _collect(name: str, header: Sequence[str], rows: Iterator[Row], wanted: Wanted) -> Table:
    """Collect the wanted columns of rows; `header`: all columns of the file."""
    _bound_columns(name, len(header))
    roles = columns_in(name, header, wanted.columns, wanted.optional)
    for column in wanted.slices:
        if column not in header:
            raise missing_column(name, header, column, "slices")
    columns: dict[str, list[Any]] = {role: [] for role in roles}
    slices: dict[str, list[Any]] = {column: [] for column in wanted.slices}
    places, broken = [], []
    for place, cells in islice(rows, wanted.most):
        if missing := [column for column in roles.values() if column not in cells]:
            broken.append(f"{place}: the column {missing[0]!r} is missing")
            continue
        for role, column in roles.items():
            columns[role].append(cells[column])
        for column, slice_cells in slices.items():
            slice_cells.append(cells.get(column))
        places.append(place)
    if len(broken) > wanted.broken * (len(places) + len(broken)):
        also = f", and of {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UsageError(f"{broken[0]}{also}", fix="correct or remove such rows")
    return Table(columns, places, slices=slices)


def _bound_columns(name: str, count: int) -> None:
    if count > MOST_COLUMNS:
        raise UsageError(
            f"{name} has {count:,} columns, and at most {MOST_COLUMNS:,} are read",
            fix="write a table of the columns that are needed",
        )


def _refuse_other_separator(name: str, header: Sequence[str]) -> None:
    """Refuse a file of one column whose header has another separator."""
    wanted, others = ("a tab", ";,|") if name.endswith(".tsv") else ("a comma", ";\t|")
    if len(header) != 1 or not name.endswith((".csv", ".tsv")):
        return
    found_separator = max(others, key=header[0].count)
    if found_separator in header[0]:
        separator = {"\t": "tabs", ",": "commas"}.get(found_separator, f"`{found_separator}`")
        rename = {"\t": ", or rename it to .tsv", ",": ", or rename it to .csv"}.get(found_separator, "")
        raise UsageError(
            f"{name} has one column, {printable(header[0])!r}: its cells are separated by {separator}, and "
            f"those of a {name[-4:]} file by {wanted}",
            fix=f"write it again with {wanted} between the cells{rename}",
        )


def _tsv(file: Path, wanted: Wanted) -> tuple[list[str], Iterator[Row]]:
    """Tab-separated values as IANA registered them: without quotes, so that no cell can hold a tab."""
    return _separated(file, wanted, delimiter="\t", quoting=csv.QUOTE_NONE)


def _csv(file: Path, wanted: Wanted) -> tuple[list[str], Iterator[Row]]:
    """Comma-separated values with RFC 4180's quotes."""
    return _separated(file, wanted, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _separated(
    file: Path, wanted: Wanted, *, delimiter: str, quoting: Any
) -> tuple[list[str], Iterator[Row]]:
    lines = _parsed(file, delimiter, quoting)
    header = list(wanted.header) if wanted.header is not None else next(lines, ("", []))[1]
    if wanted.header is None and wanted.columns and not set(header) & wanted.names:
        _refuse_other_separator(file.name, header)
    twice = sorted({name for name in header if name in wanted.names and header.count(name) > 1})
    if twice:
        raise UsageError(f"{file.name} has the column {twice[0]!r} more than once", fix="rename one of them")

    def rows() -> Iterator[Row]:
        for place, cells in lines:
            if len(cells) > len(header) and not wanted.broken:
                raise UsageError(
                    f"{place}: {len(cells)} cells, and the header names {len(header)} columns",
                    fix="quote a cell that holds the separator, or remove the row",
                )
            yield place, dict(zip(header, cells, strict=False))

    return header, rows()


def _parsed(file: Path, delimiter: str, quoting: Any) -> Iterator[tuple[str, list[str]]]:
    """Rows of cells with their sources; empty lines are skipped, a byte-order mark is dropped."""
    reader = csv.reader(open_text(file, LINE), delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        limit = csv.field_size_limit(CELL)  # of the whole process: put back at once
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(
                f"{file.name}:{reader.line_num}: {error}", fix="correct or remove that row"
            ) from None
        finally:
            csv.field_size_limit(limit)
        if cells:
            yield f"{file.name}:{reader.line_num}", cells


def _jsonl(file: Path, wanted: Wanted) -> tuple[list[str], Iterator[Row]]:
    """One JSON object a line."""
    rows: list[Row] = []
    header: dict[str, None] = {}
    for number, line in enumerate(open_text(file, LINE), 1):
        if not line.strip():
            continue
        if wanted.most is not None and len(rows) >= wanted.most:
            break
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{file.name}:{number} is not JSON ({error})", fix="write one object a line"
            ) from None
        if not isinstance(cells, dict):
            raise UsageError(f"{file.name}:{number} is not a JSON object", fix="write one object a line")
        header |= dict.fromkeys(cells)
        _bound_columns(file.name, len(header))
        rows.append((f"{file.name}:{number}", cells))
    return list(header), iter(rows)


def _parquet(file: Path, wanted: Wanted) -> tuple[list[str], Iterator[Row]]:
    """Apache Parquet, through pyarrow, as `datasets` reads it."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(demand_file(file)) as opened:
            header = opened.schema_arrow.names
            _bound_columns(file.name, len(header))
            names = [name for name in header if name in wanted.names]
            cells = _columns_of(opened, names, wanted.most, file)
    except (OSError, ArrowException) as error:
        raise UsageError(f"{file.name} cannot be read as parquet: {error}", fix="write it again") from None
    return header, _by_row(file.name, cells)


def _columns_of(opened: Any, names: list[str], most: int | None, file: Path) -> dict[str, list[Any]]:
    """Columns of a parquet file; `most`: their first rows. Equal cells are stored once and unpacked often, so
    the unpacked bytes are counted.
    """
    cells_by_name: dict[str, list[Any]] = {name: [] for name in names}
    left = unpacked_limit(file, RATIO, LEAST_MIB)
    if not names:
        return {}
    for batch in opened.iter_batches(batch_size=BATCH, columns=names):
        if most is not None:
            batch = batch.slice(0, most - len(cells_by_name[names[0]]))
        left -= sum(map(_cell_bytes, batch.columns)) + ROW_BYTES * batch.num_rows * len(names)
        if left < 0:
            raise UsageError(
                f"{file.name} has {os.stat(file).st_size:,} bytes and unpacks to more than "
                f"{unpacked_limit(file, RATIO, LEAST_MIB):,}",
                fix="do not trust this file; write it again",
            )
        for name, cells in batch.to_pydict().items():
            cells_by_name[name] += cells
        if most is not None and len(cells_by_name[names[0]]) >= most:
            break
    return cells_by_name


def _cell_bytes(column: Any) -> int:
    """Lower bound of the bytes of a column's cells when each is a value of its own."""
    if not hasattr(column, "dictionary"):
        return column.nbytes
    return len(column) * column.dictionary.nbytes // max(len(column.dictionary), 1)


def _read_dataset(data: TextData, base: Path, wanted: Wanted) -> Table:
    rows_of_dataset = open_dataset(data, base)
    if wanted.most is not None:
        rows_of_dataset = rows_of_dataset.select(range(min(wanted.most, len(rows_of_dataset))))
    columns = [name for name in rows_of_dataset.column_names if name in wanted.names]
    rows = _by_row(str(data.dataset), {name: list(rows_of_dataset[name]) for name in columns})
    table = _collect(f"dataset {data.dataset}", rows_of_dataset.column_names, rows, wanted)
    label = next(
        (
            rows_of_dataset.features[wanted.columns[role]]
            for role in ("label", "tags")
            if role in table.columns
        ),
        None,
    )
    names = getattr(getattr(label, "feature", label), "names", None)
    slices = {
        name: named_cells(rows_of_dataset.features[name], cells) for name, cells in table.slices.items()
    }
    return replace(table, names=tuple(names) if names else None, slices=slices)


def named_cells(feature: Any, cells: Sequence[Any]) -> list[Any]:
    """Replace integers by the names of a dataset's feature, if it has names; -1 is a missing value."""
    names = getattr(feature, "names", None)
    if not names:
        return list(cells)
    return [names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else None for cell in cells]


def demand_text(cell: object, column: str, place: str, role: str) -> None:
    """Raise ColumnError for a cell that is not text, or has half a character."""
    if is_text(cell):
        return
    if isinstance(cell, str):
        what = "holds half a character, a surrogate without its other half"
        fix = "write the character whole: JSON spells one beyond U+FFFF as two escapes"
    else:
        what, fix = f"is not text but {cell!r:.60}", "correct or remove that row"
    raise ColumnError(f"{place}: the column {column!r} {what}", fix=fix, role=role)


def _by_row(name: str, cells: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    for number, row in enumerate(zip(*cells.values(), strict=True), 1):
        yield f"{name}, row {number}", dict(zip(cells, row, strict=True))
