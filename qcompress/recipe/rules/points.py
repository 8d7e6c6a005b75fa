"""Rules of activation quantization points (attention matmuls, residual inputs, key-value cache). No torch."""

from __future__ import annotations

from qcompress.models import FAMILIES
from qcompress.models.architecture import Architecture
from qcompress.models.plan import CACHED, PointPlan, matches, rounded
from qcompress.recipe.yaml_file import Document, Key
from qcompress.schema.recipe import Recipe


def judge_points(recipe: Recipe, document: Document, points: tuple[PointPlan, ...]) -> None:
    """Report rounding at points that the family does not have, and formats that points do not support."""
    for word, kind in (("attention", "attention"), ("cache", "attention"), ("residual", "residual")):
        key: Key = ("format", word)
        none = not any(item.point.kind == kind for item in points)
        if none and getattr(recipe.format, word) is not None and document.sound(key):
            message = f"a {recipe.model.family} model has no points of this kind"
            document.report(key, message, "drop the line, or write float")
    wrong: dict[Key, PointPlan] = {}
    for item in rounded(points):
        form = item.activations
        if form.granularity != "tensor" or not form.symmetric:
            wrong.setdefault(_point_origin(recipe, item), item)
    for key, item in wrong.items():
        if document.sound(key):
            message = (
                f"rounds {item.name} to {item.activations}, and a point takes one scale and no zero point"
            )
            document.report(key, message, "write int8, or float")


def judge_cache(recipe: Recipe, document: Document) -> None:
    """Report a key-value cache in a family that does not generate text."""
    if hasattr(FAMILIES[recipe.model.family], "cache_layout"):
        return
    keys: dict[Key, bool] = {
        ("export", "cache"): recipe.export.cache,
        ("format", "cache"): recipe.format.cache is not None,
    }
    for key, wanted in keys.items():
        if wanted and document.sound(key):
            message = f"a {recipe.model.family} model continues no text and has no key-value cache"
            document.report(key, message, "drop the line")


def _point_origin(recipe: Recipe, item: PointPlan) -> Key:
    """Key that determines the format of a point."""
    for pattern, exception in reversed(recipe.format.layers.items()):
        if exception.activations == item.activations and matches(pattern, item.name):
            return ("format", "layers", pattern)
    cached = recipe.format.cache is not None and item.name.endswith(CACHED)
    return ("format", "cache" if cached else item.point.kind)


def judge_attentions(recipe: Recipe, document: Document, architecture: Architecture) -> None:
    """Report objectives on attention in models with query, key and value in one layer."""
    if architecture.attentions or not document.sound(("objective",)):
        return
    objective = recipe.objective
    fused = f"{architecture.family} computes query, key and value in one layer"
    key: Key = ("objective",) if ("objective",) in document.places else ("method",)
    if objective.name == "teacher-intervention":
        document.report(key, f"the teacher cannot intervene: {fused}", "choose another objective")
    elif getattr(objective, "attention", 0):
        message = f"compares attention scores, and {fused}"
        document.report(key, message, "write `objective: {name: distillation, attention: 0}`")


def judge_kept(recipe: Recipe, document: Document, architecture: Architecture) -> None:
    """Report operators of `export.keep_fp32` that the family does not have: models without attention have
    neither softmax nor layer norm.
    """
    key: Key = ("export", "keep_fp32")
    attends = any(point.kind == "attention" for point in architecture.points)
    if attends or not recipe.export.keep_fp32 or recipe.export.graph or not document.sound(key):
        return
    names = " or ".join(
        {"norm": "layer norm", "softmax": "softmax"}[kind] for kind in recipe.export.keep_fp32
    )
    document.report(key, f"a {recipe.model.family} model has no {names}", "drop the line")
