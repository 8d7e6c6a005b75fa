"""Labels: from values in the data to indices of the model's outputs, and to names. No torch.

The order of the outputs is the checkpoint's (`id2label` of its config.json), because its head was trained in
that order. Names of a recipe or of GLUE are used if the checkpoint only has transformers' LABEL_0, LABEL_1...
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qcompress.errors import UsageError
from qcompress.models.config_checks import is_named, label_names
from qcompress.schema.glue import GLUE
from qcompress.schema.recipe import ImageClassification, SequenceClassification, TokenClassification
from qcompress.tasks.text import printable

IGNORED = -100
"""Label of a token that losses and metrics skip; transformers' own."""

MISSING = -1
"""Value of an unpublished label in the hub's GLUE."""

SHOWN = 12
"""Number of labels named in one message."""


def named_outputs(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the outputs in a config.json; like transformers, LABEL_0... without names, and two outputs
    without a count.

    >>> named_outputs({"id2label": {"1": "good", "0": "bad"}}), named_outputs({"num_labels": 1})
    (('bad', 'good'), ('LABEL_0',))
    >>> named_outputs({})
    ('LABEL_0', 'LABEL_1')
    """
    count = config.get("num_labels")
    counted = count if type(count) is int and count > 0 else 2
    return label_names(config) or tuple(f"LABEL_{index}" for index in range(counted))


def settle(wanted: Sequence[str] | None, config: dict[str, Any]) -> list[str]:
    """Names of a model's outputs, in their order, for a task with these labels.

    Labels are compared without case: hub checkpoints write ENTAILMENT where GLUE writes entailment. A config
    without `id2label` has two outputs or no head; the family checks the head's shape.
    """
    known = named_outputs(config)
    if wanted is None:
        return list(known)
    if not config.get("id2label"):
        return list(wanted)
    if not is_named(known) and len(known) == len(wanted):
        return list(wanted)
    if sorted(map(str.casefold, known)) != sorted(map(str.casefold, wanted)):
        raise UsageError(
            f"the labels of the task ({', '.join(wanted)}) are not those of the checkpoint's config.json "
            f"({', '.join(known)})",
            fix="write the checkpoint's names under `task.labels`, or correct `id2label` in config.json",
        )
    return list(known)


class TwoReadingsError(UsageError):
    """A column of labels has different labels when read as names and as indices."""


@dataclass(frozen=True)
class Labels:
    """Labels of a model, and the rule for reading a column of labels.

    A cell counts by its spelling: the text `1` of a CSV file and the integer 1 of a JSON file are one label,
    and so is 1.0, which pandas writes if another cell is empty. A spelling that is a name of the model is
    that label. Whole numbers of a column that are not all names are indices. A column with different labels
    by names and by indices is refused unless the recipe states which it contains (`task.labels_are`).
    """

    names: tuple[str, ...] | None
    """Names of the outputs in their order; None if only their indices are known."""
    numbers: tuple[str, ...] | None = None
    """Names of the data's integers, if their order differs from the outputs'."""
    are: Literal["names", "indices"] | None = None
    """Content of the columns, if the recipe states it."""

    @property
    def are_named(self) -> bool:
        """True if the outputs have names other than LABEL_0, LABEL_1..."""
        return bool(self.names) and is_named(self.names)

    def read(self, cells: Sequence[Any], places: Sequence[str], *, named: bool = False) -> list[int]:
        """Output index of each cell of a column; `places`: source of each cell.

        `named`: the data source guarantees names (a folder's name, `datasets`). Raises UsageError for a cell
        that is not a label, and for a column with two readings.
        """
        first: dict[str, str] = {}
        words = []
        for cell, place in zip(cells, places, strict=True):
            word = self._word(cell)
            if word is None:
                raise UsageError(f"{place}: {_shown(cell)} is not a label", fix=self.fix())
            if isinstance(cell, float) and not _is_integer(word) and self._named(word) is None:
                self._refuse_number(word, place)
            first.setdefault(word, place)
            words.append(word)
        outputs = self._outputs(first, named)
        return [outputs[word] for word in words]

    def _word(self, cell: object) -> str | None:
        """Spelling of a cell; a whole number loses its `.0`, unless a label has that name."""
        word = spelling(cell)
        return word if word is None or self._named(word) is not None else without_point(word)

    def _refuse_number(self, word: str, place: str) -> None:
        raise UsageError(
            f"{place}: the number {word} is not a label",
            fix=f"write the label of that row, or remove the row; {self.fix()}",
        )

    @property
    def are_digits(self) -> bool:
        """True if a whole number is the name of another output than the one with that index."""
        return any(_is_integer(name) and int(name) != place for place, name in enumerate(self.names or ()))

    def _outputs(self, first: Mapping[str, str], named: bool) -> dict[str, int]:
        """Output index of each spelling; `first`: first place of each."""
        by_name = {word: output for word in first if (output := self._named(word)) is not None}
        by_index = {word: output for word in first if (output := self._indexed(word)) is not None}
        if self.are is not None:
            chosen = by_name if self.are == "names" else by_index
        elif len(by_name) < len(first):
            chosen = {word: output for word, output in by_name.items() if not _is_integer(word)} | by_index
            self._refuse_half_named(first, by_name, by_index)
        else:
            chosen = by_name
            differ = [word for word in first if by_index.get(word) not in (None, by_name[word])]
            if differ and len(by_index) == len(first) and not named:
                self._refuse_two_readings(differ[0], first[differ[0]], by_name, by_index)
        self._refuse_unknown([word for word in first if word not in chosen], first)
        return chosen

    def _named(self, word: str) -> int | None:
        """Output index of a name; case counts only between names that differ in nothing else."""
        names = self.names or ()
        if word in names:
            return names.index(word)
        alike = [output for output, name in enumerate(names) if name.casefold() == word.casefold()]
        return alike[0] if len(alike) == 1 else None

    def _indexed(self, word: str) -> int | None:
        """Output index of an index in the data; None if it is out of range."""
        if not _is_integer(word):
            return None
        number = int(word)
        if self.numbers is not None:
            return self._named(self.numbers[number]) if 0 <= number < len(self.numbers) else None
        return number if number >= 0 and (self.names is None or number < len(self.names)) else None

    def _refuse_two_readings(
        self, word: str, place: str, by_name: Mapping[str, int], by_index: Mapping[str, int]
    ) -> None:
        names = self.names or ()
        raise TwoReadingsError(
            f"{place}: the label {word} can be read in two ways: as the name it is output {by_name[word]}, "
            f"as an index it is output {by_index[word]}, which is called {names[by_index[word]]!r}",
            fix="write `labels_are: names` or `labels_are: indices` under `task`",
        )

    def _refuse_half_named(
        self, first: Mapping[str, str], by_name: Mapping[str, int], by_index: Mapping[str, int]
    ) -> None:
        """Refuse whole numbers of which some are names and not all are indices: neither reading
        is possible.
        """
        whole = [word for word in first if _is_integer(word)]
        names = [word for word in whole if word in by_name]
        others = [word for word in whole if word not in by_name]
        wrong = [word for word in first if word not in by_index]
        if names and others and wrong:
            raise UsageError(
                f"{first[others[0]]}: the label {others[0]} is not a name of the model, and {names[0]} is; "
                f"as indices the labels fail at {wrong[0]}",
                fix=self.fix(),
            )

    def _refuse_unknown(self, unknown: Sequence[str], first: Mapping[str, str]) -> None:
        words = sorted(word for word in unknown if not _is_integer(word) or self.are == "names")
        if words:
            listed = sorted(word for word in first if not _is_integer(word) or self.are == "names")
            shown = printable(", ".join(listed[:SHOWN])) + (" ..." if len(listed) > SHOWN else "")
            names = ", ".join(self.names) if self.names else "labels without names"
            raise UsageError(
                f"{first[words[0]]}: the label {words[0]!r} is not one of the model's; the data have the "
                f"labels {shown}, and the model has {names}",
                fix=self.fix(),
            )
        if unknown:
            what = "the index" if self.are == "indices" or not self.are_named else "the name or the index"
            raise UsageError(f"{first[unknown[0]]}: {unknown[0]} is not {what} of a label", fix=self.fix())

    def fix(self) -> str:
        """Fix for a cell that is not a label of the model."""
        if not self.are_named:
            count = f", {len(self.names)} of them," if self.names else ""
            return f"name the labels{count} in the model's order under `task.labels`"
        known = f"{', '.join(self.names[:SHOWN])}{' ...' if len(self.names) > SHOWN else ''}"
        return f"labels are {known}, or an index from 0 to {len(self.names) - 1}"


def spelling(cell: object) -> str | None:
    """Spelling of a label cell in a text file; None if it cannot be a label.

    >>> spelling(" 1 "), spelling(1), spelling(True), spelling(None), spelling([1])
    ('1', '1', 'true', None, None)
    """
    if isinstance(cell, bool):
        return str(cell).lower()
    return str(cell).strip() or None if isinstance(cell, (str, int, float)) else None


def without_point(word: str) -> str:
    """Remove decimal zeros of a whole number; other words are returned unchanged.

    >>> without_point("1.0"), without_point("-100.00"), without_point("1.5"), without_point("v1.0")
    ('1', '-100', '1.5', 'v1.0')
    """
    return re.sub(r"(-?\d+)\.0+", r"\1", word) if re.fullmatch(r"-?\d+\.0+", word) else word


def labels_of(task: SequenceClassification | TokenClassification | ImageClassification) -> Labels:
    """Labels of a task; with a model, `settle` has put its order into `task.labels`."""
    glue = GLUE[task.glue].labels if isinstance(task, SequenceClassification) and task.glue else None
    names = task.labels or glue
    numbers = glue if glue and names and list(names) != list(glue) else None
    return Labels(tuple(names) if names else None, numbers, task.labels_are)


def dataset_names(names: Sequence[str] | None, labels: Labels, cells: list[Any]) -> list[Any]:
    """Replace integers by the dataset's names (`names`), if the model's outputs have names too.

    Without names of the outputs an integer is an index. A cell may be a list.
    """
    if names is None or not labels.are_named:
        return cells

    def name(cell: Any) -> Any:
        if isinstance(cell, list):
            return [name(item) for item in cell]
        return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else cell

    return [name(cell) for cell in cells]


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"\s*-?\d+\s*", text) is not None


def _shown(value: object) -> str:
    empty = value is None or (isinstance(value, str) and not value.strip())
    return "an empty field" if empty else f"{value!r:.60}"
