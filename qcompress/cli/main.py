"""The command line: parses arguments, calls the API, prints, sets the exit code.

Exit codes: 0 accept, or a smoke run that ran to its end; 1 unexpected error; 2 wrong usage or recipe; 3
regression; 4 anomalous; 5 lint, export or build failed; 6 the machine lacks what the command requires; 7 the
directory is in use by another run; 130, 143 or 129 interrupted. Results go to stdout, everything else to
stderr.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli import deploy, gate, init_command, sensitivity
from qcompress.cli import report as cli_report
from qcompress.cli.arguments import (
    AsJson,
    Cache,
    HardwareLevel,
    OnnxFile,
    Out,
    Profiles,
    RecipeFile,
    RunFolder,
    Set,
    TargetName,
    TimingCache,
    VersionCompatible,
)
from qcompress.cli.completion import words
from qcompress.cli.listing import LISTS, lines
from qcompress.cli.terminal import console, errors, print_json, refresh_report, report_run
from qcompress.errors import ExportError, RecipeError, UsageError
from qcompress.schema.stages import ROWS, STAGES
from qcompress.system.printable import Guard, say, show_block

if TYPE_CHECKING:
    from qcompress.pipeline.run import Run

app = typer.Typer(
    name="qcompress",
    help="From a float model to a quantized TensorRT engine that provably is the same model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.command()(init_command.init)
app.command()(init_command.schema)
app.command()(gate.gate)
app.command()(sensitivity.sensitivity)
app.command()(cli_report.report)
app.add_typer(gate.baseline)
app.command()(deploy.bundle)
app.command()(deploy.doctor)


def main() -> None:
    """Entry point of the `qcompress` command."""
    # waiting threads that spin slow a shared machine down many times; torch reads this variable once
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.stdout, sys.stderr = (
        Guard(sys.stdout),
        Guard(sys.stderr),
    )  # until exit, so that tracebacks are printed safely too
    app()


@app.command()
def run(
    recipe: RecipeFile,
    out: Out = Path("runs"),
    cache: Cache = None,
    overrides: Set = None,
    until: Annotated[
        str, typer.Option(help=f"Last stage: {', '.join(STAGES)}.", autocompletion=words(STAGES))
    ] = "gate",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Copy a stage's whole folder into the run.", autocompletion=words(STAGES)),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make every stage again.")] = False,
    check_cache: Annotated[
        bool, typer.Option("--check-cache", help="Read every file of the cache against its digest.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run every stage on two blocks and little data; judges nothing.")
    ] = False,
    seeds: Annotated[str | None, typer.Option(help="Once for each seed: 0,1,2.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe, from the float model to a verdict. Finished stages are reused, killed ones resumed."""
    with errors(resume=shlex.join(["qcompress", *sys.argv[1:]])):
        from qcompress import api
        from qcompress.report.html.subprocess_writer import write_beside
        from qcompress.report.show_table import print_run, summary
        from qcompress.system.reporter import Reporter
        from qcompress.verdict.judge import exit_code

        for stage in (until, *(keep or ())):
            if stage not in STAGES:
                raise UsageError(f"unknown stage {stage!r}", fix=f"choose one of {', '.join(STAGES)}")
        options = {"cache": cache, "overrides": overrides or (), "fresh": fresh, "keep": keep or ()}
        options |= {"smoke": smoke, "check_cache": check_cache, "reporter": Reporter()}
        if seeds is not None:
            if until != "gate":
                raise UsageError("--seeds compares verdicts, and --until ends before them", fix="drop one")
            _run_seeds(recipe, out, seeds, options, as_json)
        result = api.run(recipe, out, until=until, **options)
        if not result.first:
            raise typer.Exit(exit_code(result.verdict) if until == "gate" else 0)
        if until != "gate":
            _finish_early(result, as_json)
            return
        write_beside(result.path, options["reporter"].say)
        loaded = api.load(result.path)
        if as_json:
            print_json(summary(loaded))
        else:
            print_run(console(), loaded)
        raise typer.Exit(exit_code(result.verdict))


def _run_seeds(recipe: Path, out: Path, seeds: str, options: dict[str, Any], as_json: bool) -> None:
    from qcompress import api
    from qcompress.report.html.subprocess_writer import write_beside
    from qcompress.report.seeds import seeds_table
    from qcompress.verdict.judge import exit_code

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {seeds!r} is not a list of numbers", fix="--seeds 0,1,2") from None
    folder, summary_of_seeds, first = api.run_seeds(recipe, numbers, out, **options)
    if not first:
        raise typer.Exit(exit_code(summary_of_seeds["verdict"]))
    for seed in summary_of_seeds["verdicts"]:
        write_beside(folder / f"seed-{seed}", options["reporter"].say)
    if as_json:
        print_json({"path": str(folder), **summary_of_seeds})
    else:
        console().print(seeds_table(summary_of_seeds))
        for seed, verdict in summary_of_seeds["verdicts"].items():
            say(f"seed {seed}: {verdict}")
        say(f"{summary_of_seeds['verdict']}  {summary_of_seeds['recipe']}  {folder}")
    raise typer.Exit(exit_code(summary_of_seeds["verdict"]))


def _finish_early(result: "Run", as_json: bool) -> None:
    stages = {step.stage: {"path": str(step.path), "reused": step.reused} for step in result.steps}
    if as_json:
        print_json({"path": str(result.path), "verdict": result.verdict, "stages": stages})
    else:
        say(f"{result.verdict}  {result.path.parent.name}  {result.path}")


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Set = None,
    out: Out = Path("runs"),
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Check a recipe against its model and its target, in seconds and without training."""
    with errors():
        from qcompress.pipeline import keys
        from qcompress.pipeline import run as pipeline
        from qcompress.pipeline.stages.load import locate
        from qcompress.recipe.check import all_mistakes
        from qcompress.report.check_table import check_json, print_check

        resolved, report, mistakes = all_mistakes(recipe, overrides or ())
        if not mistakes and resolved is not None and report is None:
            directory = locate(resolved.recipe.model, resolved.base)
            resolved, report, mistakes = all_mistakes(recipe, overrides or (), directory)
        if mistakes:
            if as_json:
                fields = ("file", "line", "key", "message", "fix")
                print_json(
                    {"mistakes": [{name: getattr(item, name) for name in fields} for item in mistakes]}
                )
            raise RecipeError(mistakes)
        reuse = pipeline.reuse(keys.prepare(resolved, report=report), cache or out / ".cache")
        if as_json:
            print_json(check_json(resolved, report, reuse))
        else:
            print_check(console(), resolved, report, reuse)


@app.command()
def show(folder: RunFolder, as_json: AsJson = False) -> None:
    """Show a run's ladder and verdict."""
    with errors():
        from qcompress.report.show_table import print_run, summary
        from qcompress.verdict.run_directory import load

        loaded = load(folder)
        if as_json:
            print_json(summary(loaded))
        else:
            print_run(console(), loaded)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Runs or folders of seeds; ARM=RUN names an arm.", show_default=False)
    ],
    row: Annotated[str, typer.Option(help="Row of the ladder.", autocompletion=words(ROWS))] = "onnx",
    metric: Annotated[
        str | None, typer.Option(help="set.metric; default: the task's first.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="An arm; default: the first.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare arms: mean, spread, paired differences with intervals, detectable differences, and cost."""
    with errors():
        from qcompress import api
        from qcompress.report.compare_table import print_comparison

        comparison = api.compare(runs, row=row, metric=metric, baseline=baseline)
        if as_json:
            print_json(comparison)
        else:
            print_comparison(console(), comparison)


@app.command()
def verify(
    folder: RunFolder,
    engine: Annotated[
        Path | None, typer.Option(help="engine.json from the device.", show_default=False)
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Compare layer by layer instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run again from its files, or import a measurement made on the device."""
    with errors():
        from qcompress import api
        from qcompress.report.layers import print_layers
        from qcompress.system.reporter import Reporter
        from qcompress.verdict.judge import exit_code

        if layers:
            if engine is not None:
                raise UsageError(
                    "--layers compares files of this run, not an engine", fix="drop one of the two"
                )
            layerwise = api.compare_layers(folder, reporter=Reporter())
            refresh_report(folder)
            if as_json:
                print_json(layerwise)
            else:
                print_layers(console(), layerwise)
            raise typer.Exit(exit_code("regression" if layerwise["unexplained"] else "accept"))
        verdict = api.verify(folder, engine=engine, reporter=Reporter())
        report_run(folder, verdict["verdict"], as_json)


@app.command()
def lint(
    model: OnnxFile,
    target: TargetName,
    as_json: AsJson = False,
    as_sarif: Annotated[bool, typer.Option("--sarif", help="SARIF 2.1.0 on stdout, for code hosts.")] = False,
) -> None:
    """List what TensorRT would refuse or silently change in an ONNX file, without building it."""
    with errors():
        from qcompress.cli import onnx_file
        from qcompress.report.sarif import sarif

        if as_json and as_sarif:
            raise UsageError("--json and --sarif are two documents", fix="drop one of the two")
        findings = onnx_file.lint(model, target)
        if as_sarif:
            print_json(sarif(findings, model, target))
        elif as_json:
            print_json({"target": target, "findings": [finding.to_json() for finding in findings]})
        else:
            for finding in findings:
                say(finding)
            say(f"{len(findings)} finding{'s' if len(findings) != 1 else ''}  {target}  {model}")
        if any(finding.severity == "error" for finding in findings):
            raise typer.Exit(ExportError.exit_code)


@app.command()
def inspect(model: OnnxFile, as_json: AsJson = False) -> None:
    """List what an ONNX file stores: bits, scales and bytes of every weight."""
    with errors():
        from qcompress.cli import onnx_file
        from qcompress.report.inspect_table import print_contents

        contents = onnx_file.inspect(model)
        if as_json:
            print_json(contents)
        else:
            print_contents(console(), contents)


@app.command()
def build(
    model: OnnxFile,
    target: TargetName,
    out: Annotated[Path, typer.Option(help="A new or empty folder.", show_default=False)],
    profiles: Profiles = None,
    version_compatible: VersionCompatible = False,
    hardware_compatibility: HardwareLevel = "none",
    timing_cache: TimingCache = None,
) -> None:
    """Build an engine from any ONNX file with explicit Q/DQ; exit code 6 if this machine cannot."""
    with errors():
        from qcompress.cli import onnx_file
        from qcompress.system.reporter import Reporter

        options = {"version_compatible": version_compatible, "hardware_compatibility": hardware_compatibility}
        options |= {"timing_cache": None if timing_cache is None else str(timing_cache)}
        record = onnx_file.build(model, target, out, profiles, options, Reporter())
        say(f"{record['status']}  {target}  {out}")


@app.command()
def predict(
    folder: RunFolder,
    text: Annotated[
        str,
        typer.Argument(
            help="A prompt, or what to classify or to embed: a text, or the file of an image.",
            show_default=False,
        ),
    ],
    other: Annotated[
        str | None, typer.Argument(help="Second text, as with --pair.", show_default=False)
    ] = None,
    pair: Annotated[str | None, typer.Option(help="Second text, for a task about pairs.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that a language model adds.")] = 32,
    chat: Annotated[
        bool, typer.Option("--chat", help="The text is a question, asked in the model's chat template.")
    ] = False,
) -> None:
    """Continue a text with the run's ONNX file, greedily, or classify it, or an image, or embed texts."""
    with errors():
        from qcompress.cli.predict import answer
        from qcompress.verdict.run_directory import load

        if other is not None and pair is not None:
            raise UsageError("a second text is given twice", fix="drop --pair, or the text after the first")

        print(show_block(answer(load(folder), text, pair if other is None else other, tokens, chat)))


@app.command("list")
def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="methods, axes, formats, models, tasks, targets or recipes.", autocompletion=words(LISTS)
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """List the methods, axes, formats, models, tasks, targets or recipes that are available."""
    with errors():
        if what not in LISTS:
            raise UsageError(f"nothing to list under {what!r}", fix=f"choose one of {', '.join(LISTS)}")
        rows = LISTS[what]()
        if as_json:
            print_json([dict(zip(("name", "about"), row, strict=True)) for row in rows])
            return
        for line in lines(rows):
            say(line)


if __name__ == "__main__":
    main()
