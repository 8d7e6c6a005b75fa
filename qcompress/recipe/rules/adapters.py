"""Rules of adapters: sites in the model and formats of the layers behind them. No torch."""

from __future__ import annotations

from qcompress.models.architecture import Architecture
from qcompress.models.plan import LayerPlan, plan_sites, sites_asked
from qcompress.recipe.yaml_file import Document, Key
from qcompress.schema.recipe import Recipe

PLACES = {"norm": "norms", "value": "value projections"}
"""Names of the kinds of sites in messages."""


def judge_adapter(
    recipe: Recipe, document: Document, architecture: Architecture, plan: tuple[LayerPlan, ...]
) -> None:
    """Report an adapter without a site to fold into, or with scales meant for another format."""
    if recipe.adapter.name == "none" or not document.sound(("adapter",)):
        return
    key: Key = ("adapter",) if ("adapter",) in document.places else ("method",)
    if not sites_asked(recipe, architecture):
        _report_missing_site(recipe, document, architecture, key)
        return
    sites = plan_sites(recipe, architecture, plan)
    readers = [name for site in sites for name in site.readers]
    rounding = [item.name for item in plan if item.name in readers and item.activations]
    if recipe.adapter.name == "awq" and rounding:
        message = (
            f"AWQ's scales are for weights whose input stays float, and {rounding[0]} rounds its input "
            f"({len(rounding)} of {len(readers)} layers behind a rescaling do)"
        )
        fix = "use `smoothquant` or `quadapter`, or a weight-only format such as `format: w4a16-g128`"
        document.report(key, message, fix)
    if recipe.adapter.name == "smoothquant" and readers and not rounding:
        message = "it moves outliers of activations into weights, and rounds no activation that it rescales"
        document.report(key, message, "use `awq` or `quadapter`, or round activations: `format: w8a8`")


def _report_missing_site(recipe: Recipe, document: Document, architecture: Architecture, key: Key) -> None:
    family, stated = architecture.family, sorted({site.kind for site in architecture.sites})
    if not stated:
        shared = any(layer.kind == "linear" and layer.tied_to for layer in architecture.layers)
        what = "blocks that share their weights state" if shared else f"a {family} model states"
        message = f"nothing folds: {what} no place for a rescaling"
        document.report(key, message, "drop the adapter, such as with `method: lsq`")
        return
    asked = recipe.adapter.sites
    if asked == "norm":
        message = f"the norms of a {family} model feed the residual as well as layers: nothing folds there"
    else:
        message = f"a {family} model states no {PLACES[asked]} for a rescaling"
    place = (*key, "sites") if (*key, "sites") in document.places else key
    document.report(place, message, f"write `sites: {stated[0]}`")
