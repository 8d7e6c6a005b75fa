"""The page itself: sections through a template that escapes whatever a run says, into one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import qcompress
from qcompress.errors import MachineError, UsageError
from qcompress.report.html import distributed, judged, logged, made, rungs, several, weighed
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
    against = judged.against(run)
    sections = [
        judged.verdict(run),
        *([against] if against else []),
        rungs.ladder(run),
        rungs.recovery(run),
        logged.training(run),
        weighed.layers(run),
        distributed.distributions(run),
        weighed.sizes(run),
        made.cost(run),
        made.certificate(run),
        made.manifest(run),
    ]
    return _page(run.loaded.recipe.name, run.verdict.content["verdict"], sections)


def many(folders: Sequence[Path]) -> str:
    """The page of several runs; the first is what the others are compared with."""
    runs = [evidence(folder, place) for place, folder in enumerate(folders)]
    return _page(f"{len(runs)} runs", "", several.sections(runs))


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
