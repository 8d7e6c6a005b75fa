"""`lint --sarif`: the findings as SARIF 2.1.0. Property names are those of OASIS' schema."""

from __future__ import annotations

from pathlib import Path

import pytest
from graphs import linear, save
from lines import cli
from lint_cases import CASES, Case

import qcompress
from qcompress.graph.lint.lint import lint
from qcompress.graph.lint.rules import RULES
from qcompress.schema.targets import TARGETS

LEVELS = {"refused": "error", "changed": "error", "slow": "warning"}


def case(rule: str) -> Case:
    return next(case for case in CASES if case.rule == rule)


@pytest.mark.parametrize("rule", ["zero-point", "int4-per-channel"])
def test_each_finding_is_a_result_with_its_rule_level_and_place(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(case(rule).make(), tmp_path / "my model.onnx")
    monkeypatch.chdir(tmp_path)
    done = cli("lint", "my model.onnx", "--target", "rtx-ampere", "--sarif")
    document = done.json()
    assert done.code == (5 if LEVELS[next(r.consequence for r in RULES if r.id == rule)] == "error" else 0)
    assert set(document) == {"$schema", "version", "runs"} and document["version"] == "2.1.0"
    (run,) = document["runs"]
    driver = run["tool"]["driver"]
    assert driver["semanticVersion"] == qcompress.__version__
    assert [item["id"] for item in driver["rules"]] == [item.id for item in RULES]
    for item, known in zip(driver["rules"], RULES, strict=True):
        assert item["defaultConfiguration"]["level"] == LEVELS[known.consequence]
        assert item["shortDescription"]["text"] == known.summary and item["help"]["text"] == known.fix
    findings = lint(file, TARGETS["rtx-ampere"])
    assert len(run["results"]) == len(findings) > 0
    for result, finding in zip(run["results"], findings, strict=True):
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"] == finding.rule
        assert result["level"] == finding.severity
        assert finding.found in result["message"]["text"]
        (place,) = result["locations"]
        assert place["physicalLocation"]["artifactLocation"]["uri"] == "my%20model.onnx"
        assert place["logicalLocations"][0]["name"] == finding.layer


def test_a_file_elsewhere_has_an_absolute_uri_and_a_sound_one_no_results(tmp_path: Path) -> None:
    file = save(linear(), tmp_path / "model.onnx")
    done = cli("lint", file, "--target", "rtx-ampere", "--sarif")
    assert done.code == 0 and done.json()["runs"][0]["results"] == []
    broken = save(case("zero-point").make(), tmp_path / "broken.onnx")
    found = cli("lint", broken, "--target", "rtx-ampere", "--sarif").json()["runs"][0]["results"]
    assert found[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == broken.as_uri()


def test_one_document_at_a_time(tmp_path: Path) -> None:
    file = save(linear(), tmp_path / "model.onnx")
    done = cli("lint", file, "--target", "rtx-ampere", "--sarif", "--json")
    assert done.code == 2 and "drop one" in done.stderr
