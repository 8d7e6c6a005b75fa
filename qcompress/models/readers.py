"""Files of a checkpoint that make text or images the model's inputs: a tokenizer's, or an image processor's.

They are looked at without transformers, so that a recipe can be refused before anything is loaded. No torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompress.errors import ModelError
from qcompress.models import FAMILIES, PROCESSOR, graph_signature, prepared_size, read_steps
from qcompress.models.architecture import PIXELS

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)

READER_FILES = (*TOKENIZER_FILES, PROCESSOR)
"""Files of a checkpoint that say how text or images become the model's inputs."""

WORDPIECE = ("bert", "distilbert")
"""Families whose tokenizer transformers makes from vocab.txt alone."""

SAY_IT = "write `mean`, `std` and `size` under `task`"


def check_reader(family: str, directory: Path, processor: dict[str, Any] | None = None) -> None:
    """Raise ModelError for a checkpoint that does not say how its inputs are made.

    `processor`: a preprocessor_config.json of the recipe's own, in the place of the checkpoint's.
    """
    if PIXELS in FAMILIES[family].INPUTS:
        _check_processor(family, directory, processor)
        return
    text = " (tokenizer.json, or vocab.txt)" if family in WORDPIECE else ""
    text = text or " (tokenizer.json, or vocab.json with merges.txt)"
    vocabularies = ["tokenizer.json", "vocab.json", *(["vocab.txt"] if family in WORDPIECE else [])]
    if not any((directory / name).is_file() for name in vocabularies):
        raise ModelError(
            f"{directory} holds no tokenizer{text}",
            fix="save the model's tokenizer beside it with tokenizer.save_pretrained(directory)",
        )


def image_size(family: str, directory: Path, processor: dict[str, Any] | None) -> tuple[int, int]:
    """Height and width that the model takes. Raises ModelError where nothing says it."""
    steps = read_steps(directory) if processor is None else processor
    height, width = graph_signature(FAMILIES[family], directory, steps)[0].axes[2:]
    return int(height), int(width)


def keeps_size(directory: Path, processor: dict[str, Any] | None) -> bool:
    """True where preparation leaves images as large as they are."""
    return not prepared_size(read_steps(directory) if processor is None else processor)


def _check_processor(family: str, directory: Path, processor: dict[str, Any] | None) -> None:
    if processor is None and not (directory / PROCESSOR).is_file():
        raise ModelError(
            f"{directory} holds no {PROCESSOR}, which says how images are prepared",
            fix=f"copy it beside the checkpoint, or {SAY_IT}",
        )
    steps = read_steps(directory) if processor is None else processor
    wanted = list(image_size(family, directory, steps))
    prepared = prepared_size(steps).get("image_size", wanted)
    if prepared != wanted:
        raise ModelError(
            f"{PROCESSOR} makes images of {prepared[0]} x {prepared[1]}, and config.json says that the "
            f"model takes {wanted[0]} x {wanted[1]}",
            fix=f"{SAY_IT}, or mend one of the two files",
        )
    for key in ("image_mean", "image_std") if steps.get("do_normalize") else ():
        values = steps.get(key)
        if values is None:
            continue  # transformers has a default for each kind of processor
        values = [values] * 3 if isinstance(values, (int, float)) else values
        if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
            raise ModelError(
                f"{PROCESSOR}: {key} is {values!r:.60}, and must be three numbers, of red, green and blue",
                fix=f"mend it, or {SAY_IT}",
            )
        if key == "image_std" and not all(value > 0 for value in values):
            message = f"{PROCESSOR}: {key} must be above 0, found {values}"
            raise ModelError(message, fix=f"mend it, or {SAY_IT}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
