"""The page itself: sections through a template that escapes whatever a run says, into one file."""

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
    """Write the page of one run, or of several beside each other (run directories or folders of seeds);
    returns the file: `report.html` in the run's directory, of several runs in the current one, unless `out`
    names it.

    Raises UsageError for what is no finished run, MachineError where a package is missing.
    """
    folders = [folder for run in runs for folder in _folders(run)]
    alone = len(folders) == 1
    file = out or (folders[0] / NAME if alone else Path(NAME))
    demand_place(file)
    try:
        text = one(evidence(folders[0])) if alone else many(folders)
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


def one(run: Evidence) -> str:
    """The page of one run."""
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


def many(folders: Sequence[Path]) -> str:
    """The page of several runs; the first is what the others are compared with."""
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
