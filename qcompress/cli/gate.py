"""The commands `gate` and `baseline promote`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from qcompress.cli.arguments import AsJson, RunFolder
from qcompress.cli.completion import words
from qcompress.cli.terminal import console, errors, print_json, refresh_report, report_run
from qcompress.errors import UsageError
from qcompress.schema.stages import ROWS
from qcompress.system import strict_json
from qcompress.system.printable import command, say

baseline = typer.Typer(
    name="baseline",
    help="Baselines for comparisons of later runs.",
    no_args_is_help=True,
    add_completion=False,
)

_FILE = {"show_default": False, "dir_okay": False}


def gate(
    candidate: Annotated[Path, typer.Option(help="The run to judge.", show_default=False)],
    baseline: Annotated[
        Path | None,
        typer.Option(help="A run, or a file of `baseline promote`, to judge it against.", show_default=False),
    ] = None,
    goals: Annotated[
        Path | None, typer.Option(help="YAML with a section `gate` in place of the baseline's.", **_FILE)
    ] = None,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML.", **_FILE)] = None,
    code_quality_file: Annotated[
        Path | None, typer.Option("--code-quality", help="Write GitLab's code quality report.", **_FILE)
    ] = None,
    github: Annotated[
        bool, typer.Option("--github", help="Print GitHub's annotations, append to its step summary.")
    ] = False,
    recipe_file: Annotated[
        str, typer.Option("--recipe-file", help="File for annotations, relative to the repository's root.")
    ] = "recipe.yaml",
    as_json: AsJson = False,
) -> None:
    """Judge a run by the goals of its recipe, or against a baseline by the baseline's goals."""
    with errors():
        from qcompress import api
        from qcompress.report.ci_formats import code_quality
        from qcompress.report.gate_table import print_gate
        from qcompress.system.places import demand_place, write_named
        from qcompress.verdict.judge import exit_code
        from qcompress.verdict.junit import junit

        summary = os.environ.get("GITHUB_STEP_SUMMARY") if github else None
        for file in (junit_file, code_quality_file, Path(summary) if summary else None):
            if file is not None:
                demand_place(file)
        if baseline is None:
            if goals is not None:
                raise UsageError("--goals replaces the goals of a baseline", fix="name it with --baseline")
            verdict = api.gate(candidate)
        else:
            verdict = api.gate_against(baseline, candidate, goals=goals)
        name = api.load(candidate).recipe.name
        if junit_file is not None:
            write_named(junit_file, junit(verdict, name))
        if code_quality_file is not None:
            issues = code_quality(verdict, recipe_file)
            write_named(code_quality_file, strict_json.dumps(issues, indent=2, sort_keys=True) + "\n")
        if github:
            _write_github(verdict, name, recipe_file, as_json)
        if baseline is None:
            report_run(candidate, verdict["verdict"], as_json)
        refresh_report(candidate)
        if as_json:
            print_json(verdict)
        else:
            print_gate(console(), verdict)
        raise typer.Exit(exit_code(verdict["verdict"], verdict["on_inconclusive"]))


def _write_github(verdict: dict[str, Any], name: str, recipe_file: str, as_json: bool) -> None:
    """Print annotations to the stream without JSON (GitHub reads both), and append the step summary."""
    from qcompress.report.ci_formats import annotations, step_summary
    from qcompress.system.places import append_whole

    for line in annotations(verdict, recipe_file):
        command(line, stderr=as_json)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        append_whole(Path(summary), step_summary(verdict, name))


@baseline.command()
def promote(
    folder: RunFolder,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("baseline.json"),
    row: Annotated[
        str | None,
        typer.Option(
            help="Row of the ladder; default: the last measured.",
            show_default=False,
            autocompletion=words(ROWS),
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Take a run whose own verdict is not accept.")
    ] = False,
) -> None:
    """Write the baseline for comparisons of later runs: a file small enough to commit, independent of the
    run.
    """
    with errors():
        from qcompress import api

        snapshot = api.promote(folder, out, row=row, force=force)
        say(f"{snapshot.recipe}, row {snapshot.row}: {out}, {out.stat().st_size / 1000:.0f} kB")
        if not snapshot.goals.regression:
            from qcompress.verdict.baseline.decide import BEGIN, lacking, suggestion

            refused = f"`gate --baseline {out}` will end with exit code 2"
            say(f"warning: {lacking(snapshot)}: {refused}", stderr=True)
            say(f"  fix: {BEGIN}:\n{suggestion(snapshot)}", stderr=True)
