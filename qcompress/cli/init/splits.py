"""One file of data as two: what is trained and calibrated on, and what is measured on. No torch.

Labels keep their shares, and rows with the same text stay on one side, so that nothing that is measured was
trained on. The same file gives the same two, whoever splits it.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import defaultdict
from pathlib import Path

from qcompress.cli.init.data import TableFound, TextFound, label_of
from qcompress.tasks.table import Row

SHARE = 0.2
"""Of the examples that are measured on; of less than `ENOUGH` up to `AT_MOST`."""
ENOUGH = 200
AT_MOST = 0.3

MOST = 2000
"""Examples that are measured on: more would only cost time."""

TEXT_SHARE = 0.1


def split_table(found: TableFound) -> tuple[list[Row], list[Row]]:
    """Rows for training, rows for measuring, each in the order of the file."""
    same: dict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(found.texts()):
        same[text].append(row)
    by_label: dict[str, list[list[int]]] = defaultdict(list)
    for rows in same.values():
        label = label_of(found.rows[rows[0]][1][found.label]) if found.kind == "single" else ""
        by_label[label].append(rows)
    count = len(found.rows)
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
    rest = [row for place, row in enumerate(found.rows) if place not in chosen]
    return rest, [found.rows[place] for place in sorted(chosen)]


def split_text(found: TextFound) -> tuple[str, str]:
    """The beginning, and the last tenth from the next line on."""
    cut = found.text.find("\n", int(len(found.text) * (1 - TEXT_SHARE))) + 1
    return (found.text[:cut], found.text[cut:]) if 0 < cut < len(found.text) else (found.text, "")


def split_files(data: Path, folder: Path) -> tuple[Path, Path]:
    """Where the two are written; a parquet table becomes lines of JSON."""
    suffix = ".jsonl" if data.suffix == ".parquet" else data.suffix
    return folder / f"{data.stem}-train{suffix}", folder / f"{data.stem}-test{suffix}"


def table_text(header: tuple[str, ...], rows: list[Row], suffix: str) -> str:
    """Rows as a file of the kind that `suffix` names, with a header line."""
    if suffix == ".jsonl":
        return "".join(json.dumps(cells, ensure_ascii=False) + "\n" for _, cells in rows)
    if suffix == ".tsv":  # quotes are literal there, and no cell holds a tab
        lines = [header, *([str(cells[name]) for name in header] for _, cells in rows)]
        return "".join("\t".join(line) + "\n" for line in lines)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells for _, cells in rows)
    return stream.getvalue()
