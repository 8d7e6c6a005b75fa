"""Checks of a checkpoint's config.json and head: family, sizes, labels, shapes; and the config.json of a
task's model. No torch.

Every family uses these, so that checkpoints are checked against recipes in one way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from qcompress.errors import ModelError
from qcompress.models.architecture import Head
from qcompress.models.config_values import check_values
from qcompress.schema.families import model_type_of

KINDS = {
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}
"""`problem_type` of a config.json -> `task.kind` of a recipe."""


PLACEHOLDER = re.compile(r"LABEL_\d+")
"""transformers' default name of an output."""


def is_named(outputs: Sequence[str]) -> bool:
    """True if an output has a name other than transformers' default."""
    return not all(PLACEHOLDER.fullmatch(name) for name in outputs)


class HeadError(ModelError):
    """A head that does not fit the recipe's task. `key`: the recipe's key to change."""

    def __init__(self, message: str, *, fix: str, key: tuple[str, ...]) -> None:
        super().__init__(message, fix=fix)
        self.key = key


def problem_of(config: dict[str, Any], outputs: int | None) -> str | None:
    """Problem type of a checkpoint's own head with this number of outputs; None if it could be single-label
    or multi-label, or without a head. A single output is a regression, as in transformers.
    """
    problem = config.get("problem_type")
    if problem is not None and problem not in KINDS:
        raise ModelError(
            f"config.json: problem_type is {problem!r}, and must be one of {', '.join(KINDS)}",
            fix="mend problem_type in config.json, or remove it",
        )
    return None if outputs is None else problem or ("regression" if outputs == 1 else None)


def check_problem(config: dict[str, Any], outputs: int | None, head: Head) -> None:
    """Raise HeadError if the checkpoint's head solves another kind of problem than the task."""
    own = problem_of(config, outputs)
    if head.problem is None or outputs is None:
        return
    if head.problem == "regression" and outputs > 1:
        message = f"a regression has one output, and the checkpoint's head has {outputs}"
        fix = "write `kind: single` or `kind: multi` under `task`, or start from a checkpoint without a head"
    elif own in (None, head.problem):
        return
    else:
        stated = f"problem_type {own}" if config.get("problem_type") else "1 output, which gives a number"
        message = f"is {KINDS[head.problem]}, and config.json of the checkpoint says {stated}"
        fix = f"write `kind: {KINDS[own]}` under `task`"
    if head.task == "image-classification":
        message = message.replace("is single", "gives one label to each image", 1)
        fix = "name a checkpoint with such a head, or one without a head"
    key = ("task", "kind" if head.task == "sequence-classification" else "name")
    raise HeadError(message, fix=fix, key=key)


def check_config(
    config: dict[str, Any], family: str, tasks: Sequence[str], head: Head, sizes: Sequence[str] = ()
) -> None:
    """Refuse a config.json of another family, a task that the family does not support, a key of `sizes` that
    is not a positive integer, and a value from which transformers cannot make a model.
    """
    if config.get("model_type") != model_type_of(family):
        raise ModelError(
            f"config.json says model_type {config.get('model_type')!r}, and the recipe says family {family}",
            fix="name the family of this checkpoint, or another checkpoint",
        )
    if head.task not in tasks:
        raise ModelError(
            f"a {family} model cannot carry the task {head.task}", fix=f"choose one of {', '.join(tasks)}"
        )
    for key in sizes:
        if type(config.get(key)) is not int or config[key] < 1:
            raise ModelError(f"config.json: {key} must be a positive integer, found {config.get(key)!r}")
    check_values(config)


def label_names(config: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the outputs in order, from `id2label`; None if config.json has none.

    Raises ModelError for numbers that are not 0, 1, 2 ..., a duplicate name, and a `label2id` that gives a
    name another number.
    """
    named = config.get("id2label")
    if named is None or named == {}:
        return None
    if not isinstance(named, dict):
        names = named if isinstance(named, list) else ["first name", "second name"]
        message = f"id2label must be a map from numbers to names, found {named!r:.60}"
        raise _labels_error(message, _id2label_line(names))
    try:
        numbers = {int(key): value for key, value in named.items()}
    except ValueError:
        raise ModelError(
            f"config.json: id2label has keys that are not numbers: {str(named):.200}",
            fix="write the numbers of the outputs as its keys, from 0",
        ) from None
    names = [numbers[number] for number in sorted(numbers)]
    if sorted(numbers) != list(range(len(named))):
        shown = ", ".join(list(map(str, named))[:12])
        message = f"id2label has the numbers {shown}, and outputs are numbered from 0 without gaps"
        raise _labels_error(message, _id2label_line(names))
    wrong = [name for name in names if type(name) not in (str, int) or name == ""]
    if wrong:
        message = f"id2label has a name that is not a text: {wrong[0]!r:.60}"
        raise _labels_error(message, f'write a text, such as "LABEL_{names.index(wrong[0])}"')
    names = [str(name) for name in names]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        first, second = [index for index, name in enumerate(names) if name == twice][:2]
        raise _labels_error(
            f"id2label gives the outputs {first} and {second} one name, {twice!r}",
            f'give each a name of its own, such as "{second}": "{twice}_{second}"',
        )
    _check_label2id(config.get("label2id"), names)
    return tuple(names)


def _check_label2id(label2id: Any, names: Sequence[str]) -> None:
    """Refuse a label2id that contradicts id2label; names that id2label lacks are ignored."""
    if label2id is None or label2id == {}:
        return
    right = json.dumps({name: number for number, name in enumerate(names[:12])}, ensure_ascii=False)
    fix = f'write "label2id": {right}' if len(names) <= 12 else "remove label2id"
    if not isinstance(label2id, dict):
        raise _labels_error(f"label2id must be a map from names to numbers, found {label2id!r:.60}", fix)
    for number, name in enumerate(names):
        if name in label2id and str(label2id[name]) != str(number):
            message = (
                f"{name!r:.60} is the output {number} in id2label and {label2id[name]!r:.20} in label2id"
            )
            raise _labels_error(message, fix)


def _labels_error(message: str, fix: str) -> ModelError:
    return ModelError(f"config.json: {message}", fix=f"{fix} in config.json")


def _id2label_line(names: Sequence[object]) -> str:
    first = {str(number): str(name) for number, name in enumerate(names[:12])}
    shown = json.dumps(first, ensure_ascii=False)
    more = shown[:-1] + ", ...}" if len(names) > 12 else shown
    return f'write "id2label": {more}, in the order of the outputs,'


def labels_of(config: dict[str, Any], outputs: int | None, head: Head) -> tuple[str, ...]:
    """Names of the logits: the task's, or else those of config.json. `outputs`: number of outputs of the
    checkpoint's head, None without a head.

    Raises ModelError if checkpoint, config.json and task disagree.
    """
    check_problem(config, outputs, head)
    own = label_names(config)
    if own is None and outputs:
        own = tuple(f"LABEL_{index}" for index in range(outputs))
    if own is not None and outputs and len(own) != outputs:
        raise ModelError(
            f"config.json names {len(own)} labels ({_listed(own)}), and the checkpoint's head has {outputs}",
            fix="take config.json and model.safetensors from the same checkpoint",
        )
    wanted = head.labels or own or (("LABEL_0",) if head.problem == "regression" else None)
    if wanted is None:
        raise ModelError(
            "neither the task nor config.json names the labels",
            fix="write the task's labels into the recipe",
        )
    if not outputs or not own:
        return tuple(wanted)
    if is_named(own) and head.problem != "regression":
        agree = [name.casefold() for name in own] == [name.casefold() for name in wanted]
        same = sorted(map(str.casefold, own)) == sorted(map(str.casefold, wanted))
        if agree or (same and head.any_order):
            return own
        difference = "number" if len(own) != len(wanted) else "order" if same else "name"
    else:
        difference = "number" if len(own) != len(wanted) else ""
    if difference:
        raise HeadError(
            f"the labels of checkpoint and recipe differ in {difference}: the checkpoint has {len(own)} "
            f"({_listed(own)}), the recipe {len(wanted)} ({_listed(wanted)})",
            fix="name the checkpoint's labels in the recipe, or start from a checkpoint without a head",
            key=("task", "labels"),
        )
    return tuple(wanted)


def config_of(config: dict[str, Any], named: str, labels: tuple[str, ...], head: Head) -> dict[str, Any]:
    """config.json of the task's model: the class `named`, its labels, and its problem type."""
    return {
        **{key: value for key, value in config.items() if key != "num_labels"},
        "architectures": [named],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": head.problem or config.get("problem_type"),
    }


def check_shapes(
    expected: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]], new: tuple[str, ...] = ()
) -> None:
    """Refuse a checkpoint whose tensors differ in shape from those of its config.json, except those in
    `new`.
    """
    for name, shape in expected.items():
        if shapes.get(name) != shape and name not in new:
            raise ModelError(
                f"{name}: config.json asks for shape {list(shape)}, the checkpoint has "
                f"{list(shapes[name]) if name in shapes else 'no such tensor'}",
                fix="take config.json and model.safetensors from the same checkpoint",
            )


def check_leftover(names: Iterable[str]) -> None:
    """Refuse tensors of a checkpoint's blocks that the model does not have, which transformers would
    ignore.
    """
    left = sorted(names)
    if left:
        raise ModelError(
            f"the checkpoint has {', '.join(left[:3])} ({len(left)} tensors in all), "
            "which config.json does not ask for",
            fix="take config.json and model.safetensors from the same checkpoint",
        )


def _listed(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
