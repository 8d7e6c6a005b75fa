"""What an adapter asks of a model and of its formats. No torch."""

from __future__ import annotations

from qcompress.models.architecture import Architecture
from qcompress.plan import LayerPlan, sites_asked
from qcompress.schema import Recipe
from qcompress.yamlfile import Document, Key

PLACES = {"norm": "norms", "value": "value projections"}
"""Kinds of sites, as messages name them."""


def judge_adapter(
    recipe: Recipe, document: Document, architecture: Architecture, plan: tuple[LayerPlan, ...]
) -> None:
    """Report an adapter that folds nowhere."""
    if recipe.adapter.name == "none" or not document.sound(("adapter",)):
        return
    key: Key = ("adapter",) if ("adapter",) in document.places else ("method",)
    if not sites_asked(recipe, architecture):
        _no_place(recipe, document, architecture, key)


def _no_place(recipe: Recipe, document: Document, architecture: Architecture, key: Key) -> None:
    family, stated = architecture.family, sorted({site.kind for site in architecture.sites})
    if not stated:
        message = f"nothing folds: a {family} model states no place for a rescaling"
        document.report(key, message, "drop the adapter, such as with `method: lsq`")
        return
    asked = recipe.adapter.sites
    if asked == "norm":
        message = f"the norms of a {family} model feed the residual as well as layers: nothing folds there"
    else:
        message = f"a {family} model states no {PLACES[asked]} for a rescaling"
    place = (*key, "sites") if (*key, "sites") in document.places else key
    document.report(place, message, f"write `sites: {stated[0]}`")
