"""Rules of codebooks and Quant-Noise: vector widths, schedules, illegal combinations. No torch.

Checked by `check`, when the layers of the model are known.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from qcompress.models.plan import LayerPlan
from qcompress.recipe.yaml_file import Document, Key
from qcompress.schema.axes import PHASES
from qcompress.schema.formats import CodebookFormat
from qcompress.schema.recipe import Recipe

LATENT = {
    "saq": "set `case: 3`, which looks at the rounded weight alone",
    "squat": "set `perturb: quantized`",
}
"""Steppers with options that move the weight before rounding, and the option to use instead."""


def judge_codebooks(
    recipe: Recipe, document: Document, plan: tuple[LayerPlan, ...], origin: Callable[[LayerPlan], Key]
) -> None:
    """Report invalid codebooks and noise; `origin` gives the key that determines a layer's format."""
    books = tuple(item for item in plan if isinstance(item.weights, CodebookFormat))
    _widths(document, books, origin)
    _noise(recipe, document, plan)
    if not document.sound(("schedule",), ("method",)):
        return
    formats: list[Key] = [("format", key) for key in ("preset", "weights", "embeddings", "layers")]
    if recipe.schedule.name == "staged" and not books and document.sound(*formats):
        key: Key = ("schedule",) if ("schedule",) in document.places else ("method",)
        message = "makes codebooks of one set of layers after another, and the format has no codebook"
        document.report(key, message, "write `format: ipq`, or `weights: codebook` under `format`")
    if books:
        _combinations(recipe, document, books[0])


def _widths(document: Document, books: tuple[LayerPlan, ...], origin: Callable[[LayerPlan], Key]) -> None:
    """Report vectors that do not divide the inputs of their layer."""
    wrong: dict[Key, list[LayerPlan]] = {}
    for item in books:
        if item.layer.in_features % item.weights.block:
            wrong.setdefault(origin(item), []).append(item)
    for key, items in wrong.items():
        block = items[0].weights.block
        fits = gcd(*(item.layer.in_features for item in items), block)
        first, more = items[0], f", and {len(items) - 1} more" if len(items) > 1 else ""
        message = (
            f"vectors of {block} do not divide the {first.layer.in_features} inputs of {first.name}{more}"
        )
        document.report(key, message, f"write `block: {fits}`" if fits > 1 else "give them another format")


def _noise(recipe: Recipe, document: Document, plan: tuple[LayerPlan, ...]) -> None:
    noise, schedule = recipe.quantizer.noise, recipe.schedule.name
    key: Key = ("quantizer",) if ("quantizer",) in document.places else ("method",)
    if noise is None or not document.sound(("quantizer",), ("schedule",), ("method",)):
        return
    if not any("weight" in phase.roles for phase in PHASES[schedule].values()):
        message = f"noise prepares weights that train, and the schedule `{schedule}` trains none"
        document.report(key, message, "use `schedule: plain`, or write `quantizer: {noise: none}`")
        return
    for item in plan:
        vectors = item.weights.vector if item.weights else 1
        if item.weights and noise.block and noise.block % vectors:
            message = f"blocks of {noise.block} cut the vectors of {vectors} channels of {item.name} in two"
            document.report(key, message, "drop `noise.block`, or write a multiple of the vectors' length")
            return
        if item.weights and noise.block and item.layer.in_features % noise.block:
            inputs = item.layer.in_features
            message = f"blocks of {noise.block} do not divide the {inputs} inputs of {item.name}"
            document.report(key, message, "drop `noise.block`, or write a divisor of every layer's inputs")
            return


def _combinations(recipe: Recipe, document: Document, book: LayerPlan) -> None:
    if recipe.adapter.name != "none" and document.sound(("adapter",)):
        key: Key = ("adapter",) if ("adapter",) in document.places else ("method",)
        message = f"its scales divide weights before they are rounded, and {book.name} is a table of vectors"
        document.report(key, message, "drop the adapter, or give its readers an integer format")
    stepper = recipe.stepper
    latent = getattr(stepper, "case", 3) != 3 or getattr(stepper, "perturb", "quantized") == "latent"
    if latent and stepper.name in LATENT and document.sound(("stepper",)):
        key = ("stepper",) if ("stepper",) in document.places else ("method",)
        message = f"moves weights before they are rounded, and of {book.name} only a table of vectors is left"
        document.report(key, message, LATENT[stepper.name])
