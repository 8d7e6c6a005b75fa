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
from qcompress.sensitivity.mixture import Choice, choose

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
    forms: dict[str, Form] = {word: parse_format(word) for word in words}
    # every format is held against the model and the target before the first one is measured
    plans = {word: prepare(with_formats(resolved, form)) for word, form in forms.items()}
    document: dict[str, Any] = {"recipe": recipe.name, "samples": None, "unit": "nats", "formats": {},
                                "mixture": None}  # fmt: skip
    layers: dict[str, dict[str, Choice]] = {}
    stored: dict[str, dict[str, Form]] = {}
    for word, plan in plans.items():
        groups = groups_of(plan.report.plan)
        costs, count, _ = _measure(
            with_formats(resolved, forms[word]), out, cache, reporter, groups, samples, word
        )
        owned = {item.name: item for item in plan.report.plan if item.name in groups}
        sizes = {
            name: stored_bytes(item.layer, item.weights, recipe.format.compute)
            for name, item in owned.items()
        }
        document["samples"] = count
        document["formats"][word] = {
            "bytes": sum(sizes.values()),
            "all": costs.all.to_json(),
            "layers": {
                name: {"alone": costs.alone[name].to_json(), "wins": costs.wins[name].to_json(),
                       "bytes": sizes[name]}
                for name in groups
            },
        }  # fmt: skip
        for name, item in owned.items():
            choices, known = layers.setdefault(name, {}), stored.setdefault(name, {FLOAT: None})
            # a table, and a layer to which the recipe gives a format of its own, keep theirs
            kept = word if item.weights == forms[word] else str(item.weights)
            known[kept] = item.weights
            choices[FLOAT] = Choice(0.0, stored_bytes(item.layer, None, recipe.format.compute))
            choices[kept] = Choice(max(costs.alone[name].mean, 0.0), sizes[name])
    document["float_bytes"] = sum(choices[FLOAT].bytes for choices in layers.values())
    if budget is not None:
        document["mixture"] = _mix(resolved, document, layers, stored, budget, out, cache, reporter, samples)
    write_json(_folder(out, recipe.name) / "sensitivity.json", document)
    return document


def _folder(out: Path, name: str) -> Path:
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _measure(
    resolved: Resolved, out: Path, cache: Path, reporter: Reporter, groups: Mapping[str, list[str]],
    samples: int, title: str, whole: bool = False,
) -> tuple[Costs, int, bool]:  # fmt: skip
    """Costs of a recipe whose formats are settled, on how many samples, and whether these are fresh ones.

    Of each layer, on the first `samples`; or of the `whole`, on those after them where there are two.
    """
    run = pipeline.run(resolved, out, cache, reporter, until="train")
    import torch

    from qcompress.evaluation import Artifacts, evaluation_samples
    from qcompress.host import device_kind
    from qcompress.prepare import rebuild
    from qcompress.sensitivity.measure import measure_costs
    from qcompress.tasks import TASKS

    steps = {step.stage: step for step in run.steps}
    recipe = resolved.recipe
    source = prepare(resolved).directory
    model = FloatModel.of(steps["load"].path, steps["load"].digest, source)
    trained = TrainedModel(steps["train"].path, steps["train"].digest)
    data = recipe.data.model_copy(
        update={"evaluate": {"calibration": recipe.data.calibration or recipe.data.train}}
    )
    measured = recipe.model_copy(
        update={"data": data, "verify": recipe.verify.model_copy(update={"samples": 2 * samples})}
    )
    artifacts = Artifacts(model, trained, None, None, None, {})
    found = evaluation_samples(measured, resolved.base, artifacts)
    windows, later = found.sets["calibration"][:samples], found.sets["calibration"][samples:]
    fresh = whole and len(later) > 1
    windows = later if fresh else windows
    kind = getattr(found.task, "kind", "single")
    costs = measure_costs(
        rebuild(model, trained), groups, TASKS[recipe.task.name], windows, recipe.verify.batch_size,
        torch.device(device_kind(recipe.train.device)), reporter, title, kind,
        not whole,
    )  # fmt: skip
    return costs, len(windows), fresh


def _mix(
    resolved: Resolved, document: dict[str, Any], layers: Mapping[str, Mapping[str, Choice]],
    stored: Mapping[str, Mapping[str, Form]], budget: Budget, out: Path, cache: Path, reporter: Reporter,
    samples: int,
) -> dict[str, Any]:  # fmt: skip
    """The mixture for a budget, what it should cost and what it does."""
    from qcompress.sensitivity.measure import Cost

    most = document["formats"][budget.like]["bytes"] if budget.like else budget.bytes
    chosen = choose(layers, max_bytes=most, max_cost=budget.cost)
    forms = {name: stored[name][word] for name, word in chosen.items()}
    mixed = with_formats(resolved, layers=forms)
    plan = prepare(mixed).report.plan
    groups, tables = groups_of(plan), {item.name for item in plan if item.layer.section == "embeddings"}
    costs, count, fresh = _measure(mixed, out, cache, reporter, groups, samples, "mixture", whole=True)
    uniform = None
    if budget.like:
        same = with_formats(resolved, parse_format(budget.like))
        groups = groups_of(prepare(same).report.plan)
        uniform = _measure(same, out, cache, reporter, groups, samples, budget.like, whole=True)[0].all
    return {
        "samples": count,
        "fresh": fresh,
        "uniform": uniform and uniform.to_json(),
        "difference": uniform and Cost.of(costs.all.samples - uniform.samples).to_json(),
        "formats": chosen,
        "predicted": sum(layers[name][word].cost for name, word in chosen.items()),
        "measured": costs.all.to_json(),
        "bytes": sum(layers[name][word].bytes for name, word in chosen.items()),
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
