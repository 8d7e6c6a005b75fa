"""Splits of one data file into a part for training and calibration and a part for measurement. No torch.

Labels keep their shares, and rows with equal text stay in one part, so that no measured text was trained on.
The split depends on the file alone.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import defaultdict
from pathlib import Path

from qcompress.cli.init.data import TableData, TextData, label_of
from qcompress.tasks.table import Row

SHARE = 0.2
"""Share of the examples for measurement; up to `AT_MOST` if that gives fewer than `ENOUGH`."""
ENOUGH = 200
AT_MOST = 0.3

MOST = 2000
"""Largest number of examples for measurement: more would only cost time."""

TEXT_SHARE = 0.1


def split_table(table: TableData) -> tuple[list[Row], list[Row]]:
    """Rows for training and rows for measurement, each in the order of the file."""
    by_text: dict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(table.texts()):
        by_text[text].append(row)
    by_label: dict[str, list[list[int]]] = defaultdict(list)
    for rows in by_text.values():
        label = label_of(table.rows[rows[0]][1][table.label]) if table.kind == "single" else ""
        by_label[label].append(rows)
    count = len(table.rows)
    share = min(max(SHARE, min(ENOUGH / count, AT_MOST)), MOST / count)
    chosen: set[int] = set()
    shuffle = random.Random(0)
    for label in sorted(by_label):
        groups = by_label[label]
        shuffle.shuffle(groups)
        wanted = max(1, round(share * sum(map(len, groups))))
        for rows in groups[:-1]:  # one stays for training
            if wanted <= 0:
                break
            chosen.update(rows)
            wanted -= len(rows)
    rest = [row for place, row in enumerate(table.rows) if place not in chosen]
    return rest, [table.rows[place] for place in sorted(chosen)]


def split_text(data: TextData) -> tuple[str, str]:
    """Split a text into its beginning and its last tenth, at a line end."""
    cut = data.text.find("\n", int(len(data.text) * (1 - TEXT_SHARE))) + 1
    return (data.text[:cut], data.text[cut:]) if 0 < cut < len(data.text) else (data.text, "")


def split_files(data: Path, folder: Path) -> tuple[Path, Path]:
    """Paths of the two parts; a parquet table becomes JSON lines."""
    suffix = ".jsonl" if data.suffix == ".parquet" else data.suffix
    return folder / f"{data.stem}-train{suffix}", folder / f"{data.stem}-test{suffix}"


def table_text(header: tuple[str, ...], rows: list[Row], suffix: str) -> str:
    """Rows as text of the file type `suffix`, with a header line."""
    if suffix == ".jsonl":
        return "".join(json.dumps(cells, ensure_ascii=False) + "\n" for _, cells in rows)
    if suffix == ".tsv":  # quotes are literal in .tsv, and cells cannot contain a tab
        lines = [header, *([str(cells[name]) for name in header] for _, cells in rows)]
        return "".join("\t".join(line) + "\n" for line in lines)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells for _, cells in rows)
    return stream.getvalue()
