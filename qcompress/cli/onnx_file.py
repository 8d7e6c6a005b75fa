"""Commands on any ONNX file: lint, inspect, build. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qcompress.errors import UsageError
from qcompress.schema.recipe import Build
from qcompress.system.artifacts import read_json
from qcompress.system.places import demand_place
from qcompress.system.reporter import Reporter

if TYPE_CHECKING:
    from qcompress.graph.lint.lint import Finding


def _existing(model: Path) -> Path:
    """Return the path; raises UsageError if it is not a file."""
    if not model.is_file():
        what = "is a folder" if model.is_dir() else "does not exist"
        raise UsageError(f"{model} {what}", fix="name an ONNX file")
    return model


def lint(model: Path, target: str) -> list[Finding]:
    """Findings on what a target would refuse or silently change in an ONNX file."""
    from qcompress.graph.lint.lint import lint as find
    from qcompress.schema.targets import find_target

    return find(_existing(model), find_target(target))


def inspect(model: Path) -> dict[str, Any]:
    """Stored bits, scales and bytes of each weight of an ONNX file (document: `graph/inspect.py`)."""
    from qcompress.graph.inspect import contents

    return contents(_existing(model))


def build(
    model: Path, target: str, out: Path, profiles: str | None, options: dict[str, Any], reporter: Reporter
) -> dict[str, Any]:
    """Build an engine from an ONNX file and return build.json. `out` must be a new or empty folder.

    `profiles` is JSON, `options` are other keys of a recipe's section `build`.
    """
    from qcompress.pipeline.stages.build import build_file

    _existing(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder", fix="name a new one")
    demand_place(out, folder=True)
    values: dict[str, Any] = {"target": target, "here": "required", **options}
    if profiles is not None:
        try:
            values["profiles"] = json.loads(profiles)
        except ValueError as error:
            raise UsageError(f"--profiles is not JSON: {error}") from None
    try:
        checked = Build.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        name, _, inside = where.replace("_", "-").partition(".")
        raise UsageError(f"--{name}: {inside + ': ' if inside else ''}{first['msg']}") from None
    out.mkdir(parents=True, exist_ok=True)
    with reporter.bar("build", 100) as bar:
        engine = build_file(model, checked, out, lambda what, share: bar.at(what, round(100 * share)))
    record = read_json(engine.path / "build.json")
    for warning in record["warnings"]:
        reporter.say(f"build: {warning}")
    return record
