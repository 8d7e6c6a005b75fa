"""The linter: applies all rules to an ONNX file. No torch, no TensorRT."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from qcompress.errors import ExportError
from qcompress.graph.lint.rules import RULES
from qcompress.graph.view import read
from qcompress.schema.targets import Target


@dataclass(frozen=True)
class Finding:
    """One violation of one rule."""

    rule: str
    severity: Literal["error", "warning"]
    """error: TensorRT refuses the graph or computes other results; warning: the engine is slow."""
    layer: str
    """Name of a stored weight or of a node, or `(graph)`."""
    found: str
    consequence: Literal["refused", "changed", "slow"]
    fix: str

    def to_json(self) -> dict[str, str]:
        """JSON values, as in lint.json."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.severity} {self.rule} {self.layer}: {self.found} ({self.consequence}); {self.fix}"


def severity_of(consequence: Literal["refused", "changed", "slow"]) -> Literal["error", "warning"]:
    """Severity of a consequence: `slow` is a warning, `refused` and `changed` are errors."""
    return "warning" if consequence == "slow" else "error"


def lint(file: Path, target: Target) -> list[Finding]:
    """Check an ONNX file against all rules, in their order. Reads scales and zero points, but not weights."""
    view = read(file)
    return [
        Finding(
            rule=rule.id,
            severity=severity_of(rule.consequence),
            layer=broken.layer,
            found=broken.found,
            consequence=rule.consequence,
            fix=rule.fix,
        )
        for rule in RULES
        for broken in rule.check(view, target)
    ]


def refuse_errors(findings: list[Finding], target: str, graph: str) -> None:
    """Raise ExportError that lists the findings of severity `error`; `graph` names the graph."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        lines = "\n".join(f"  {finding}" for finding in errors)
        raise ExportError(
            f"{target} would refuse or change {graph}:\n{lines}", fix="apply the fix at the end of each line"
        )
