"""From a label as the data spell it to the model's output, and back to a name. No torch.

The order of the outputs is the checkpoint's (`id2label` of its config.json), because its head was trained in
it. Names of a recipe or of GLUE fill in where the checkpoint has none but transformers' LABEL_0, LABEL_1...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompress.errors import UsageError
from qcompress.glue import GLUE
from qcompress.schema import ImageClassification, SequenceClassification, TokenClassification

PLACEHOLDER = re.compile(r"LABEL_\d+")
"""What transformers calls an output that nobody named."""

IGNORED = -100
"""The label of a token that no loss and no metric counts; transformers' own."""

MISSING = -1
"""What the hub's GLUE writes for a label that is not published."""


def named_outputs(config: dict[str, Any]) -> tuple[str, ...]:
    """The names in a config.json; transformers writes none for two outputs without names.

    >>> named_outputs({"id2label": {"1": "good", "0": "bad"}}), named_outputs({})
    (('bad', 'good'), ('LABEL_0', 'LABEL_1'))
    """
    names = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    return tuple(names[number] for number in sorted(names)) or ("LABEL_0", "LABEL_1")


def settle(wanted: Sequence[str] | None, config: dict[str, Any]) -> list[str]:
    """The names of a model's outputs, in their order, for a task that wants these labels.

    Case does not tell labels apart: hub checkpoints write ENTAILMENT where GLUE writes entailment. A config
    without `id2label` is of two outputs or of no head at all; the head's shape is the family's to check.
    """
    known = named_outputs(config)
    if wanted is None:
        return list(known)
    if not config.get("id2label"):
        return list(wanted)
    if all(PLACEHOLDER.fullmatch(name) for name in known) and len(known) == len(wanted):
        return list(wanted)
    if sorted(map(str.casefold, known)) != sorted(map(str.casefold, wanted)):
        raise UsageError(
            f"the labels of the task ({', '.join(wanted)}) are not those of the checkpoint's config.json "
            f"({', '.join(known)})",
            fix="write the checkpoint's names under `task.labels`, or mend `id2label` in config.json",
        )
    return list(known)


@dataclass(frozen=True)
class Labels:
    """What labels may look like. `names`: of the outputs, None where only their indices are known.

    `numbers`: names that the integers of the data stand for, where that is another order than the outputs'.
    """

    names: tuple[str, ...] | None
    numbers: tuple[str, ...] | None = None

    @property
    def are_named(self) -> bool:
        """Whether somebody named the outputs."""
        return bool(self.names) and not all(PLACEHOLDER.fullmatch(name) for name in self.names)

    def index(self, value: object, where: str) -> int:
        """The output that a label means: a name, or an integer (also as text) that is an index."""
        known = {name: place for place, name in enumerate(self.names or ())}
        known = {name.casefold(): place for name, place in known.items()} | known
        if isinstance(value, str) and (name := value.strip()) and not _is_integer(name):
            return self._found(known, name, name.casefold(), where=where)
        if isinstance(value, str) and value.strip() in known:  # labels that are called 1, 2, 3
            return known[value.strip()]
        if value is None or isinstance(value, (bool, float)) or not _is_integer(str(value)):
            raise UsageError(f"{where}: {_shown(value)} is no label", fix=self.fix())
        number = int(value)
        if self.numbers is not None and 0 <= number < len(self.numbers):
            return self._found(known, self.numbers[number], self.numbers[number].casefold(), where=where)
        if number < 0 or (self.names is not None and number >= len(self.names)):
            raise UsageError(f"{where}: {number} is no index of a label", fix=self.fix())
        return number

    def _found(self, known: dict[str, int], *spellings: str, where: str) -> int:
        for name in spellings:
            if name in known:
                return known[name]
        raise UsageError(
            f"{where}: the label {spellings[0]!r} is none of the model's: "
            f"{', '.join(self.names) if self.names else 'its labels have no names'}",
            fix=self.fix(),
        )

    def fix(self) -> str:
        """What to do about a label that is none of the model's."""
        if not self.are_named:
            return "name the labels in the model's order under `task.labels`"
        return f"labels are {', '.join(self.names[:12])}, or an index from 0 to {len(self.names) - 1}"


def labels_of(task: SequenceClassification | TokenClassification | ImageClassification) -> Labels:
    """The labels of a task; `settle` has put the model's order into `task.labels` where a model is known."""
    glue = GLUE[task.glue].labels if isinstance(task, SequenceClassification) and task.glue else None
    names = task.labels or glue
    numbers = glue if glue and names and list(names) != list(glue) else None
    return Labels(tuple(names) if names else None, numbers)


def both_sets(found: Sequence[str], labels: Labels, where: str) -> None:
    """Refuse data whose label names are not the model's, all of them at once.

    Names of the data that are a part of the model's are fine: a small table need not have every label.
    """
    known = {name.casefold() for name in labels.names or ()}
    strange = [name for name in found if name.casefold() not in known and not _is_integer(name)]
    if strange:
        raise UsageError(
            f"{where} has the labels {', '.join(found[:12])}{' ...' if len(found) > 12 else ''}, and the "
            f"model has {', '.join(labels.names) if labels.names else 'labels without names'}",
            fix=labels.fix(),
        )


def dataset_names(names: Sequence[str] | None, labels: Labels, cells: list[Any]) -> list[Any]:
    """Integers as what the dataset itself calls them (`names`), where the model's outputs have names too.

    Where they have none, an integer is an index. A cell may be a list.
    """
    if names is None or not labels.are_named:
        return cells

    def name(cell: Any) -> Any:
        if isinstance(cell, list):
            return [name(one) for one in cell]
        return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else cell

    return [name(cell) for cell in cells]


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"\s*-?\d+\s*", text) is not None


def _shown(value: object) -> str:
    return "an empty field" if value is None or value == "" else repr(value)
