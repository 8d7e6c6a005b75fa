"""Checks of a checkpoint's tokenizer or image processor files.

They run without transformers, so that a recipe can be refused before anything is loaded. No torch.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from qcompress.errors import ModelError
from qcompress.models import FAMILIES, PROCESSOR, graph_signature, prepared_size, read_steps
from qcompress.models.architecture import PIXELS
from qcompress.models.checkpoint_files import read_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)

READER_FILES = (*TOKENIZER_FILES, PROCESSOR)
"""Files of a checkpoint that define how text or images become the model's inputs."""

WORDPIECE = ("bert", "distilbert")
"""Families whose tokenizer transformers makes from vocab.txt alone."""

TOKENIZER_CHOOSERS = {
    "auto_map": "it selects tokenizer code of the checkpoint, which is never run",
    "fast_tokenizer_files": "it names other files in the place of tokenizer.json",
    **dict.fromkeys(
        ("vocab_file", "merges_file", "spm_file", "gguf_file"),
        "it names another file in the place of the tokenizer's",
    ),
    "init_inputs": "it gives other arguments than the tokenizer's files",
}
"""Keys of a tokenizer_config.json that make transformers load other files or code, and their effect."""

WHOLE_PROCESSOR = "processor_config.json"
"""File where transformers looks for an image processor first."""

SAY_IT = "write `mean`, `std` and `size` under `task`"


def check_reader(family: str, directory: Path, processor: dict[str, Any] | None = None) -> None:
    """Raise ModelError for a checkpoint without a valid tokenizer or image processor.

    `processor`: the recipe's preprocessor_config.json, which replaces the checkpoint's.
    """
    if not FAMILIES[family].INPUTS:  # a user's module, whose data are its inputs
        return
    if PIXELS in FAMILIES[family].INPUTS:
        _check_processor(family, directory, processor)
        return
    text = " (tokenizer.json, or vocab.txt)" if family in WORDPIECE else ""
    text = text or " (tokenizer.json, or vocab.json with merges.txt)"
    _check_tokenizer_config(directory / "tokenizer_config.json")
    vocabularies = ["tokenizer.json", "vocab.json", *(["vocab.txt"] if family in WORDPIECE else [])]
    if not any((directory / name).is_file() for name in vocabularies):
        raise ModelError(
            f"{directory} holds no tokenizer{text}",
            fix="save the model's tokenizer beside it with tokenizer.save_pretrained(directory)",
        )


def _check_tokenizer_config(file: Path) -> None:
    config = read_object(file) if file.exists() else {}
    for key, effect in TOKENIZER_CHOOSERS.items():
        if config.get(key):
            raise ModelError(
                f"{file} has {key} ({config[key]!r:.60}): {effect}",
                fix=f"remove {key}, where tokenizer.json is the tokenizer",
            )


def image_size(family: str, directory: Path, processor: dict[str, Any] | None) -> tuple[int, int]:
    """Height and width of the model's images. Raises ModelError if no file gives the size."""
    steps = read_steps(directory) if processor is None else processor
    height, width = graph_signature(FAMILIES[family], directory, steps)[0].axes[2:]
    return int(height), int(width)


def keeps_size(directory: Path, processor: dict[str, Any] | None) -> bool:
    """True if preprocessing does not change the size of images."""
    return not prepared_size(read_steps(directory) if processor is None else processor)


def _check_processor(family: str, directory: Path, processor: dict[str, Any] | None) -> None:
    if processor is None and not (directory / PROCESSOR).is_file():
        raise ModelError(
            f"{directory} holds no {PROCESSOR}, the file with the preprocessing of images",
            fix=f"copy it beside the checkpoint, or {SAY_IT}",
        )
    steps = read_steps(directory) if processor is None else processor
    if processor is None:
        _check_choice(directory, steps)
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


def _check_choice(directory: Path, steps: dict[str, Any]) -> None:
    """Refuse a preprocessor_config.json that transformers would not choose, or whose type it does not
    know.
    """
    whole = directory / WHOLE_PROCESSOR
    preferred = read_object(whole).get("image_processor") if whole.exists() else None
    if preferred and preferred != steps:
        raise ModelError(
            f"{directory} holds a {PROCESSOR} and a {WHOLE_PROCESSOR} with another image_processor",
            fix=f"remove the one that is not the model's, or {SAY_IT}",
        )
    if steps.get("auto_map"):
        raise ModelError(
            f"{PROCESSOR} has an auto_map: it selects code of the checkpoint, which is never run",
            fix=f"remove it, or {SAY_IT}",
        )
    kinds = ((key, steps[key]) for key in KINDS if steps.get(key) is not None)
    key, kind = next(kinds, ("", None))
    known = known_processors() if key else frozenset()
    if known and (not isinstance(kind, str) or _of_no_backend(kind) not in known):
        raise ModelError(
            f"{PROCESSOR}: {key} is {kind!r:.60}, which transformers does not know",
            fix=f"write one that it knows, such as ViTImageProcessor, or {SAY_IT}",
        )


def known_processors() -> frozenset[str]:
    """Names of the image processors of the installed transformers, parsed from the source of its tables,
    because importing it takes seconds. Empty without transformers.
    """
    spec = importlib.util.find_spec("transformers")
    folders = (spec and spec.submodule_search_locations) or ()
    files = [Path(folder) / "models" / "auto" / name for folder in folders for name in TABLES]
    text = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    return frozenset(map(_of_no_backend, re.findall(r'"(?:pil|torchvision)": "(\w+)"', text)))


KINDS = ("image_processor_type", "feature_extractor_type")
"""Keys of a preprocessor_config.json that name a class; the first one counts."""

TABLES = ("auto_mappings.py", "image_processing_auto.py")


def _of_no_backend(kind: str) -> str:
    """Name of an image processor without its backend.

    >>> _of_no_backend("ViTFeatureExtractor"), _of_no_backend("ViTImageProcessorFast")
    ('ViTImageProcessor', 'ViTImageProcessor')
    """
    return re.sub(r"(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)$", "ImageProcessor", kind)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
