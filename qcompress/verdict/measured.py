"""One row of a run, prepared for comparison: metrics, per-sample results and training cost. No torch."""

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
"""Per-sample results that come from the data, not from the model: equal in comparable runs."""

OWN = ("results", REFERENCE, "slices")
"""Fields ignored when checking that two runs were evaluated on the same samples."""


@dataclass(frozen=True)
class Cost:
    """Training cost. `block_updates` are updates of one block alone, without a pass of the whole model."""

    updates: int
    block_updates: int
    passes: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """One row of a run. `samples`: as in samples.json.gz, with this row's results under `results`, and the
    float model's predictions under `reference` if the row was compared with them.
    """

    arm: str
    task: str
    seed: int
    where: str
    metrics: dict[str, float]
    sets: tuple[str, ...]
    main: dict[str, str]
    """Default metric for comparison, by evaluation set."""
    samples: dict[str, dict[str, Any]]
    cost: Cost
    settings: dict[str, Any]
    """Settings that all runs of an arm share on one task."""
    start: str
    """Digest of the float model."""
    machine: str
    labels: tuple[str, ...] | None = None
    """Names of the model's outputs."""

    def columns(self, name: str) -> Columns:
        """Columns of an evaluation set by name: sample data, the row's results, and columns derived from
        both.
        """
        entry = self.samples[name]
        known = {key: value for key, value in entry.items() if isinstance(value, list)}
        return with_entities(known | entry["results"], self.labels)

    def identity(self, name: str) -> dict[str, Any]:
        """Identity of the measured samples of an evaluation set: ids, digest of the inputs, labels."""
        entry = self.samples[name]
        truth = {key: value for key, value in entry["results"].items() if key in TRUTH}
        return {key: value for key, value in entry.items() if key not in OWN} | truth

    def split(self, metric: str | None) -> tuple[str, str]:
        """Evaluation set and metric from `set.metric`, `metric`, or None (the task's first)."""
        name, _, short = (metric or "").rpartition(".")
        name = name or self.sets[0]
        short = short or self.main.get(name, "")
        if name not in self.samples or f"{name}.{short}" not in self.metrics:
            known = ", ".join(sorted(self.metrics))
            raise UsageError(f"{self.where} has no metric {metric!r}", fix=f"choose one of {known}")
        return name, short


def measured(loaded: LoadedRun, row: str, arm: str | None = None) -> Measured:
    """Read a row of a run directory; the arm is the recipe's name unless given."""
    measured_row = next((item for item in loaded.parity["rows"] if item["stage"] == row), None)
    if measured_row is None or measured_row["status"] != "measured":
        why = measured_row["reason"] if measured_row else "the report has no such row"
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
        agrees = f"{name}.{AGREEMENT}" in measured_row["metrics"]
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
        metrics=measured_row["metrics"],
        sets=order,
        main={name: _main(name, measured_row["metrics"], loaded.parity.get("main", {})) for name in order},
        samples=samples,
        cost=cost_of(values, manifest),
        settings={key: values[key] for key in ("task", "format", "train", *AXES)},
        start=manifest["stages"]["load"]["digest"],
        labels=loaded.labels,
        machine=f"{host['name']}, {host['threads']} threads, {'GPU' if host['gpu']['sm'] else 'no GPU'}",
    )


def _main(name: str, metrics: dict[str, float], main: dict[str, list[str]]) -> str:
    """Main metric of a set: from the report, or the set's first metric in the order of METRICS."""
    measured_metrics = [metric for metric in METRICS if f"{name}.{metric}" in metrics]
    return (main.get(name) or measured_metrics)[0]


def cost_of(recipe: dict[str, Any], manifest: dict[str, Any]) -> Cost:
    """Updates, passes (one forward and one backward of the whole model) and seconds, from a run's
    manifest.
    """
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
        seconds=manifest["stages"].get("train", {"seconds": 0.0})[
            "seconds"
        ],  # an external graph has no training
    )


def arm_and_runs(text: str) -> tuple[str | None, list[Path]]:
    """Parse `ARM=RUN` or `RUN` (arm None); the runs are a run directory or those of a folder of seeds."""
    arm, equals, folder = text.partition("=")
    named = equals and not Path(text).exists()
    if named and not (arm and folder):
        raise UsageError(f"{text!r} is not of the form ARM=RUN", fix="such as lsq=runs/lsq/latest")
    path = Path(folder if named else text)
    runs = [path]
    if (path / "seeds.json").is_file():
        runs = [path / f"seed-{seed}" for seed in read_object(path / "seeds.json").get("verdicts", {})]
    return (arm if named else None), runs
