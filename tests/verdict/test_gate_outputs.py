"""Outputs for CI servers: JUnit XML, GitHub's annotations and summary, GitLab's code quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qcompress.report.ci_formats import annotations, code_quality, step_summary
from qcompress.verdict.junit import junit

PASSED = {
    "metric": "test.accuracy", "goal": {"max-degradation": 0.01}, "value": 0.9, "baseline": 0.9, "loss": 0.0,
    "allowed": 0.01, "interval": [0.0, 0.0], "detectable": None, "samples": 500, "test": "identical",
    "p_value": None, "outcome": "pass", "passed": True,
}  # fmt: skip
OPEN = PASSED | {"value": 0.89, "loss": 0.01, "interval": [-0.004, 0.024], "detectable": 0.02,
                 "outcome": "inconclusive", "passed": False}  # fmt: skip
BROKEN = PASSED | {"value": 0.8, "loss": 0.1, "interval": [0.08, 0.12], "outcome": "fail", "passed": False}


def verdict(word: str, goal: dict[str, Any], reasons: list[str], **more: Any) -> dict[str, Any]:
    return {"verdict": word, "goals": [PASSED, goal], "reasons": reasons, "not_measured": ["engine"],
            "on_inconclusive": "fail", **more}  # fmt: skip


def counted(text: str) -> dict[str, int]:
    """The suite's own counts, and that they are those of its cases."""
    root = ElementTree.fromstring(text)
    suite = root.find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    cases = suite.findall("testcase")
    found = {name: len(suite.findall(f"testcase/{word}")) for name, word in
             (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))}  # fmt: skip
    assert counts == {"tests": len(cases), **found}
    assert {name: root.get(name) for name in counts} == {name: str(value) for name, value in counts.items()}
    assert len({case.get("name") for case in cases}) == len(cases) - 1  # both goals here are on one metric
    return counts


@pytest.mark.parametrize(
    ("word", "goal", "policy", "counts"),
    [("accept", PASSED, "fail", (0, 0, 1)), ("regression", BROKEN, "fail", (2, 0, 1)),
     ("anomalous", BROKEN, "fail", (1, 1, 1)), ("inconclusive", OPEN, "fail", (2, 0, 1)),
     ("inconclusive", OPEN, "pass", (0, 0, 2))],
)  # fmt: skip
def test_junit_counts_what_a_ci_server_shows(
    word: str, goal: dict[str, Any], policy: str, counts: tuple[int, int, int]
) -> None:
    document = junit(verdict(word, goal, ["why"], on_inconclusive=policy), "tiny")
    assert counted(document) == {
        "tests": 4,
        **dict(zip(("failures", "errors", "skipped"), counts, strict=True)),
    }


def test_junit_holds_reasons_that_xml_could_not() -> None:
    reason = "layer <a> & \x1b[31mred\x1b[0m \ud800"
    document = junit(verdict("regression", BROKEN, [reason]), "tiny")
    failures = [case.text for case in ElementTree.fromstring(document).iter("failure") if case.text]
    assert failures == ["layer <a> & \\x1b[31mred\\x1b[0m \\ud800"]


def test_annotations_cannot_be_broken_out_of() -> None:
    lines = annotations(verdict("regression", BROKEN, ["50 % lost\n::set-output name=x", "b"]), "a,b:c.yaml")
    assert lines == [
        "::error file=a%2Cb%3Ac.yaml,title=qcompress gate%3A regression::50 %25 lost%0A::set-output name=x",
        "::error file=a%2Cb%3Ac.yaml,title=qcompress gate%3A regression::b",
    ]
    assert annotations(verdict("accept", PASSED, []), "r.yaml")[0].startswith("::notice file=r.yaml")
    passes = verdict("inconclusive", OPEN, ["why"], on_inconclusive="pass")
    assert annotations(passes, "r.yaml")[0].startswith("::warning ")


def test_the_step_summary_is_a_table_of_the_goals() -> None:
    text = step_summary(verdict("inconclusive", OPEN, ["a | b <script>"]), "tiny_net")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert text.startswith("### qcompress gate: inconclusive (tiny\\_net)")
    assert "- a \\| b &lt;script&gt;" in text
    assert len(rows) == 3 and all(row.replace("\\|", "").count("|") == 8 for row in rows)
    assert rows[2].endswith("| +0.01 | -0.004 to +0.024 | 0.02 | inconclusive |")


def test_gitlab_sees_each_reason_once_and_knows_it_again() -> None:
    issues = code_quality(verdict("regression", BROKEN, ["a", "b"]), "recipes/r.yaml")
    again = code_quality(verdict("regression", BROKEN, ["b", "c"]), "recipes/r.yaml")
    assert [issue["description"] for issue in issues] == ["a", "b"]
    assert issues[1]["fingerprint"] == again[0]["fingerprint"] != issues[0]["fingerprint"]
    for issue in issues:
        assert issue.keys() == {"description", "check_name", "fingerprint", "severity", "location"}
        assert issue["severity"] in ("info", "minor", "major", "critical", "blocker")
        assert issue["location"] == {"path": "recipes/r.yaml", "lines": {"begin": 1}}
    assert code_quality(verdict("accept", PASSED, []), "r.yaml") == []
    assert json.loads(json.dumps(issues)) == issues


def test_the_files_are_those_of_the_gate(tmp_path: Path) -> None:
    """Of a verdict on one run alone, which has no outcomes."""
    goal = PASSED | {"goal": {"floor": 1.0}, "baseline": None, "interval": None}
    del goal["outcome"]
    alone = {"verdict": "accept", "goals": [goal], "reasons": [], "not_measured": []}
    assert 'tests="2"' in junit(alone, "tiny")
    assert step_summary(alone, "tiny").count("\n") == 4
