"""One row of one run, as it is compared: its metrics, its per-sample results and what it cost. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import IncomparableError, UsageError
from qcompress.parity.sample_results import REFERENCE, Columns, with_entities
from qcompress.schema.axes import AXES, PHASES
from qcompress.schema.goals import METRICS
from qcompress.schema.tasks import AGREEMENT
from qcompress.system.artifacts import read_object
from qcompress.verdict.run_files import read_run_samples

if TYPE_CHECKING:
    from qcompress.verdict.run_directory import LoadedRun

TRUTH = ("label", "labels", "tokens")
"""Per-sample results that are the data's and not the model's: equal in runs that may be compared."""

OWN = ("results", REFERENCE, "slices")
"""What of a set does not say what was measured: its row's results, float's answers, and how a user parts
it.
"""


@dataclass(frozen=True)
class Cost:
    """What training took. `block_updates` are updates of one block alone, which run no whole model."""

    updates: int
    block_updates: int
    passes: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """One row of one run. `samples`: as in samples.json.gz, with this row's results under `results`, and
    under `reference` the float model's answers where the row's are held against them.
    """

    arm: str
    task: str
    seed: int
    where: str
    metrics: dict[str, float]
    sets: tuple[str, ...]
    main: dict[str, str]
    """The metric of each evaluation set that is compared unless another one is asked for."""
    samples: dict[str, dict[str, Any]]
    cost: Cost
    settings: dict[str, Any]
    """What the runs of an arm have in common on one task."""
    start: str
    """Digest of the float model."""
    machine: str
    labels: tuple[str, ...] | None = None
    """Names of the model's outputs."""

    def columns(self, name: str) -> Columns:
        """Per-sample results of an evaluation set, what is known of its samples, and what is made of both, by
        name.
        """
        entry = self.samples[name]
        known = {key: value for key, value in entry.items() if isinstance(value, list)}
        return with_entities(known | entry["results"], self.labels)

    def identity(self, name: str) -> dict[str, Any]:
        """What was measured in an evaluation set: ids, digest of the inputs, labels."""
        entry = self.samples[name]
        truth = {key: value for key, value in entry["results"].items() if key in TRUTH}
        return {key: value for key, value in entry.items() if key not in OWN} | truth

    def split(self, metric: str | None) -> tuple[str, str]:
        """Evaluation set and metric that `set.metric`, `metric` or None (the task's first) mean."""
        name, _, short = (metric or "").rpartition(".")
        name = name or self.sets[0]
        short = short or self.main.get(name, "")
        if name not in self.samples or f"{name}.{short}" not in self.metrics:
            known = ", ".join(sorted(self.metrics))
            raise UsageError(f"{self.where} has no metric {metric!r}", fix=f"choose one of {known}")
        return name, short


def measured(loaded: LoadedRun, row: str, arm: str | None = None) -> Measured:
    """A row of a run directory; the arm is the recipe's name unless given."""
    found = next((item for item in loaded.parity["rows"] if item["stage"] == row), None)
    if found is None or found["status"] != "measured":
        why = found["reason"] if found else "there is no such row"
        raise IncomparableError(f"{loaded.path}: the row {row} was not measured: {why}", fix="choose --row")
    recipe, manifest = loaded.recipe, loaded.manifest
    sets = read_run_samples(loaded.path / "samples.json.gz")
    samples = {}
    for name, entry in sets.items():
        if name not in loaded.parity.get("inputs", {}):
            raise IncomparableError(
                f"{loaded.path}: parity.json does not say what was measured",
                fix=f"measure it again: qcompress verify {loaded.path}",
            )
        samples[name] = {key: value for key, value in entry.items() if key != "rows"}
        samples[name] |= {"inputs": loaded.parity["inputs"][name], "results": entry["rows"][row]}
        agrees = f"{name}.{AGREEMENT}" in found["metrics"]
        if agrees and "prediction" in entry["rows"].get("float", {}):
            samples[name][REFERENCE] = entry["rows"]["float"]["prediction"]
    values = recipe.model_dump(mode="json", by_alias=True)
    order = tuple(loaded.parity.get("sets") or sets)
    host = manifest["host"]
    return Measured(
        arm=arm or recipe.name,
        task=values["task"].get("glue") or order[0],
        seed=recipe.seed,
        where=str(loaded.path),
        metrics=found["metrics"],
        sets=order,
        main={name: _main(name, found["metrics"], loaded.parity.get("main", {})) for name in order},
        samples=samples,
        cost=cost_of(values, manifest),
        settings={key: values[key] for key in ("task", "format", "train", *AXES)},
        start=manifest["stages"]["load"]["digest"],
        labels=loaded.labels,
        machine=f"{host['name']}, {host['threads']} threads, {'GPU' if host['gpu']['sm'] else 'no GPU'}",
    )


def _main(name: str, metrics: dict[str, float], main: dict[str, list[str]]) -> str:
    """The main metric of a set: as the report says, or the first of its own in the order of METRICS."""
    own = [metric for metric in METRICS if f"{name}.{metric}" in metrics]
    return (main.get(name) or own)[0]


def cost_of(recipe: dict[str, Any], manifest: dict[str, Any]) -> Cost:
    """Updates, passes (one forward and one backward of the whole model) and seconds from a run's manifest."""
    if "phases" not in manifest:
        raise IncomparableError(
            f"the manifest of {manifest['recipe']} does not say what training took",
            fix="run the recipe again: what is finished is reused",
        )
    whole = [phase for phase in manifest["phases"] if "block" not in phase]
    steps = {name: phase.steps for name, phase in PHASES[recipe["schedule"]["name"]].items()}
    steps |= {name: phase["steps"] for name, phase in recipe["train"]["phases"].items()}
    return Cost(
        updates=sum(phase["steps"] for phase in whole),
        block_updates=sum(steps[phase["name"]] for phase in manifest["phases"] if "block" in phase),
        passes=sum(phase["passes"] for phase in whole),
        seconds=manifest["stages"].get("train", {"seconds": 0.0})["seconds"],  # or a graph made elsewhere
    )


def arm_and_runs(text: str) -> tuple[str | None, list[Path]]:
    """The arm of `ARM=RUN`, None of `RUN`, and its runs: a run directory, or those of a folder of seeds."""
    arm, equals, folder = text.partition("=")
    named = equals and not Path(text).exists()
    if named and not (arm and folder):
        raise UsageError(f"{text!r} is not of the form ARM=RUN", fix="such as lsq=runs/lsq/latest")
    path = Path(folder if named else text)
    runs = [path]
    if (path / "seeds.json").is_file():
        runs = [path / f"seed-{seed}" for seed in read_object(path / "seeds.json").get("verdicts", {})]
    return (arm if named else None), runs
