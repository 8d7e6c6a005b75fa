"""Gate verdicts in the formats of code hosts: GitHub annotations and step summary, GitLab code quality. No
torch.

Sources: GitHub, "Workflow commands for GitHub Actions" (escapes of data and of properties); GitLab, "Code
Quality", section "Code Quality report format".
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from qcompress.system.printable import show, show_block

SEVERITY = {"anomalous": "critical", "regression": "major", "inconclusive": "minor"}
"""GitLab severity of each verdict other than `accept`."""


def annotations(verdict: dict[str, Any], recipe: str) -> list[str]:
    """GitHub workflow commands: one for each reason, attached to the recipe's file; a notice if the verdict
    is accept.
    """
    title = _property(f"qcompress gate: {verdict['verdict']}")
    where = f"file={_property(recipe)},title={title}"
    passes = verdict["verdict"] == "inconclusive" and verdict.get("on_inconclusive") == "pass"
    if verdict["verdict"] == "accept":
        return [f"::notice {where}::{_data('every goal holds')}"]
    level = "warning" if passes else "error"
    return [f"::{level} {where}::{_data(reason)}" for reason in verdict["reasons"]]


def _data(text: str) -> str:
    ended = text.replace("\r\n", "\n").replace("\r", "\n")
    escaped = re.sub(r"##(\w*)\[", r"##\1\\x5b", show_block(ended))  # a command of Azure and of older runners
    return escaped.replace("%", "%25").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def step_summary(verdict: dict[str, Any], name: str) -> str:
    """GitHub step summary in Markdown: verdict, reasons, and one row for each goal against the baseline."""
    lines = [f"### qcompress gate: {verdict['verdict']} ({_cell(name)})", ""]
    lines += [f"- {_cell(reason)}" for reason in verdict["reasons"]] + [""] * bool(verdict["reasons"])
    lines += ["| goal | baseline | candidate | loss | interval | could have seen | outcome |",
              "|---|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    for goal in verdict["goals"]:
        if "outcome" not in goal:
            continue
        low, high = goal["interval"] or (None, None)
        cells = [
            f"{goal['metric']} ({', '.join(f'{key} {value:g}' for key, value in goal['goal'].items())})",
            f"{goal['baseline']:.5g}",
            f"{goal['value']:.5g}",
            f"{goal['loss']:+.3g}",
            "-" if low is None else f"{low:+.3g} to {high:+.3g}",
            "-" if goal["detectable"] is None else f"{goal['detectable']:.2g}",
            goal["outcome"],
        ]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Escape text for a Markdown cell or list item: pipes, markup, links, mentions and line ends
    stay text.
    """
    escaped = re.sub(r"[\\`*_|\[\]~$]", r"\\\g<0>", show(text)).replace("&", "&amp;")
    escaped = escaped.replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;").replace("#", "&#35;")
    return re.sub(r"(?i)\bwww\.", "www&#46;", escaped.replace("://", "&#58;//"))


def code_quality(verdict: dict[str, Any], recipe: str) -> list[dict[str, Any]]:
    """GitLab code quality report: one issue for each reason, on the first line of the recipe. The fingerprint
    depends on recipe and reason only, so that a merge request shows which issues are new.
    """
    if verdict["verdict"] == "accept":
        return []
    return [
        {
            "description": show(reason),
            "check_name": f"qcompress-{verdict['verdict']}",
            "fingerprint": hashlib.sha256(f"{show(recipe)}\0{show(reason)}".encode()).hexdigest(),
            "severity": SEVERITY[verdict["verdict"]],
            "location": {"path": show(recipe), "lines": {"begin": 1}},
        }
        for reason in verdict["reasons"]
    ]
