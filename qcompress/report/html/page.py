"""Renders the page: sections through a template that escapes all text of a run, into one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import qcompress
from qcompress.errors import MachineError, UsageError
from qcompress.report.html import (
    comparison_page,
    distributions_section,
    ladder_section,
    provenance_section,
    size_section,
    training_section,
    verdict_section,
)
from qcompress.report.html.evidence import Evidence, evidence
from qcompress.report.html.parts import Section
from qcompress.system.places import demand_place, write_named
from qcompress.verdict.measured import arm_and_runs

NAME = "report.html"


def write_report(runs: Sequence[str], out: Path | None = None) -> Path:
    """Write the page about one run or several (run directories or folders of seeds) and return its file:
    `report.html` in the directory of the single run, in the current directory for several runs, or `out`.

    Raises UsageError if a folder is not a finished run, MachineError if a package is missing.
    """
    folders = [folder for run in runs for folder in _folders(run)]
    alone = len(folders) == 1
    file = out or (folders[0] / NAME if alone else Path(NAME))
    demand_place(file)
    try:
        text = run_page(evidence(folders[0])) if alone else comparison(folders)
    except ModuleNotFoundError as error:
        raise MachineError(
            f"a report needs the package {error.name}", fix=f"pip install {error.name}"
        ) from None
    write_named(file, text)
    return file


def _folders(run: str) -> list[Path]:
    arm, folders = arm_and_runs(run)
    if arm is not None:
        raise UsageError(f"a report has no arms, found {run!r}", fix="drop the name before `=`")
    return folders


def run_page(run: Evidence) -> str:
    """Render the page about one run."""
    against = verdict_section.against(run)
    sections = [
        verdict_section.verdict(run),
        *([against] if against else []),
        ladder_section.ladder(run),
        ladder_section.recovery(run),
        training_section.training(run),
        size_section.layers(run),
        distributions_section.distributions(run),
        size_section.sizes(run),
        provenance_section.cost(run),
        provenance_section.certificate(run),
        provenance_section.manifest(run),
    ]
    return _page(run.loaded.recipe.name, run.verdict.content["verdict"], sections)


def comparison(folders: Sequence[Path]) -> str:
    """Render the page about several runs; the first is the reference."""
    runs = [evidence(folder, place) for place, folder in enumerate(folders)]
    return _page(f"{len(runs)} runs", "", comparison_page.sections(runs))


def _page(title: str, verdict: str, sections: Sequence[Section]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    return template.render(title=title, verdict=verdict, sections=sections, version=qcompress.__version__)
