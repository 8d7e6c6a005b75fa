"""Python API: `qcompress.run`, `load`, `verify`, `gate`. The command line uses these functions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import ExportError, IncomparableError, UsageError
from qcompress.graph.external import REASON, check_unchanged
from qcompress.pipeline import run as pipeline
from qcompress.pipeline.smoke import smoke as shorten
from qcompress.recipe.load import Resolved, load_recipe
from qcompress.report.seeds import summarise
from qcompress.schema import custom
from qcompress.schema.recipe import ROWS
from qcompress.system.artifacts import read_json, sha256_file, write_json
from qcompress.system.places import demand_place
from qcompress.system.reporter import Reporter
from qcompress.system.workspace import point_latest
from qcompress.verdict.judge import judged, verdict_of, write_verdict
from qcompress.verdict.measured import arm_and_runs, measured
from qcompress.verdict.run_directory import LoadedRun, broken, load
from qcompress.verdict.run_files import read_run_samples, record_files

if TYPE_CHECKING:
    from qcompress.parity.inputs import Artifacts
    from qcompress.system.artifacts import FloatModel
    from qcompress.verdict.baseline.snapshot import Snapshot


Classes = Mapping[str, type] | None
"""Custom classes by name."""


def run(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str] = "runs",
    *,
    cache: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    until: str = "gate",
    fresh: bool = False,
    check_cache: bool = False,
    keep: Sequence[str] = (),
    smoke: bool = False,
    quantizers: Classes = None,
    adapters: Classes = None,
    objectives: Classes = None,
    steppers: Classes = None,
    reporter: Reporter | None = None,
) -> pipeline.Run:
    """Run a recipe; returns the run's folder and its verdict.

    `overrides` are `a.b=c` strings, `until` is the last stage, `keep` names stages whose whole folder is
    copied into the run, `check_cache` reads every file of the cache instead of trusting remembered digests,
    `smoke` runs two blocks on little data (`qcompress/pipeline/smoke.py`). `quantizers`,
    `adapters`, `objectives` and `steppers` are custom classes by their names in the recipe
    (`qcompress/schema/custom.py`). Raises RecipeError, ModelError, ExportError, MachineError, UsageError or
    BusyError.
    """
    reporter = reporter or Reporter(silent=True)
    with custom.among(_by_axis(quantizers, adapters, objectives, steppers)):
        resolved, folder, store = _settings(recipe, out, cache, overrides, smoke)
        options = {"fresh": fresh, "check_cache": check_cache, "keep": tuple(keep)}
        return pipeline.run(resolved, folder, store, reporter, until=until, **options)


def _by_axis(*classes: Classes) -> dict[str, Classes]:
    return dict(zip(("quantizer", "adapter", "objective", "stepper"), classes, strict=True))


def run_seeds(
    recipe: str | os.PathLike[str],
    seeds: Sequence[int],
    out: str | os.PathLike[str] = "runs",
    *,
    cache: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    check_cache: bool = False,
    keep: Sequence[str] = (),
    smoke: bool = False,
    quantizers: Classes = None,
    adapters: Classes = None,
    objectives: Classes = None,
    steppers: Classes = None,
    reporter: Reporter | None = None,
) -> tuple[Path, dict[str, Any], bool]:
    """Run a recipe once for each seed, in `seed-N` folders of one parent folder; options as for `run`.

    Returns the parent folder, the content of its seeds.json (verdicts, and mean and standard deviation of
    each metric), and True in the process that prints results (the first one).
    """
    seeds = _checked_seeds(seeds, overrides)
    reporter = reporter or Reporter(silent=True)
    runs: dict[int, LoadedRun] = {}
    for seed in seeds:
        reporter.say(f"seed {seed}")
        seed_overrides = [*overrides, f"seed={seed}"]
        with custom.among(_by_axis(quantizers, adapters, objectives, steppers)):
            resolved, folder, store = _settings(recipe, out, cache, seed_overrides, smoke)
            options = {"fresh": fresh, "check_cache": check_cache, "keep": tuple(keep)}
            result = pipeline.run(resolved, folder, store, reporter, one_of_seeds=True, **options)
        runs[seed] = load(result.path)
    first = runs[seeds[0]]
    summary = summarise(first.recipe.name, {seed: (run.parity, run.verdict) for seed, run in runs.items()})
    if result.first:
        write_json(first.path.parent / "seeds.json", summary)
        if not smoke:
            point_latest(first.path.parent)
    return first.path.parent, summary, result.first


def _checked_seeds(seeds: Sequence[int], overrides: Sequence[str]) -> list[int]:
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds must be different numbers, found {list(seeds)}", fix="--seeds 0,1,2")
    if any(override.split("=")[0].strip() == "seed" for override in overrides):
        raise UsageError("both --seeds and --set seed=... are given", fix="drop one of the two")
    return list(seeds)


def _settings(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    smoke: bool,
) -> tuple[Resolved, Path, Path]:
    """Recipe to run, folder of runs, and cache."""
    resolved, folder = load_recipe(Path(recipe), overrides), Path(out)
    store = Path(cache) if cache is not None else folder / ".cache"
    return (shorten(resolved, store) if smoke else resolved), folder, store


def verify(
    path: str | os.PathLike[str],
    *,
    engine: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure a run again from its files, or import a device's measurement; returns the new verdict.

    The measured ONNX file is the one in the run directory. It is first compared with the folded model bit for
    bit: a changed file raises ExportError, which names the layer. An external graph has no folded model; the
    digests of its files must be unchanged.
    """
    loaded = load(path)
    if loaded.recipe.export.graph is None:
        write_json(loaded.path / "certificate.json", certify_run(loaded))
        record_files(loaded.path, "certificate.json")
    else:
        check_unchanged(loaded.path)
    reporter = reporter or Reporter(silent=True)
    if engine is not None:
        from qcompress.parity.gpu import take_engine_row

        read_run_samples(loaded.path / "samples.json.gz")
        take_engine_row(loaded.path, loaded.recipe.task, Path(engine))
        record_files(loaded.path, "parity.json", "samples.json.gz")
    else:
        _measure_again(loaded, reporter)
    return _judged_again(path)


def certify_run(loaded: LoadedRun) -> dict[str, Any]:
    """Compare the run's ONNX file with its folded model and return the certificate; needs the cache."""
    from qcompress.graph.certificate.points import certify_all
    from qcompress.models.plan import plans_from_json, points_from_json

    folded = loaded.checked_stage("fold")
    if loaded.recipe.export.graph is not None:
        raise UsageError(
            f"{loaded.path}: {REASON}, so it has no folded model to compare with",
            fix="drop --layers",
        )
    if folded is None:
        raise UsageError(
            f"the folded model of {loaded.path} is gone from the cache",
            fix="run the recipe again: finished stages are reused",
        )
    facts = read_json(folded / "folded.json")
    plan, points = plans_from_json(facts["plan"]), points_from_json(facts.get("points", []))
    certificate = certify_all(loaded.path / "model.onnx", folded, plan, points)
    if not certificate["complete"]:
        broken = "\n".join(
            f"  {item['name']}: {'; '.join(item['reasons'])}"
            for item in (*certificate["layers"], *certificate["points"])
            if not item["passed"]
        )
        raise ExportError(
            f"{loaded.path / 'model.onnx'} is not what was folded:\n{broken or certificate['float_copies']}",
            fix="run the recipe again to put the exported file back",
        )
    return certificate


def compare_layers(path: str | os.PathLike[str], *, reporter: Reporter | None = None) -> dict[str, Any]:
    """Compare trained, folded and ONNX model layer by layer; writes layers.json into the run and
    returns it.
    """
    loaded = load(path)
    certify_run(loaded)
    from qcompress.parity.layerwise import compare_layers as compare

    reporter = reporter or Reporter(silent=True)
    base = Path(loaded.manifest["base"])
    layerwise = compare(loaded.recipe, base, _artifacts(loaded), loaded.path, reporter)
    record_files(loaded.path, "layers.json")
    return layerwise


def compare(
    runs: Sequence[str | os.PathLike[str]],
    *,
    row: str = "onnx",
    metric: str | None = None,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Compare runs, aligned by task, seed and sample (document: `verdict/compare.py`).

    Each of `runs` is a run directory or a folder of seeds, optionally as `ARM=RUN`; by default the arm is the
    recipe's name. `metric` is `set.metric`, `metric` (of the first set) or the task's first one; `baseline`
    is an arm, by default the first.
    """
    from qcompress.verdict.compare import compare as compare_measured  # scipy takes most of a second

    if row not in ROWS:
        raise UsageError(f"unknown row {row!r}", fix=f"choose one of {', '.join(ROWS)}")
    measurements = []
    for run in runs:
        arm, folders = arm_and_runs(os.fspath(run))
        measurements += [measured(load(path), row, arm) for path in folders]
    return compare_measured(measurements, row, metric, baseline)


def report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Path:
    """Write report.html about one run or several (`report/html/page.py`); returns the file."""
    from qcompress.report.html.page import write_report  # scipy takes most of a second

    return write_report([os.fspath(run) for run in runs], None if out is None else Path(out))


def _measure_again(loaded: LoadedRun, reporter: Reporter) -> None:
    import tempfile

    from qcompress.pipeline.stages.verify import verify as measure

    with tempfile.TemporaryDirectory(dir=loaded.path) as folder:
        base = Path(loaded.manifest["base"])
        measure(loaded.recipe, base, _artifacts(loaded), Path(folder), reporter)
        for name in ("parity.json", "samples.json.gz"):
            os.replace(Path(folder) / name, loaded.path / name)
    record_files(loaded.path, "parity.json", "samples.json.gz")


def _artifacts(loaded: LoadedRun) -> Artifacts:
    """Artifacts of a run that are still in the cache; the ONNX file is the one in its directory."""
    from qcompress.parity.inputs import Artifacts
    from qcompress.system.artifacts import Engine, FoldedModel, OnnxModel, TrainedModel

    stages = loaded.checked_stage
    return Artifacts(
        float_model=_float_model(loaded, stages("load")),
        trained=TrainedModel(stages("train")) if stages("train") else None,
        folded=FoldedModel(stages("fold")) if stages("fold") else None,
        onnx=OnnxModel(loaded.path),
        engine=Engine(stages("build")) if stages("build") else None,
        missing=dict.fromkeys(("trained", "folded"), REASON) if loaded.recipe.export.graph else {},
    )


def _float_model(loaded: LoadedRun, folder: Path | None) -> FloatModel | None:
    """Checkpoint of a run if it still exists; raises IncomparableError if it has changed."""
    from qcompress.system.artifacts import FloatModel

    model = FloatModel.of(folder, "", Path(loaded.manifest["source"])) if folder else None
    if model is None or not model.source.is_dir():
        return None
    if model.source != folder:
        for name, digest in read_json(folder / "float.json")["files"].items():
            file = model.source / name
            if not file.is_file() or sha256_file(file) != digest:
                raise IncomparableError(
                    f"{file} is not the file that this run was made from",
                    fix="put the checkpoint back, or run the recipe again",
                )
    return model


def gate(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Judge a run's parity.json by the goals of its recipe; writes verdict.json and junit.xml, returns the
    verdict. Raises UsageError for a smoke run.
    """
    loaded = load(path)
    loaded.demand_whole()
    if wrong := list(broken(loaded.path, loaded.parity)):
        raise IncomparableError(f"{path}: {'; '.join(wrong)}", fix="run the recipe again")
    return _judged_again(path)


def _judged_again(path: str | os.PathLike[str]) -> dict[str, Any]:
    loaded = load(path)
    verdict = verdict_of(loaded.parity, loaded.recipe, loaded.smoke)
    write_verdict(loaded.path, verdict, loaded.recipe.name)
    record_files(loaded.path, "verdict.json", "junit.xml")
    return verdict


def gate_against(
    baseline: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    *,
    goals: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Judge a run against a baseline (a run, or a file of `promote`) by the baseline's goals, or by those of
    a YAML file; writes gate.json into the candidate and returns it (document: `verdict/baseline/decide.py`).

    Raises UsageError if a path is not a run or states no goals, IncomparableError if the run was not
    measured.
    """
    from qcompress.verdict.baseline.decide import decide  # scipy takes most of a second
    from qcompress.verdict.baseline.goals import read_goals
    from qcompress.verdict.baseline.snapshot import read_snapshot

    given = read_goals(Path(goals)) if goals is not None else None
    before = read_snapshot(Path(baseline))
    after = read_snapshot(Path(candidate), before.row)
    verdict = decide(before, after, given)
    write_json(Path(candidate) / "gate.json", verdict)
    record_files(Path(candidate), "gate.json")
    return verdict


def promote(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, row: str | None = None, force: bool = False
) -> Snapshot:
    """Write the baseline for comparisons of later runs. A run that was not accepted is refused unless
    `force`: a broken baseline would accept every candidate that is not worse.
    """
    from qcompress.verdict.baseline.snapshot import read_snapshot
    from qcompress.verdict.baseline.write import write_baseline

    loaded = load(path)
    loaded.demand_whole()
    verdict = judged(loaded)["verdict"]
    if verdict != "accept" and not force:
        raise UsageError(
            f"{path} ended with {verdict}, and a run worse than it could pass",
            fix="fix the run, or pass --force",
        )
    demand_place(Path(out))
    snapshot = read_snapshot(Path(path), row)
    if snapshot.broken:
        raise IncomparableError(f"{path}: {'; '.join(snapshot.broken)}", fix="run the recipe again")
    write_baseline(snapshot, Path(out))
    return snapshot


def sensitivity(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str] = "runs",
    *,
    cache: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    formats: Sequence[str] = ("int8", "int4"),
    samples: int = 64,
    fresh: int | None = None,
    seed: int | None = None,
    max_bytes: int | None = None,
    max_cost: float | None = None,
    as_small_as: str | None = None,
    controls: Sequence[str] = (),
    wins: bool = True,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure the cost of rounding each layer in each of `formats` and, with a budget, choose the mixture
    that fits it; writes sensitivity.json (`qcompress/pipeline/sensitivity/study.py`) and returns it.

    A budget is one of `max_bytes`, `max_cost` in nats, and `as_small_as`, a uniform format; `controls` are
    other costs that choose mixtures of equal bytes. `fresh` is the number of held-out samples that judge the
    mixtures, by default as many as choose.
    """
    from qcompress.pipeline.sensitivity.calibrated import Place
    from qcompress.pipeline.sensitivity.sampling import Sampling
    from qcompress.pipeline.sensitivity.study import budget_of
    from qcompress.pipeline.sensitivity.study import sensitivity as measure

    budget = budget_of(max_bytes, max_cost, as_small_as)
    resolved, folder, store = _settings(recipe, out, cache, overrides, smoke=False)
    place = Place(folder, store, reporter or Reporter(silent=True))
    sampling = Sampling(samples, fresh or samples, seed)
    return measure(resolved, place, sampling, formats, budget, controls, wins)
