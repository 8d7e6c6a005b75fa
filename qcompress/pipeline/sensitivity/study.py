"""`qcompress sensitivity`: the cost of quantizing each layer, and a mixture of formats for a budget.

For each format, the recipe is calibrated (method ptq) with that format of all its weights, through the stages
and the cache of a run, and measured on the calibration data (`measure.py`), because evaluation data must not
choose anything. Layers that the recipe leaves float are excluded. A mixture is then calibrated and measured
as a whole, since costs that were measured one by one need not add up, on samples that did not choose it (the
next ones of the calibration data, or with a seed others drawn from all of it; `fresh` is false if there were
none). Measurements of single layers stay in the cache: another budget only measures its mixture.

The document: {"recipe", "samples", "seed", "unit", "float_bytes", "formats": {format: {"bytes", "all",
"layers": {name: {"alone", "wins", "weight_error", "bytes"}}}}, "mixture": null | {"formats", "predicted",
"measured", "uniform", "difference", "samples", "fresh", "bytes", "fragment", "controls": {control:
{"formats", "measured", "difference", "bytes", "fragment"}}}}; a cost is [mean, standard error]. `difference`
is that of the mixture from the uniform format of the budget, sample by sample, null without one, or from a
control (`controls.py`). `wins` is null if not requested.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompress.errors import UsageError
from qcompress.models.plan import LayerPlan
from qcompress.pipeline.keys import prepare
from qcompress.pipeline.sensitivity.calibrated import (
    LayerCosts,
    Place,
    WholeCost,
    measure_layers,
    measure_whole,
)
from qcompress.pipeline.sensitivity.candidates import (
    Form,
    groups_of,
    parse_format,
    spelled,
    stored_bytes,
    with_formats,
)
from qcompress.pipeline.sensitivity.controls import check_controls, other_costs
from qcompress.pipeline.sensitivity.mixture import BYTES, Choice, affordable, choose
from qcompress.pipeline.sensitivity.sampling import Sampling
from qcompress.recipe.load import Resolved
from qcompress.system.artifacts import write_json
from qcompress.system.filesystem import make_folder
from qcompress.system.places import demand_place

FLOAT = "float"


@dataclass(frozen=True)
class Budget:
    """Limit of a mixture: bytes, nats of divergence, or the bytes of one uniform format."""

    bytes: int | None = None
    cost: float | None = None
    like: str | None = None


def budget_of(most_bytes: int | None, most_cost: float | None, like: str | None) -> Budget | None:
    """The given budget, or None. Raises UsageError for more than one."""
    given = [value for value in (most_bytes, most_cost, like) if value is not None]
    if len(given) > 1:
        raise UsageError("a mixture has one budget", fix="give one of max-bytes, max-cost and as-small-as")
    return Budget(most_bytes, most_cost, like) if given else None


def sensitivity(
    resolved: Resolved,
    place: Place,
    sampling: Sampling,
    formats: Sequence[str] = ("int8", "int4"),
    budget: Budget | None = None,
    controls: Sequence[str] = (),
    wins: bool = True,
) -> dict[str, Any]:
    """Measure every format of every layer, choose a mixture within `budget`, and compare it with `controls`.
    Writes and returns sensitivity.json (the document above) in the folder of the recipe's runs. `wins` False:
    measure only costs that a choice needs.

    Raises UsageError for a recipe without calibration data, an unknown format, and a budget that no mixture
    meets; RecipeError for a format that the target or the recipe's layers refuse.
    """
    recipe = resolved.recipe
    _check(resolved, budget, controls)
    demand_place(place.out, folder=True)
    words = list(dict.fromkeys([*formats, *([budget.like] if budget and budget.like else [])]))
    # check every format against the model, the target and the budget before measuring the first one
    candidates = {word: _candidate(resolved, word) for word in words}
    if budget is not None and budget.bytes is not None:
        sizes = [candidate.sizes for candidate in candidates.values()]
        affordable(sum(min(size[name] for size in sizes) for name in sizes[0]), budget.bytes, *BYTES)
    document: dict[str, Any] = {"recipe": recipe.name, "samples": None, "seed": sampling.seed, "unit": None,
                                "formats": {}, "mixture": None}  # fmt: skip
    offer = _Offer({}, {})
    for word, candidate in candidates.items():
        costs = measure_layers(candidate.resolved, place, sampling, word, wins)
        document |= {"samples": costs.samples, "unit": costs.unit}
        document["formats"][word] = _entry(candidate, costs)
        offer.add(word, candidate, costs, recipe.format.compute)
    document["float_bytes"] = sum(choices[FLOAT].bytes for choices in offer.layers.values())
    if budget is not None:
        like = candidates[budget.like] if budget.like else None
        document["mixture"] = _mix(resolved, place, sampling, offer, budget, like, controls)
    folder = place.out / recipe.name
    make_folder(folder)
    write_json(folder / "sensitivity.json", document)
    return document


def _check(resolved: Resolved, budget: Budget | None, controls: Sequence[str]) -> None:
    recipe = resolved.recipe
    if recipe.data.calibration is None and recipe.data.train is None:
        raise UsageError(
            "sensitivity is measured on calibration data, and the recipe has none", fix="set data.calibration"
        )
    if recipe.export.graph is not None:
        raise UsageError("`export.graph` was quantized elsewhere", fix="name the recipe of the float model")
    check_controls(controls)
    if controls and budget is None:
        raise UsageError("a control is a mixture, and needs a budget", fix="give a budget, or no control")


@dataclass(frozen=True)
class _Candidate:
    """One format of all weights: its recipe, the quantized weights, and their bytes."""

    form: Form
    resolved: Resolved
    owned: dict[str, LayerPlan]
    sizes: dict[str, int]


def _candidate(resolved: Resolved, word: str) -> _Candidate:
    form = parse_format(word)
    with_it = with_formats(resolved, form)
    owned = _owned(with_it)
    compute = resolved.recipe.format.compute
    sizes = {name: stored_bytes(item.layer, item.weights, compute) for name, item in owned.items()}
    return _Candidate(form, with_it, owned, sizes)


def _owned(resolved: Resolved) -> dict[str, LayerPlan]:
    plan = prepare(resolved).report.plan
    groups = groups_of(plan)
    return {item.name: item for item in plan if item.name in groups}


def _entry(candidate: _Candidate, costs: LayerCosts) -> dict[str, Any]:
    layers = {
        name: {
            "alone": costs.alone[name],
            "wins": costs.wins and costs.wins[name],
            "weight_error": costs.weight_errors[name],
            "bytes": size,
        }
        for name, size in candidate.sizes.items()
    }
    return {"bytes": sum(candidate.sizes.values()), "all": costs.all, "layers": layers}


@dataclass(frozen=True)
class _Offer:
    """Choices of each layer by the name of the format, and the errors of its weight."""

    layers: dict[str, dict[str, Choice]]
    errors: dict[str, dict[str, float]]

    def add(self, word: str, candidate: _Candidate, costs: LayerCosts, compute: str) -> None:
        for name, item in candidate.owned.items():
            # embedding tables, and layers under format.layers, keep their formats
            kept = word if item.weights == candidate.form else str(item.weights)
            cost = max(costs.alone[name][0], 0.0)
            choices = self.layers.setdefault(
                name, {FLOAT: Choice(0.0, stored_bytes(item.layer, None, compute))}
            )
            choices[kept] = Choice(cost, candidate.sizes[name], item.weights)
            self.errors.setdefault(name, {FLOAT: 0.0})[kept] = costs.weight_errors[name]


def _mix(
    resolved: Resolved, place: Place, sampling: Sampling, offer: _Offer, budget: Budget,
    like: _Candidate | None, controls: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Choose and measure the mixture, with the uniform format of equal bytes and the control mixtures for
    comparison.
    """
    most = sum(like.sizes.values()) if like else budget.bytes
    picked = _picked(offer.layers, max_bytes=most, max_cost=budget.cost)
    entry, mixture = _measured(resolved, place, sampling, picked, "mixture")
    uniform = None if like is None else measure_whole(like.resolved, place, sampling, "uniform")
    compared = {}
    for control in controls:
        costs = other_costs(control, offer.layers, offer.errors, sampling.seed or 0)
        instead = _picked(costs, max_bytes=entry["bytes"])
        compared[control], measured = _measured(resolved, place, sampling, instead, control)
        compared[control]["difference"] = _difference(mixture, measured)
    return entry | {
        "predicted": sum(choice.cost for _, choice in picked.values()),
        "uniform": uniform and uniform.cost.to_json(),
        "difference": uniform and _difference(mixture, uniform),
        "samples": len(mixture.cost.samples),
        "fresh": mixture.fresh,
        "controls": compared,
    }


def _picked(
    layers: Mapping[str, Mapping[str, Choice]], max_bytes: int | None = None, max_cost: float | None = None
) -> dict[str, tuple[str, Choice]]:
    """Best choice of each layer, with the name of its format."""
    chosen = choose(layers, max_bytes=max_bytes, max_cost=max_cost)
    return {name: (word, layers[name][word]) for name, word in chosen.items()}


def _measured(
    resolved: Resolved, place: Place, sampling: Sampling, picked: Mapping[str, tuple[str, Choice]], title: str
) -> tuple[dict[str, Any], WholeCost]:
    """Entry of a mixture in the document, and its cost sample by sample."""
    forms = {name: choice.form for name, (_, choice) in picked.items()}
    mixed = with_formats(resolved, layers=forms)
    tables = {item.name for item in prepare(mixed).report.plan if item.layer.section == "embeddings"}
    measured = measure_whole(mixed, place, sampling, title)
    entry = {
        "formats": {name: word for name, (word, _) in picked.items()},
        "measured": measured.cost.to_json(),
        "bytes": sum(choice.bytes for _, choice in picked.values()),
        "fragment": fragment(forms, tables),
    }
    return entry, measured


def _difference(measured: WholeCost, reference: WholeCost) -> list[float]:
    """[mean, standard error] of a cost minus a reference cost, sample by sample."""
    return type(measured.cost).of(measured.cost.samples - reference.cost.samples).to_json()


def fragment(forms: Mapping[str, Form], tables: Collection[str]) -> dict[str, Any]:
    """Section `format` that gives each layer its format, to merge over the recipe's: the most common format
    of all weights except `tables`, and the layers that differ.
    """
    values = {name: spelled(form) for name, form in forms.items()}
    common = Counter(repr(value) for name, value in values.items() if name not in tables).most_common(1)
    usual = next((value for value in values.values() if common and repr(value) == common[0][0]), None)
    exceptions = {
        name: {"weights": value} for name, value in values.items() if name in tables or value != usual
    }
    return ({} if usual is None else {"weights": usual}) | ({"layers": exceptions} if exceptions else {})
