from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
from graphs import save
from lines import cli
from lint_cases import CASES as QUANTIZED
from lint_cases import SOUND as SOUND_QUANTIZED
from lint_cases import Case, Make, bf16, float_matmul, int2_matmul, small
from unsound_cases import SOUND_GRAPHS, UNSOUND, optional_input, optional_output

from qcompress.graph.lint.lint import lint
from qcompress.graph.lint.rules import RULES, Rule
from qcompress.schema.targets import TARGETS

CASES = (*UNSOUND, *QUANTIZED)
SOUND = {**SOUND_GRAPHS, **SOUND_QUANTIZED}

BY_ID = {rule.id: rule for rule in RULES}

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}: {case.name}")
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)


def file_name(kind: str, name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{kind}-{name}".lower()) + ".onnx"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every graph of the tables as a file."""
    folder = tmp_path_factory.mktemp("graphs")
    for case in CASES:
        save(case.make(), folder / file_name(case.rule, case.name))
    for rule, (make, _) in SOUND.items():
        save(make(), folder / file_name("sound", rule))
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, dict[str, object]]:
    """What the real TensorRT-RTX says about each file; one child process for each compute capability."""
    asked = [case for case in CASES if case.refused_by != "crash"]
    targets = {file_name(case.rule, case.name): case.target for case in asked}
    targets |= {file_name("sound", rule): target for rule, (_, target) in SOUND.items()}
    found = {}
    for turing in (False, True):
        files = [folder / name for name, target in targets.items() if (target == "rtx-turing") is turing]
        command = [sys.executable, str(Path(__file__).with_name("ask_tensorrt.py")), "75" if turing else "86"]
        run = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        for line in run.stdout.splitlines():
            if line.startswith("{"):
                answer = json.loads(line)
                found[Path(answer["file"]).name] = answer
    assert len(found) == len(asked) + len(SOUND)
    return found


def test_every_rule_has_a_graph_that_breaks_it_and_one_that_does_not() -> None:
    assert len(BY_ID) == len(RULES) == 43
    assert {case.rule for case in CASES} == set(SOUND) == set(BY_ID)


@each_case
def test_a_graph_that_breaks_a_rule_is_found(case: Case, folder: Path) -> None:
    findings = lint(folder / file_name(case.rule, case.name), TARGETS[case.target])
    mine = [finding for finding in findings if finding.rule == case.rule]
    assert mine
    assert mine[0].layer == case.layer
    assert re.search(case.found, mine[0].found)
    assert mine[0].fix


@pytest.mark.parametrize("rule", SOUND)
def test_a_graph_that_comes_close_breaks_no_rule(rule: str, folder: Path) -> None:
    assert lint(folder / file_name("sound", rule), TARGETS[SOUND[rule][1]]) == []


def test_onnx_runtime_reads_int2_and_no_tensorrt_does(tmp_path: Path) -> None:
    file = save(int2_matmul()(), tmp_path / "model.onnx")
    onnx.checker.check_model(str(file), full_check=True)
    assert lint(file, TARGETS["cpu"]) == []
    others = [target for target in TARGETS.values() if target.backend]
    assert len(others) > 10
    for target in others:
        assert "integer-type" in {finding.rule for finding in lint(file, target)}, target.name


@pytest.mark.parametrize("make", [optional_input, optional_output])
def test_operands_that_may_be_left_out_are_not_missed(make: Make, tmp_path: Path) -> None:
    onnx.checker.check_model(make(), full_check=True)
    found = lint(save(make(), tmp_path / "model.onnx"), TARGETS["rtx-ampere"])
    assert [finding.rule for finding in found] == []


@pytest.mark.parametrize("rule", SOUND)
def test_a_graph_that_comes_close_is_valid_onnx(rule: str) -> None:
    onnx.checker.check_model(SOUND[rule][0](), full_check=True)


@needs_rtx
@each_case
def test_tensorrt_refuses_what_the_table_says_it_refuses(case: Case, folder: Path, answers: dict) -> None:
    if case.refused_by == "crash":
        pytest.skip("the parser's process dies; see the next test")
    answer = answers[file_name(case.rule, case.name)]
    assert answer["parsed"] is (case.refused_by != "parser"), answer["messages"]
    assert (answer["bytes"] is None) is (case.refused_by in ("parser", "builder")), answer["messages"]


@needs_rtx
def test_a_parser_that_dies_ends_no_process_of_ours(folder: Path, tmp_path: Path) -> None:
    crashes = [case for case in CASES if case.refused_by == "crash"]
    assert len(crashes) == 1
    for case in crashes:
        file = folder / file_name(case.rule, case.name)
        command = [sys.executable, str(Path(__file__).with_name("ask_tensorrt.py")), "86", str(file)]
        assert subprocess.run(command, capture_output=True, timeout=300).returncode < 0
        done = cli("build", file, "--target", case.target, "--out", tmp_path / "engine")
        assert done.code == 5 and "was killed by SIGSEGV" in done.stderr


@needs_rtx
@pytest.mark.parametrize("rule", SOUND)
def test_tensorrt_builds_a_graph_that_comes_close(rule: str, answers: dict) -> None:
    answer = answers[file_name("sound", rule)]
    assert answer["bytes"], answer["messages"]


@each_rule
def test_a_rule_comes_from_where_its_first_case_was_refused(rule: Rule) -> None:
    first = next(case for case in CASES if case.rule == rule.id)
    if first.refused_by:
        assert rule.evidence == first.refused_by
    else:
        assert rule.evidence in (("runtime",) if first.target == "cpu" else ("behaviour", "documents"))


def test_onnx_itself_refuses_what_the_table_says_it_refuses(folder: Path) -> None:
    refused = [case for case in CASES if case.refused_by == "checker"]
    assert len(refused) == 1
    for case in refused:
        with pytest.raises(onnx.checker.ValidationError, match="block_size"):
            onnx.checker.check_model(folder / file_name(case.rule, case.name))


@needs_rtx
def test_tensorrt_says_that_it_computes_uint8_as_int8(answers: dict) -> None:
    messages = answers[file_name("uint8-activation", "zero point 0")]["messages"]
    assert any("Defaulting to INT8 instead" in message for message in messages)


def test_onnxruntime_runs_no_bf16_on_a_processor() -> None:
    runtime = pytest.importorskip("onnxruntime")
    with pytest.raises(runtime.capi.onnxruntime_pybind11_state.NotImplemented, match="implementation for Qu"):
        runtime.InferenceSession(bf16().SerializeToString(), providers=["CPUExecutionProvider"])


@each_case
def test_slow_is_a_warning_and_everything_else_an_error(case: Case, folder: Path) -> None:
    findings = lint(folder / file_name(case.rule, case.name), TARGETS[case.target])
    assert findings
    for finding in findings:
        assert finding.consequence == BY_ID[finding.rule].consequence
        assert finding.severity == ("warning" if finding.consequence == "slow" else "error")


def test_a_finding_is_one_line_and_plain_json(folder: Path) -> None:
    finding = lint(folder / file_name("zero-point", "int8 activation"), TARGETS["rtx-ampere"])[0]
    assert json.loads(json.dumps(finding.to_json())) == {
        "rule": "zero-point",
        "severity": "error",
        "layer": "x.q",
        "found": "zero point 3",
        "consequence": "refused",
        "fix": BY_ID["zero-point"].fix,
    }
    assert str(finding).startswith("error zero-point x.q: zero point 3 (refused); ")


@pytest.mark.parametrize(
    ("formats", "quantized"),
    [
        ('{"h.0": {"weights": "int8", "activations": "float"}}', True),
        ('{"h.0": {"weights": "int4-g64", "activations": "float"}}', True),
        ('{"h.0": {"weights": "ternary in int8 per tensor", "activations": "float"}}', True),
        ('{"preset": "w8a8"}', True),
        ('{"preset": "ternary-a8"}', True),
        ('[{"layer": "h.0", "weights": {"bits": 4, "block": 64}}]', True),
        ('{"h.0": {"weights": "float", "activations": "float"}}', False),
        ("{}", False),
        ("null", False),
        ("not JSON", False),
    ],
)
def test_what_metadata_say_is_held_against_the_graph(tmp_path: Path, formats: str, quantized: bool) -> None:
    file = save(small(float_matmul, formats=formats)(), tmp_path / "model.onnx")
    rules = [finding.rule for finding in lint(file, TARGETS["cpu"])]
    assert rules == ["quantization-lost"] * quantized
