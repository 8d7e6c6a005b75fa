"""`qcompress sensitivity`: the cost of rounding each layer, and a mixture of formats for a budget.

For each format the recipe is calibrated (method ptq) with that format of all its weights, through the same
stages and the same cache as a run, and measured on the calibration data (`measure.py`): data that judge a run
choose nothing. Layers that the recipe leaves float stay out. A mixture is then calibrated and measured as a
whole, since costs that were measured one by one need not add up, on samples that did not choose it (the next
ones of the calibration data; `fresh` says whether there were any).

The document: {"recipe", "samples", "unit", "float_bytes", "formats": {format: {"bytes", "all", "layers":
{name: {"alone", "wins", "bytes"}}}}, "mixture": null | {"formats", "predicted", "measured", "uniform",
"difference", "samples", "fresh", "bytes", "fragment"}}; a cost is [mean, standard error], and so is the
difference of the mixture to the uniform format of the budget, sample by sample; both null without one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress import pipeline
from qcompress.artifacts import FloatModel, TrainedModel, write_json
from qcompress.errors import UsageError
from qcompress.keys import prepare
from qcompress.plan import LayerPlan
from qcompress.progress import Reporter
from qcompress.recipe import Resolved
from qcompress.sensitivity.candidates import (
    Form,
    groups_of,
    parse_format,
    spelled,
    stored_bytes,
    with_formats,
)
from qcompress.sensitivity.mixture import BYTES, Choice, affordable, choose

if TYPE_CHECKING:
    from qcompress.sensitivity.measure import Costs

FLOAT = "float"


@dataclass(frozen=True)
class Budget:
    """At most so many bytes, or a distance of at most so many nats, or as small as one format of all."""

    bytes: int | None = None
    cost: float | None = None
    like: str | None = None


def sensitivity(
    resolved: Resolved,
    out: Path,
    cache: Path,
    reporter: Reporter,
    formats: Sequence[str] = ("int8", "int4"),
    samples: int = 64,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Measure every format of every layer, choose a mixture where there is a `budget`; writes and returns
    sensitivity.json (the document above) in the folder of the recipe's runs.

    Raises UsageError for a recipe without calibration data, a format that is not one, and a budget that no
    mixture of these formats keeps; RecipeError where a format is not for the target or the recipe's layers.
    """
    recipe = resolved.recipe
    if recipe.data.calibration is None and recipe.data.train is None:
        raise UsageError("sensitivity is measured on calibration data", fix="name some at data.calibration")
    if recipe.export.graph is not None:
        raise UsageError("`export.graph` was quantized elsewhere", fix="name the recipe of the float model")
    words = list(dict.fromkeys([*formats, *([budget.like] if budget and budget.like else [])]))
    # every format is held against the model, the target and the budget before the first one is measured
    candidates = {word: _candidate(resolved, word) for word in words}
    if budget is not None and budget.bytes is not None:
        sizes = [candidate.sizes for candidate in candidates.values()]
        affordable(sum(min(one[name] for one in sizes) for name in sizes[0]), budget.bytes, *BYTES)
    document: dict[str, Any] = {"recipe": recipe.name, "samples": None, "unit": None, "formats": {},
                                "mixture": None}  # fmt: skip
    layers: dict[str, dict[str, Choice]] = {}
    for word, candidate in candidates.items():
        measured = _measure(candidate.resolved, out, cache, reporter, samples, word)
        document |= {"samples": measured.samples, "unit": measured.unit}
        document["formats"][word] = _told(candidate, measured.costs)
        for name, item in candidate.owned.items():
            # a table, and a layer to which the recipe gives a format of its own, keep theirs
            kept = word if item.weights == candidate.form else str(item.weights)
            cost = max(measured.costs.alone[name].mean, 0.0)
            unrounded = Choice(0.0, stored_bytes(item.layer, None, recipe.format.compute))
            layers.setdefault(name, {FLOAT: unrounded})
            layers[name][kept] = Choice(cost, candidate.sizes[name], item.weights)
    document["float_bytes"] = sum(choices[FLOAT].bytes for choices in layers.values())
    if budget is not None:
        like = candidates[budget.like] if budget.like else None
        most = sum(like.sizes.values()) if like else budget.bytes
        chosen = choose(layers, max_bytes=most, max_cost=budget.cost)
        document["mixture"] = _mix(resolved, chosen, layers, like, out, cache, reporter, samples)
    folder = out / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sensitivity.json", document)
    return document


@dataclass(frozen=True)
class _Candidate:
    """One format of all weights: the recipe that has it, and the weights that it rounds with their bytes."""

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


def _told(candidate: _Candidate, costs: Costs) -> dict[str, Any]:
    layers = {
        name: {"alone": costs.alone[name].to_json(), "wins": costs.wins[name].to_json(), "bytes": size}
        for name, size in candidate.sizes.items()
    }
    return {"bytes": sum(candidate.sizes.values()), "all": costs.all.to_json(), "layers": layers}


@dataclass(frozen=True)
class _Measured:
    costs: Costs
    samples: int
    fresh: bool
    unit: str


def _measure(
    resolved: Resolved, out: Path, cache: Path, reporter: Reporter, samples: int, title: str,
    whole: bool = False,
) -> _Measured:  # fmt: skip
    """Costs of a recipe whose formats are settled: of each layer on the first `samples`, or of the `whole` on
    those after them, where there are two.
    """
    run = pipeline.run(resolved, out, cache, reporter, until="train")
    import torch

    from qcompress.evaluation import Artifacts, evaluation_samples
    from qcompress.host import device_kind
    from qcompress.prepare import rebuild
    from qcompress.sensitivity.measure import measure_costs
    from qcompress.tasks import TASKS

    steps, recipe = {step.stage: step for step in run.steps}, resolved.recipe
    model = FloatModel.of(steps["load"].path, steps["load"].digest, prepare(resolved).directory)
    trained = TrainedModel(steps["train"].path, steps["train"].digest)
    data = {"evaluate": {"calibration": recipe.data.calibration or recipe.data.train}}
    changes = {
        "data": recipe.data.model_copy(update=data),
        "verify": recipe.verify.model_copy(update={"samples": 2 * samples}),
    }
    artifacts = Artifacts(model, trained, None, None, None, {})
    found = evaluation_samples(recipe.model_copy(update=changes), resolved.base, artifacts)
    windows, later = found.sets["calibration"][:samples], found.sets["calibration"][samples:]
    fresh = whole and len(later) > 1
    windows, kind = later if fresh else windows, getattr(found.task, "kind", "single")
    prepared = rebuild(model, trained)
    costs = measure_costs(
        prepared, groups_of(prepared.plan), TASKS[recipe.task.name], windows, recipe.verify.batch_size,
        torch.device(device_kind(recipe.train.device)), reporter, title, kind, each=not whole,
    )  # fmt: skip
    return _Measured(costs, len(windows), fresh, "squared difference" if kind == "regression" else "nats")


def _mix(
    resolved: Resolved, chosen: Mapping[str, str], layers: Mapping[str, Mapping[str, Choice]],
    like: _Candidate | None, out: Path, cache: Path, reporter: Reporter, samples: int,
) -> dict[str, Any]:  # fmt: skip
    """What the chosen mixture should cost and what it does, beside the uniform format it is to be like."""
    from qcompress.sensitivity.measure import Cost

    picked = {name: layers[name][word] for name, word in chosen.items()}
    forms = {name: choice.form for name, choice in picked.items()}
    mixed = with_formats(resolved, layers=forms)
    tables = {item.name for item in prepare(mixed).report.plan if item.layer.section == "embeddings"}
    found = _measure(mixed, out, cache, reporter, samples, "mixture", whole=True)
    uniform = None
    if like is not None:
        uniform = _measure(like.resolved, out, cache, reporter, samples, "uniform", whole=True).costs.all
    return {
        "formats": dict(chosen),
        "predicted": sum(choice.cost for choice in picked.values()),
        "measured": found.costs.all.to_json(),
        "uniform": uniform and uniform.to_json(),
        "difference": uniform and Cost.of(found.costs.all.samples - uniform.samples).to_json(),
        "samples": found.samples,
        "fresh": found.fresh,
        "bytes": sum(choice.bytes for choice in picked.values()),
        "fragment": fragment(forms, tables),
    }


def fragment(forms: Mapping[str, Form], tables: Collection[str]) -> dict[str, Any]:
    """The section `format` that gives each layer its format, laid over what the recipe says: the most common
    one of all weights that are no `tables`, and the layers that differ.
    """
    spoken = {name: spelled(form) for name, form in forms.items()}
    common = Counter(repr(said) for name, said in spoken.items() if name not in tables).most_common(1)
    usual = next((said for said in spoken.values() if common and repr(said) == common[0][0]), None)
    others = {name: {"weights": said} for name, said in spoken.items() if name in tables or said != usual}
    return ({} if usual is None else {"weights": usual}) | ({"layers": others} if others else {})
