"""Sections on the verdict, its reasons and goals, for the run alone and against a baseline."""

from __future__ import annotations

from typing import Any

from qcompress.report.html.evidence import Evidence
from qcompress.report.html.figures import Document, Figure
from qcompress.report.html.parts import Cell, Section, Table, table
from qcompress.report.ladder import not_measured

OUTCOMES = {True: "kept", False: "broken"}


def verdict(run: Evidence) -> Section:
    """Section with the verdict's reasons and the recipe's goals."""
    reasons = tuple(run.verdict.content["reasons"])
    goals = run.verdict.content["goals"]
    lines = [] if reasons else [f"Every one of {len(goals)} goals holds." if goals else "There was no goal."]
    lines += [f"Not measured: {line}" for line in not_measured(run.parity.content)]
    tables = (_goals("Goals of the recipe", run.verdict),) if goals else ()
    return Section("verdict", "Verdict", tuple(lines), reasons, tables)


def against(run: Evidence) -> Section | None:
    """Section on the result of `gate --baseline`; None if the gate was not run."""
    gate = run.optional("gate.json")
    if gate is None or "against" not in gate.content:
        return None
    line = f"{gate.content['verdict']} against {_named(gate.content['against'].get('baseline'))}"
    notes = tuple(gate.content.get("notes", ()))
    reasons = tuple(gate.content["reasons"])
    goals = (_goals("Goals against the baseline", gate),)
    return Section("baseline", "Against a baseline", (line, *notes), reasons, goals)


def _named(baseline: Any) -> str:
    return str(baseline.get("where", "a baseline")) if isinstance(baseline, dict) else str(baseline)


def _goals(title: str, document: Document) -> Table:
    columns = ("metric", "goal", "limit", "value", "baseline", "loss", "at least", "at most",
               "could have seen", "outcome")  # fmt: skip
    return table(title, columns, [_goal(document, place) for place in range(len(document.content["goals"]))])


def _goal(document: Document, place: int) -> list[Cell]:
    goal = document.content["goals"][place]
    limit = next(iter(goal["goal"]), None)

    def figure(*path: str | int) -> Figure:
        return document.figure("goals", place, *path)

    low: Cell = figure("interval", 0) if goal["interval"] else "-"
    high: Cell = figure("interval", 1) if goal["interval"] else "-"
    return [
        goal["metric"],
        limit.replace("_", " ") if limit else "",
        figure("goal", limit) if limit else "-",
        figure("value"),
        figure("baseline"),
        figure("loss"),
        low,
        high,
        figure("detectable"),
        goal.get("outcome", OUTCOMES[bool(goal["passed"])]),
    ]
