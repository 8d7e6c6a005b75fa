"""READ FIRST. Runs the seven stages of a recipe in order.

    load -> train -> fold -> export -> build -> verify -> gate

Each stage is a function that fills a folder. `Workspace.step` runs it only if the cache has no folder for its
key, which `keys.py` computes from everything that the stage depends on. Torch is imported when a stage that
needs it actually runs, so a run that reuses all stages never imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import qcompress
from qcompress.errors import UsageError, package_missing
from qcompress.graph.external import REASON, adopt
from qcompress.pipeline.key_scope import versions_of
from qcompress.pipeline.keys import Plan, inputs_of, parts, prepare, provenance, run_key, stages_of
from qcompress.pipeline.stages.load import load
from qcompress.pipeline.tracking import tracking
from qcompress.recipe.check import head_of
from qcompress.recipe.load import RESOLVED, Resolved, dump_recipe
from qcompress.schema.custom import active
from qcompress.schema.recipe import STAGES, Build
from qcompress.system.artifacts import (
    Engine,
    FloatModel,
    FoldedModel,
    OnnxModel,
    TrainedModel,
    read_json,
    write_json,
    write_text,
)
from qcompress.system.collector import paused
from qcompress.system.distributed import Processes, join
from qcompress.system.fingerprint import stage_key
from qcompress.system.gpu import device_kind
from qcompress.system.host import describe_host
from qcompress.system.memory import Allocations, demand_libraries, stage_bytes
from qcompress.system.placed import forget, record
from qcompress.system.reporter import Reporter
from qcompress.system.workspace import NEVER, Step, Workspace, has_entries, point_latest, would_reuse
from qcompress.tasks import TASKS
from qcompress.training import history

PLACE: dict[str, dict[str, str]] = {
    "load": {},
    "train": {"distributions.json": "distributions.json"},
    "fold": {},
    "export": {
        "model.onnx*": "./",
        "lint.json": "lint.json",
        "certificate.json": "certificate.json",
        "sizes.json": "sizes.json",
        "config.json": "config.json",
        "preprocessor_config.json": "preprocessor_config.json",
        "tokenizer*": "./",
        "vocab*": "./",
        "merges.txt": "merges.txt",
        "special_tokens_map.json": "special_tokens_map.json",
        "chat_template.jinja": "chat_template.jinja",
    },
    "build": {"build.json": "engine/build.json", "model.plan": "engine/model.plan"},
    "verify": {"parity.json": "parity.json", "samples.json.gz": "samples.json.gz", "probe": "probe"},
    "gate": {"verdict.json": "verdict.json", "junit.xml": "junit.xml"},
}
"""Files of a stage's folder that appear in the run directory."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its verdict, and its steps."""

    path: Path
    verdict: str
    steps: tuple[Step, ...]
    first: bool = True
    """False in a process other than the first, which prints nothing."""


def run(
    resolved: Resolved,
    out: Path,
    cache: Path,
    reporter: Reporter,
    *,
    until: str = "gate",
    fresh: bool = False,
    keep: tuple[str, ...] = (),
    one_of_seeds: bool = False,
    check_cache: bool = False,
) -> Run:
    """Run the recipe's stages up to `until`, reusing finished ones. With several processes, the first one
    does this and the others take part in training.

    `one_of_seeds`: the run's folder is `seed-N` inside a folder that all seeds of the recipe share. `latest`
    points to a run with a verdict; with seeds, the caller moves it when all of them have one. `check_cache`:
    see `Workspace`. Raises UsageError for a stage that the recipe does not have.
    """
    stages = stages_of(resolved.recipe)
    for stage in (until, *(name for name in keep if name in STAGES)):
        if stage not in stages:
            raise UsageError(
                f"stage {stage} does not run for `export.graph`, an external graph",
                fix=f"name one of {', '.join(stages)}",
            )
    plan = prepare(resolved)
    processes = join(cpu=resolved.recipe.train.device == "cpu" or device_kind("auto") == "cpu")
    if not processes.first:
        return _follow(plan, processes)
    steps: dict[str, Step] = {}
    maker = _Maker(plan, steps, reporter, processes)
    options = {"fresh": fresh, "check_cache": check_cache, "log": reporter.say}
    with Workspace(out, cache, plan.recipe.name, run_key(plan, one_of_seeds), **options) as workspace:
        folder = workspace.run_dir
        write_text(folder / RESOLVED, dump_recipe(plan.recipe))
        forget(folder, "manifest.json", "log.jsonl")  # written by an earlier run in this folder
        record(folder, RESOLVED)
        reporter.log_to(folder / "log.jsonl")
        with tracking(plan.recipe, folder, reporter):
            for stage in stages[: stages.index(until) + 1]:
                place = dict(PLACE[stage])
                if stage == "fold" and plan.recipe.format.is_float:
                    place["folded.safetensors"] = "model.safetensors"  # a checkpoint for `model: {run: ...}`
                if stage in keep:
                    place["*"] = f"{stage}/"
                reporter.stage(stage)
                make = partial(maker.make, stage)
                steps[stage] = workspace.step(stage, parts(plan, stage, steps), make, place=place)
                _record(steps[stage], reporter)
        write_json(folder / "manifest.json", _manifest(plan, steps))
        record(folder, "manifest.json", "log.jsonl")
        verdict = read_json(folder / "verdict.json")["verdict"] if "gate" in steps else "unfinished"
        if "gate" in steps and not one_of_seeds and not resolved.smoke:
            point_latest(folder)
        processes.agree({"run": (folder, verdict)})
        return Run(folder, verdict, tuple(steps.values()))


def _record(step: Step, reporter: Reporter) -> None:
    """Write a finished stage's records to log.jsonl, equal for new and reused stages."""
    if step.stage == "train" and step.reused:
        reporter.settle(history.read(step.path))
    if step.stage == "verify":
        for row in read_json(step.path / "parity.json")["rows"]:
            if row["status"] == "measured":
                reporter.record(event="metrics", row=row["stage"], metrics=row["metrics"])
    reporter.record(event="finished", stage=step.stage, seconds=round(step.seconds, 3), reused=step.reused)
    if step.stage == "gate":
        verdict = read_json(step.path / "verdict.json")
        reporter.record(event="verdict", verdict=verdict["verdict"], reasons=verdict["reasons"])


def _follow(plan: Plan, processes: Processes) -> Run:
    """Loop of the other processes: take part in training, and return when the first process has finished."""
    while True:
        request = processes.agree(None)
        if "run" in request:
            return Run(*request["run"], (), first=False)
        from qcompress.pipeline.stages.train import train

        report, silent = plan.report, Reporter(silent=True)
        train(request["model"], plan.recipe, plan.resolved.base, report.architecture, report.plan,
              request["out"], silent, processes)  # fmt: skip


@dataclass(frozen=True)
class _Maker:
    """Fills the folders of the stages, one method for each. `steps`: the finished ones."""

    plan: Plan
    steps: Mapping[str, Step]
    reporter: Reporter
    processes: Processes

    def make(self, stage: str, folder: Path) -> None:
        """Fill the folder of a stage."""
        try:
            with Allocations(f"the stage {stage}", lambda: stage_bytes(stage, self.plan.directory)):
                if not self.plan.graph:  # an external graph needs no torch
                    demand_libraries(stage)
                getattr(self, f"_{stage}")(folder)
        except ImportError as error:
            raise package_missing(error, f"the stage {stage}") from None

    def _load(self, folder: Path) -> None:
        plan, recipe = self.plan, self.plan.recipe
        processor = TASKS[recipe.task.name].processor(recipe.task)
        head = head_of(recipe)
        for note in load(recipe.model, plan.directory, plan.digests, folder, head, recipe.seed, processor):
            self.reporter.say(note)

    def _train(self, folder: Path) -> None:
        with paused():
            from qcompress.pipeline.stages.train import train

        plan, report, model = self.plan, self.plan.report, self._float_model()
        self.processes.agree({"model": model, "out": folder})
        train(model, plan.recipe, plan.resolved.base, report.architecture, report.plan, folder,
              self.reporter, self.processes)  # fmt: skip

    def _fold(self, folder: Path) -> None:
        with paused():
            from qcompress.pipeline.stages.fold import fold

        for note in fold(self._float_model(), TrainedModel(self.steps["train"].path), folder):
            self.reporter.say(note)

    def _export(self, folder: Path) -> None:
        recipe = self.plan.recipe
        if self.plan.graph:
            _adopt(self.plan, self.steps["load"].path, folder, self.reporter)
            return
        with paused():
            from qcompress.pipeline.stages.export import export

        folded = FoldedModel(self.steps["fold"].path)
        export(folded, recipe.export, recipe.build.target, provenance(recipe), folder)

    def _build(self, folder: Path) -> None:
        from qcompress.pipeline.stages.build import build

        with self.reporter.bar("build", 100) as bar:
            options = _placed(self.plan.recipe.build, self.plan.resolved.base)
            graph = OnnxModel(self.steps["export"].path)
            build(graph, options, folder, lambda phase, share: bar.at(phase, round(100 * share)))
        for warning in read_json(folder / "build.json")["warnings"]:
            self.reporter.say(f"build: {warning}")

    def _verify(self, folder: Path) -> None:
        with paused():
            from qcompress.parity.inputs import Artifacts
            from qcompress.pipeline.stages.verify import verify

        steps = self.steps
        artifacts = Artifacts(
            float_model=self._float_model(),
            trained=TrainedModel(steps["train"].path) if "train" in steps else None,
            folded=FoldedModel(steps["fold"].path) if "fold" in steps else None,
            onnx=OnnxModel(steps["export"].path),
            engine=Engine(steps["build"].path),
            missing=dict.fromkeys(("trained", "folded"), REASON),
        )
        verify(self.plan.recipe, self.plan.resolved.base, artifacts, folder, self.reporter)

    def _gate(self, folder: Path) -> None:
        from qcompress.pipeline.stages.gate import gate

        gate(self.steps["verify"].path / "parity.json", self.plan.recipe, folder, self.plan.resolved.smoke)

    def _float_model(self) -> FloatModel:
        load = self.steps["load"]
        return FloatModel.of(load.path, load.digest, self.plan.directory)


def _adopt(plan: Plan, checkpoint: Path, out: Path, reporter: Reporter) -> None:
    """Import `export.graph`, checking that its logits have the task's shape."""
    recipe = plan.recipe
    task, config = TASKS[recipe.task.name], read_json(checkpoint / "config.json")
    positions, width = task.logits_of(task.settled(recipe.task, config), config)
    shape = (None, None, width) if positions > 1 else (None, width)
    graph = plan.resolved.base / recipe.export.graph
    for note in adopt(graph, checkpoint, recipe.model.family, recipe.build.target, shape, out):
        reporter.say(note)


def _placed(options: Build, base: Path) -> Build:
    """Build options with timing_cache resolved relative to the recipe."""
    if options.timing_cache is None:
        return options
    return options.model_copy(update={"timing_cache": str(base / options.timing_cache)})


def _manifest(plan: Plan, steps: Mapping[str, Step]) -> dict[str, object]:
    """Provenance of this run: versions, hashes, seeds, host, and the cost of each stage."""
    custom = active().used(plan.recipe)
    return (
        ({"own": custom} if custom else {})
        | ({"smoke": True} if plan.resolved.smoke else {})
        | {
            "recipe": plan.recipe.name,
            "seed": plan.recipe.seed,
            "source": str(plan.directory),
            "base": str(plan.resolved.base),
            "versions": {"qcompress": qcompress.__version__}
            | {
                name: version for stage in STAGES for name, version in versions_of(stage, plan.recipe).items()
            },
            "host": describe_host(),
            "phases": read_json(steps["train"].path / "trained.json")["phases"] if "train" in steps else [],
            "stages": {
                name: {
                    "key": step.key,
                    "path": str(step.path),
                    "digest": step.digest,
                    "reused": step.reused,
                    "seconds": round(step.seconds, 3),
                    "peak_mib": round(step.peak_mib, 1),
                }
                for name, step in steps.items()
            },
        }
    )


def finished(cache: Path, stage: str, parts: Mapping[str, object]) -> Step:
    """Step of a stage that `would_reuse` accepted, without a workspace."""
    key = stage_key(stage, parts)
    path = cache / stage / key
    manifest = read_json(path / "manifest.json")
    cost = {"seconds": manifest["seconds"], "peak_mib": manifest["peak_mib"]}
    return Step(stage, path, manifest["digest"], key, reused=True, parts=dict(parts), **cost)


def reuse(plan: Plan, cache: Path) -> list[tuple[str, bool, str]]:
    """For each stage: its name, whether it would be reused, and if not the reason. All stages after the first
    that runs would run.
    """
    stages: list[tuple[str, bool, str]] = []
    steps: dict[str, Step] = {}
    for stage in stages_of(plan.recipe):
        missing = [name for name in inputs_of(plan.recipe, stage) if name not in steps]
        if missing:
            stages.append((stage, False, f"{missing[0]} runs again"))
            continue
        if not has_entries(cache, stage):
            stages.append((stage, False, NEVER))
            continue
        key_parts = parts(plan, stage, steps)
        reused, reason = would_reuse(cache, stage, key_parts)
        stages.append((stage, reused, reason))
        if reused:
            steps[stage] = finished(cache, stage, key_parts)
    return stages
