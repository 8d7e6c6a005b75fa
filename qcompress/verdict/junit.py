"""JUnit XML of a verdict, for CI servers: one test case for each goal. No torch.

A broken goal is a failure, an anomaly an error; a row that was not measured is skipped, and so is an
inconclusive goal if inconclusive passes.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from qcompress.system.printable import show

FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not allow."""


def junit(verdict: dict[str, Any], name: str) -> str:
    """JUnit XML of a verdict.json or gate.json, for a recipe of this name."""
    suite = ElementTree.Element("testsuite", name=_clean(f"qcompress {name}"))
    failures = errors = skipped = 0
    passes = verdict.get("on_inconclusive") == "pass"
    for goal in verdict["goals"]:
        case = _case(suite, name, f"{goal['metric']} {_limits(goal['goal'])}")
        if goal["passed"]:
            continue
        text = f"{goal['value']:.6g}" + (
            f" against {goal['baseline']:.6g}" if goal["baseline"] is not None else ""
        )
        if goal.get("outcome") == "inconclusive" and passes:
            skipped += 1
            ElementTree.SubElement(case, "skipped", message=_clean(f"inconclusive: {text}"))
            continue
        failures += 1
        kind = goal.get("outcome", "fail")
        ElementTree.SubElement(case, "failure", type=kind, message=_clean(f"{kind}: {text}"))
    for stage in verdict.get("not_measured", ()):
        skipped += 1
        ElementTree.SubElement(_case(suite, name, f"row {stage}"), "skipped", message="not measured")
    case = _case(suite, name, "verdict")
    if verdict["verdict"] == "unjudged":
        skipped += 1
        ElementTree.SubElement(case, "skipped", message=_clean("; ".join(verdict["reasons"])))
    if verdict["verdict"] == "anomalous":
        errors += 1
        problem = ElementTree.SubElement(
            case, "error", type="anomalous", message="the measurement cannot be trusted"
        )
        problem.text = "\n".join(map(_clean, verdict["reasons"]))
    elif verdict["verdict"] == "regression" or verdict["verdict"] == "inconclusive" and not passes:
        failures += 1
        problem = ElementTree.SubElement(case, "failure", type=verdict["verdict"], message=verdict["verdict"])
        problem.text = "\n".join(map(_clean, verdict["reasons"]))
    counts = {"tests": len(suite), "failures": failures, "errors": errors, "skipped": skipped}
    for element in (suite, root := ElementTree.Element("testsuites")):
        for key, value in counts.items():
            element.set(key, str(value))
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, recipe: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=_clean(f"qcompress.{recipe}"), name=_clean(name)
    )


def _limits(goal: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in goal.items())


def _clean(text: str) -> str:
    return FORBIDDEN.sub("?", show(text))
