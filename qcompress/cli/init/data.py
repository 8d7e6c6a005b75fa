"""Reader of `init --data`: text, a table of labelled examples, or folders of images. No torch.

Columns are chosen by name, or else by content: labels repeat themselves, the text is the longest column. If
several columns fit, `init` asks the user; a script must name the column.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qcompress.cli.init.options import Ask, InitOptions, Mistakes
from qcompress.errors import QcompressError
from qcompress.recipe.messages import choose
from qcompress.schema.data import SUFFIXES
from qcompress.system.untrusted_file import demand_file
from qcompress.tasks.labels import IGNORED, without_point
from qcompress.tasks.table import Row, read_whole
from qcompress.tasks.text import UTF8

TEXT_NAMES = ("text", "sentence", "sentence1", "text1", "question1", "review", "content", "question",
              "message", "comment", "tweet", "utterance", "body", "premise", "query", "document")  # fmt: skip
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "target", "intent", "gold_label", "y",
               "rating", "score")  # fmt: skip
PAIR_NAMES = ("sentence2", "text2", "question2", "pair", "hypothesis")
"""Usual names of such columns, the likeliest first. A second text is found by its name only."""

MOST_LABELS = 200
"""Largest number of distinct values of a label column."""

TRAIN_FOLDERS, TEST_FOLDERS = ("train", "training"), ("test", "val", "valid", "validation", "eval")

Kind = Literal["single", "multi", "regression", "words"]


@dataclass(frozen=True)
class TableData:
    """Labelled examples. `kind`: one label of several, any number of labels, a number, or one
    label a word.
    """

    file: Path
    header: tuple[str, ...]
    rows: list[Row]
    text: str
    label: str
    kind: Kind
    labels: tuple[str, ...]
    """All labels of the data; empty for a regression."""
    counts: Counter[str]
    why: dict[str, str]
    pair: str | None = None
    """Column of the second text of a pair."""
    unread: tuple[str, ...] = ()
    """Columns with as much text that are not read."""
    headless: bool = False
    """The file has no line of column names; the names in `header` are generated."""

    def texts(self) -> list[str]:
        """Text of each row that the model reads, pairs joined."""
        columns = [self.text, *([self.pair] if self.pair else [])]
        return [" ".join(_cell_text(cells[name]) for name in columns) for _, cells in self.rows]

    def texts_apart(self) -> list[str]:
        """Texts of each row, those of a pair one after the other."""
        columns = [self.text, *([self.pair] if self.pair else [])]
        return [_cell_text(cells[name]) for _, cells in self.rows for name in columns]


@dataclass(frozen=True)
class TextData:
    """A text file."""

    file: Path
    text: str


@dataclass(frozen=True)
class ImageData:
    """Folders of images for training and calibration, and for measurement, with a subfolder for
    each label.
    """

    train: Path
    test: Path
    labels: tuple[str, ...]


Data = TableData | TextData | ImageData


def look_at_data(options: InitOptions, mistakes: Mistakes, ask: Ask | None) -> Data | None:
    """Read `--data`; None, with mistakes reported, if it cannot be used."""
    file = options.data
    if file.is_dir():
        return _images(file, mistakes)
    if not file.is_file():
        mistakes.add("--data", f"{file} does not exist", "name a text file, a table or a folder of images")
        return None
    if file.suffix == ".npz":
        fix = "name a folder with train/LABEL/ and test/LABEL/, or write `npz:` into a recipe"
        mistakes.add("--data", f"{file} is an archive, and init does not split archives", fix)
        return None
    if file.suffix not in SUFFIXES:
        if options.text_column or options.label_column or options.pair_column:
            mistakes.add("--data", f"{file.name} is read as plain text, which has no columns",
                         f"name a table ({', '.join(SUFFIXES)}), or drop the columns")  # fmt: skip
        return _text(file, mistakes)
    try:
        header, rows = read_whole(file)
    except QcompressError as error:
        mistakes.add("--data", error.message, error.fix or "correct the file")
        return None
    return _table(options, header, rows, mistakes, ask)


def _text(file: Path, mistakes: Mistakes) -> TextData | None:
    try:
        text = demand_file(file).read_bytes().decode(UTF8)
    except UnicodeDecodeError:
        fix = f"name a UTF-8 text, or a table ({', '.join(SUFFIXES)})"
        mistakes.add("--data", f"{file} is neither a table nor UTF-8 text", fix)
        return None
    if not text.strip():
        mistakes.add("--data", f"{file} is empty", "name a file with text")
        return None
    return TextData(file, text)


def _images(folder: Path, mistakes: Mistakes) -> ImageData | None:
    folders = [
        next((folder / name for name in names if (folder / name).is_dir()), None)
        for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    ]
    if None in folders:
        fix = "put images to calibrate on into train/LABEL/, others to measure on into test/LABEL/"
        mistakes.add("--data", f"{folder} lacks folders `train` and `test` of images", fix)
        return None
    train, test = folders
    labels = [sorted(inner.name for inner in split.iterdir() if inner.is_dir()) for split in folders]
    if not labels[0] or set(labels[1]) - set(labels[0]):
        names = [", ".join(split) or "none" for split in labels]
        message = f"{test} has the labels {names[1]}, and {train} has {names[0]}"
        mistakes.add("--data", message, "put each image into the folder of its label")
        return None
    return ImageData(train, test, tuple(labels[0]))


# Tables -------------------------------------------------------------------------------------------


def _table(
    options: InitOptions, header: list[str], rows: list[Row], mistakes: Mistakes, ask: Ask | None
) -> TableData | None:
    headless = _is_headless(options, header, rows)
    if headless:
        names = [f"column{place}" for place in range(1, len(header) + 1)]
        first = (f"{options.data.name}:1", dict(zip(names, header, strict=True)))
        renamed = dict(zip(header, names, strict=True))
        rows = [first, *((place, {renamed[name]: cell for name, cell in cells.items()})
                         for place, cells in rows)]  # fmt: skip
        header = names
    if len(rows) < 20:
        mistakes.add("--data", f"{options.data} has {len(rows)} rows", "name a table of 20 rows or more")
        return None
    broken = next((place for place, cells in rows if len(cells) < len(header)), None)
    if broken and options.data.suffix != ".jsonl":
        mistakes.add("--data", f"{broken} has fewer cells than the file has columns", "correct or remove it")
        return None
    chosen = _columns(options, header, rows, mistakes, ask)
    if chosen is None:
        return None
    text, label, why = chosen
    empty = [place for place, cells in rows if _is_empty(cells.get(text)) or _is_empty(cells.get(label))]
    if empty:
        more = f", and {len(empty) - 1} more rows" if len(empty) > 1 else ""
        mistakes.add("--data", f"{empty[0]}{more}: the column {text} or {label} is empty",
                     "correct or remove such rows")  # fmt: skip
        return None
    cells = [row[label] for _, row in rows]
    kind = _kind(cells, [row[text] for _, row in rows])
    labels, counts = labels_in(cells, kind)
    if kind in ("single", "words") and len(labels) < 2:
        mistakes.add("--label-column", f"{label} is {labels[0]} everywhere", "name a column of two labels")
        return None
    pairs = [name for name in header if name.casefold() in PAIR_NAMES and name not in (text, label)]
    pair = options.pair_column or (pairs[0] if pairs and kind != "words" else None)
    unread = _unread(text, [name for name in header if name not in (text, label, pair)], rows)
    return TableData(
        options.data, tuple(header), rows, text, label, kind, labels, counts, why, pair, unread, headless
    )


def _is_headless(options: InitOptions, header: list[str], rows: list[Row]) -> bool:
    """True if the first line is an example: one of its cells repeats in its column."""
    if options.data.suffix not in (".csv", ".tsv") or len(set(header)) < len(header):
        return False
    counts = {name: Counter(cells.get(name) for _, cells in rows) for name in header}
    return any(name and counts[name][name] >= 2 for name in header)


def _columns(
    options: InitOptions, header: list[str], rows: list[Row], mistakes: Mistakes, ask: Ask | None
) -> tuple[str, str, dict[str, str]] | None:
    """Columns of text and label, with reasons."""
    given = (("--text-column", options.text_column), ("--label-column", options.label_column),
             ("--pair-column", options.pair_column))  # fmt: skip
    unknown = [(option, name) for option, name in given if name is not None and name not in header]
    for option, name in unknown:
        message = f"{options.data.name} has the columns {', '.join(header)}, and not {name!r}"
        likely = likely_labels(header, rows, options.text_column) if option == "--label-column" else []
        fix = choose(name, likely or header)
        fix = f"write {option} {likely[0]}" if likely and fix.startswith("write") else fix
        mistakes.add(option, message, fix)
    if unknown:
        return None
    labels, why_label = _label_columns(options, header, rows)
    label = _single_column("label", "--label-column", labels, header, mistakes, ask)
    others = [name for name in header if name not in (label, options.pair_column)]
    texts, why_text = _text_columns(options, others, rows)
    text = _single_column("text", "--text-column", texts, header, mistakes, ask) if label else None
    if label is None or text is None:
        return None
    if len({text, label, options.pair_column}) < 3:
        mistakes.add("--text-column", f"{text} is the label or the second text, too", "name other columns")
        return None
    return text, label, {"text_column": why_text, "label_column": why_label}


def _label_columns(options: InitOptions, header: list[str], rows: list[Row]) -> tuple[list[str], str]:
    if options.label_column is not None:
        return [options.label_column], "as asked"
    named = [name for name in header if name.casefold() in LABEL_NAMES or name == "tags"]
    if len(named) == 1:
        return named, "by its name"
    tried = named or [name for name in header if name != options.text_column]
    return _repeated(tried, rows), "the only column whose values repeat themselves"


def _repeated(names: list[str], rows: list[Row]) -> list[str]:
    """Columns whose values repeat as labels do, those with the fewest values first."""
    different = {name: _different([cells.get(name) for _, cells in rows]) for name in names}
    fit = [name for name in names if 2 <= different[name] <= min(MOST_LABELS, len(rows) // 4)]
    return sorted(fit, key=different.__getitem__)


def likely_labels(header: Sequence[str], rows: list[Row], other: str | None) -> list[str]:
    """Columns that could be the label, those with a usual name first. `other`: a column that is not the
    label.
    """
    fit = _repeated([name for name in header if name != other], rows)
    return sorted(fit, key=lambda name: name.casefold() not in LABEL_NAMES)


def _different(cells: list[Any]) -> int:
    """Number of distinct values; 0 for a column with empty cells, which cannot be a label."""
    if any(map(_is_empty, cells)):
        return 0
    return len({json.dumps(cell, sort_keys=True) for cell in cells})


def _text_columns(options: InitOptions, header: list[str], rows: list[Row]) -> tuple[list[str], str]:
    if options.text_column is not None:
        return [options.text_column], "as asked"
    for name in (*TEXT_NAMES, "tokens"):
        if named := [column for column in header if column.casefold() == name]:
            return named, "by its name"
    lengths = {name: sum(len(str(cells.get(name, ""))) for _, cells in rows) for name in header}
    worded = [name for name in header if not all(_is_number(cells.get(name)) for _, cells in rows)]
    longest = max(worded, key=lengths.__getitem__, default=None)
    return ([longest] if longest else []), "the column with the longest text"


def _unread(text: str, others: list[str], rows: list[Row]) -> tuple[str, ...]:
    """Columns that could be the second text of a pair."""
    lengths = {
        name: sum(len(_cell_text(cells.get(name, ""))) for _, cells in rows) for name in (text, *others)
    }
    return tuple(name for name in others if lengths[name] >= lengths[text] / 2)


def _single_column(
    role: str, option: str, fit: list[str], header: list[str], mistakes: Mistakes, ask: Ask | None
) -> str | None:
    if len(fit) == 1:
        return fit[0]
    if ask is not None and header:
        return ask(f"Which column holds the {role}?", fit or header)
    reason = f"{', '.join(fit)} could all be" if fit else f"none of {', '.join(header)} looks like"
    mistakes.add(option, f"{reason} the {role}", f"say which with {option} {(fit or header or ['NAME'])[0]}")
    return None


def _kind(cells: list[Any], texts: list[Any]) -> Kind:
    if all(isinstance(cell, list) for cell in cells):
        words = all(
            isinstance(text, list) and len(text) == len(cell) for text, cell in zip(texts, cells, strict=True)
        )
        return "words" if words else "multi"
    if all(_is_number(cell) for cell in cells) and not all(is_whole(cell) for cell in cells):
        return "regression"
    return "multi" if any(isinstance(cell, str) and "|" in cell for cell in cells) else "single"


def labels_in(cells: Sequence[Any], kind: Kind) -> tuple[tuple[str, ...], Counter[str]]:
    """Labels of a column in order, and the count of each; empty for a regression."""
    if kind == "regression":
        return (), Counter()
    counts = Counter(without_point(label) for cell in cells for label in _labels_in(cell, kind))
    counts.pop(str(IGNORED), None)
    return tuple(sorted(counts, key=_in_order)), counts


def _labels_in(cell: Any, kind: Kind) -> list[str]:
    if isinstance(cell, list):
        return [str(label) for label in cell]
    return (
        [label_text.strip() for label_text in str(cell).split("|")]
        if kind == "multi"
        else [str(cell).strip()]
    )


def _cell_text(cell: Any) -> str:
    return " ".join(map(str, cell)) if isinstance(cell, list) else str(cell)


def _is_empty(cell: object) -> bool:
    """True for an empty cell; pandas writes NaN for one."""
    return cell in (None, "") or cell != cell


def label_of(cell: Any) -> str:
    """Normalized label of a cell."""
    return without_point(str(cell).strip())


def _is_number(cell: object) -> bool:
    return re.fullmatch(r"\s*-?\d+(\.\d+)?([eE][-+]?\d+)?\s*", str(cell)) is not None


def is_whole(cell: object) -> bool:
    return re.fullmatch(r"\s*-?\d+\s*", str(cell)) is not None


def _in_order(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if is_whole(label) else (1, 0, label)
