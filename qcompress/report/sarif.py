"""Linter findings as SARIF 2.1.0, for code hosts and editors."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import qcompress
from qcompress.graph.lint.lint import Finding, severity_of
from qcompress.graph.lint.rules import RULES
from qcompress.system.printable import show

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif(findings: list[Finding], file: Path, target: str) -> dict[str, Any]:
    """SARIF document of one linter run. Paths below the current directory are relative, as code hosts
    require.
    """
    here = Path.cwd()
    path = file.resolve()
    inside = path.is_relative_to(here)
    uri = quote_from_bytes(os.fsencode(path.relative_to(here))) if inside else path.as_uri()
    places = {rule.id: index for index, rule in enumerate(RULES)}
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "qcompress lint",
                        "semanticVersion": qcompress.__version__,
                        "rules": [
                            {
                                "id": rule.id,
                                "shortDescription": {"text": rule.summary},
                                "help": {"text": rule.fix},
                                "defaultConfiguration": {"level": severity_of(rule.consequence)},
                                "properties": {"consequence": rule.consequence, "evidence": rule.evidence},
                            }
                            for rule in RULES
                        ],
                    }
                },
                "properties": {"target": target},
                "results": [
                    {
                        "ruleId": finding.rule,
                        "ruleIndex": places[finding.rule],
                        "level": finding.severity,
                        "message": {"text": _message(finding)},
                        "locations": [
                            {
                                "physicalLocation": {"artifactLocation": {"uri": uri}},
                                "logicalLocations": [{"name": show(finding.layer), "kind": "object"}],
                            }
                        ],
                        "partialFingerprints": {"layer/v1": show(f"{finding.rule}:{finding.layer}")},
                    }
                    for finding in findings
                ],
            }
        ],
    }


def _message(finding: Finding) -> str:
    """Message text with escaped brackets: SARIF 2.1.0, section 3.11.6, reads `[text](target)` as a link."""
    text = show(f"{finding.layer}: {finding.found}. Fix: {finding.fix}")
    return re.sub(r"[\\\[\]]", r"\\\g<0>", text) if "](" in text else text
