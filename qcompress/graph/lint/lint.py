"""The linter: every place of an ONNX file that breaks a rule. No torch, no TensorRT."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from qcompress.graph.lint.rules import RULES
from qcompress.graph.view import read
from qcompress.schema.targets import Target


@dataclass(frozen=True)
class Finding:
    """One place that breaks one rule."""

    rule: str
    severity: Literal["error", "warning"]
    """error: TensorRT refuses the graph, or computes something else; warning: it runs slowly."""
    layer: str
    """Name of a stored weight, of a node, or `(graph)`."""
    found: str
    consequence: Literal["refused", "changed", "slow"]
    fix: str

    def to_json(self) -> dict[str, str]:
        """Plain values, as they stand in lint.json."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.severity} {self.rule} {self.layer}: {self.found} ({self.consequence}); {self.fix}"


def severity_of(consequence: Literal["refused", "changed", "slow"]) -> Literal["error", "warning"]:
    """What runs slowly is a warning; what is refused or computes something else is an error."""
    return "warning" if consequence == "slow" else "error"


def lint(file: Path, target: Target) -> list[Finding]:
    """Hold an ONNX file against every rule, in their order. Reads scales and zero points, no weights."""
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
