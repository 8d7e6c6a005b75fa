"""Slice columns of images and of arrays: arrays of an archive, or columns of a dataset. Torch-free.

Folders of images have labels but no columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompress.errors import UsageError
from qcompress.schema.data import Columns
from qcompress.schema.recipe import TextData
from qcompress.tasks.columns import missing_column
from qcompress.tasks.images import array_header, opened_archive, read_array
from qcompress.tasks.table import Slices, named_cells
from qcompress.tasks.text import open_dataset


def image_slices(data: TextData, base: Path) -> Slices:
    """Values of the recipe's `slices` for the images that `read_pictures` returns."""
    if data.npz is None:
        return _dataset(data, base)
    return archive_slices(data, base, (data.columns or Columns()).image or "images")


def archive_slices(data: TextData, base: Path, counted: str | None = None) -> Slices:
    """Values of the recipe's `slices` for the rows of archives. `counted`: the array with one row for each;
    None: any.
    """
    archives = [_archive(base / name, data, counted) for name in data.npz or ()]
    columns = {
        name: [cell for archive in archives for cell in archive.columns[name]] for name in data.slices or ()
    }
    return Slices(columns, [place for archive in archives for place in archive.places])


def _archive(file: Path, data: TextData, counted: str | None) -> Slices:
    columns: dict[str, list[Any]] = {}
    what = "rows" if counted is None else "images"
    with opened_archive(file) as archive:
        wanted = data.slices or []
        counted = counted or archive.files[0]
        for name in (counted, *wanted):
            if name not in archive.files:
                raise missing_column(file.name, archive.files, name, "slices", "arrays")
        count = array_header(archive, counted)[0][0]
        for name in wanted:
            array = read_array(archive, name)
            if array.shape != (count,):
                raise UsageError(
                    f"{file.name}: {count} {what}, and {name} is of shape {list(array.shape)}",
                    fix="write one value for each image",
                )
            columns[name] = array.tolist()
    return Slices(columns, [f"{file.name}, row {row + 1}" for row in range(count)])


def _dataset(data: TextData, base: Path) -> Slices:
    rows = open_dataset(data, base)
    names = data.slices or []
    for name in names:
        if name not in rows.column_names:
            raise missing_column(f"dataset {data.dataset}", rows.column_names, name, "slices")
    cells = rows.select_columns(names)[:]
    columns = {name: named_cells(rows.features[name], cells[name]) for name in names}
    return Slices(columns, [f"dataset {data.dataset}, row {row + 1}" for row in range(len(rows))])
