"""The command line: what it prints and where to, its exit codes, and that much of it needs no torch."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from lines import NAME, SETS, Project, Result, cli, finished, make_project, python
from onnx import numpy_helper

from qcompress.models import FAMILIES
from qcompress.schema.axes import AXES, METHODS
from qcompress.schema.formats import FORMAT_PRESETS
from qcompress.schema.recipe import STAGES
from qcompress.schema.targets import TARGETS
from qcompress.tasks import TASKS

KINDS = ("methods", "axes", "formats", "models", "tasks", "targets", "recipes")

THRESHOLD = "gate.recovery={test.perplexity: {threshold: 1.5}}"
FLOOR = "gate.float_floor={test.perplexity: 1.5}"


@pytest.fixture(scope="module")
def project(tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file)


@pytest.fixture(scope="module")
def shared(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run that these tests may run again with other options."""
    return project.copy(tmp_path_factory.mktemp("cli") / "shared")


@pytest.fixture
def run(shared: Project) -> Path:
    """The directory of the recipe's own run, which is `latest` now, whatever ran before."""
    return shared.run().path


def strict(result: Result) -> object:
    """Stdout as one JSON document, without the constants that only Python knows."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(result.stdout, parse_constant=refuse)


# run ----------------------------------------------------------------------------------------------


def test_run_shows_the_ladder_and_ends_with_the_verdict(shared: Project, run: Path) -> None:
    done = cli(*shared.command())
    assert done.code == 0
    lines = done.stdout.splitlines()
    assert lines[-1] == f"accept  {NAME}  {run}  (not measured: engine)"
    assert [line.split()[0] for line in lines if line.strip()][3:9] == [
        "float", "trained", "folded", "onnx", "deployed", "engine",
    ]  # fmt: skip
    assert "not measured: engine: a tensorrt_rtx plan runs on its GPU" in done.stdout
    assert done.stderr.count("reused") == len(STAGES)


def test_no_digit_of_the_ladder_is_lost_in_a_log(shared: Project, run: Path) -> None:
    done = cli(*shared.command())
    assert "…" not in done.stdout
    parity = json.loads((run / "parity.json").read_text())
    values = [row["metrics"][f"{name}.perplexity"] for row in parity["rows"][:4] for name in SETS]
    assert len(values) == 8 and all(f"{value:.5g}" in done.stdout for value in values)
    assert done.stdout.index("test") < done.stdout.index("other")  # the recipe's first set comes first


def test_run_json_is_one_document_on_stdout_and_everything_else_on_stderr(shared: Project) -> None:
    done = cli(*shared.command("--json"))
    document = strict(done)
    assert document.keys() == {"recipe", "path", "verdict", "parity", "stages"}
    assert document["verdict"]["verdict"] == "accept" and document["stages"].keys() == set(STAGES)
    assert "reused" in done.stderr and "reused, made" not in done.stdout


def test_until_ends_early_and_says_so(shared: Project) -> None:
    done = cli(*shared.command("--until", "fold"))
    assert done.code == 0
    assert done.stdout.splitlines()[-1].startswith(f"unfinished  {NAME}  {shared.out}")
    ended = strict(cli(*shared.command("--until", "fold", "--json")))
    assert list(ended["stages"]) == ["fold", "load", "train"] and ended["verdict"] == "unfinished"


# Exit codes ---------------------------------------------------------------------------------------


def test_a_regression_is_3(shared: Project) -> None:
    done = cli(*shared.command("--set", THRESHOLD))
    assert done.code == 3
    assert done.stdout.splitlines()[-1].startswith(f"regression  {NAME}  ")
    assert "onnx: test.perplexity is" in done.stdout and "the limit is 1.5" in done.stdout


def test_an_anomaly_is_4(shared: Project) -> None:
    done = cli(*shared.command("--set", FLOOR, "--set", THRESHOLD))
    assert done.code == 4
    assert "its floor is 1.5: no reference" in done.stdout
    assert strict(cli(*shared.command("--set", FLOOR, "--json")))["verdict"]["verdict"] == "anomalous"


def test_a_required_row_that_cannot_be_measured_is_4(shared: Project) -> None:
    done = cli(*shared.command("--set", "verify.require=[float, engine]"))
    assert done.code == 4 and "required row engine was not measured" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--until", "bake"], "unknown stage 'bake'"),
        (["--keep", "bake"], "unknown stage 'bake'"),
        (["--set", "train.batch=4"], "train.batch"),
        (["--set", "nonsense"], "is not of the form key=value"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_usage_of_run_is_2(words: list[str], message: str, shared: Project) -> None:
    done = cli(*shared.command(*words))
    assert done.code == 2 and message in done.stderr and done.stdout == ""


def test_a_recipe_that_does_not_exist_is_2(tmp_path: Path) -> None:
    done = cli("run", tmp_path / "absent.yaml", "--out", tmp_path / "runs")
    assert done.code == 2 and "absent.yaml" in done.stderr and not (tmp_path / "runs").exists()


def test_a_directory_that_is_no_run_is_2(tmp_path: Path) -> None:
    for words in (["show", tmp_path], ["verify", tmp_path], ["gate", "--candidate", tmp_path]):
        done = cli(*words)
        assert done.code == 2 and "is not a finished run: recipe.resolved.yaml is missing" in done.stderr


def test_a_changed_graph_is_5_and_names_the_layer(project: Project, tmp_path: Path) -> None:
    mine = project.copy(tmp_path / "mine")
    model = onnx.load(str(mine.latest / "model.onnx"))
    (tensor,) = [item for item in model.graph.initializer if item.name.endswith("h.1.mlp.c_fc.weight.codes")]
    codes = numpy_helper.to_array(tensor).copy()
    codes[3, 4] ^= 1
    tensor.raw_data = codes.tobytes()
    onnx.save(model, str(mine.latest / "model.onnx"))
    done = cli("verify", mine.latest)
    assert done.code == 5
    assert "transformer.h.1.mlp.c_fc: codes: 1 differ, first at [3, 4]" in done.stderr
    assert "fix: run the recipe again" in done.stderr
    assert cli(*mine.command()).code == 0  # which puts the file back
    assert cli("verify", mine.latest).code == 0


def test_what_this_machine_lacks_is_6(shared: Project, run: Path, tmp_path: Path) -> None:
    """An engine that only a Jetson can build, and the second process of a launcher."""
    profiles = '[{"batch": [1, 1, 2], "sequence": [1, 8, 32]}]'
    words = ["--target", "orin-jp6", "--out", tmp_path / "engine", "--profiles", profiles]
    done = cli("build", run / "model.onnx", *words)
    assert done.code == 6
    assert "this machine cannot build for target orin-jp6" in done.stderr and "fix: run `" in done.stderr
    words = shared.command("--set", "seed=7", "--until", "train")
    done = cli(*words, environment={"WORLD_SIZE": "2"})
    assert done.code == 6 and "WORLD_SIZE says 2 processes, and RANK" in done.stderr


# Interrupted (130) and busy (7) runs need a live process: test_pipeline.py.


def test_a_file_where_the_runs_should_go_is_2(shared: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cli("run", shared.recipe, "--out", tmp_path / "file")
    assert done.code == 2 and "a file is where a folder should be" in done.stderr


# check --------------------------------------------------------------------------------------------


def test_check_shows_layers_formats_phases_and_what_is_reused(shared: Project) -> None:
    done = cli("check", shared.recipe, "--out", shared.out)
    assert done.code == 0
    assert f"{NAME}: gpt2, 0.12 M parameters, 2 blocks; method quadapter, target rtx-ada" in done.stdout
    assert "transformer.h.0.attn.c_attn and 7 more" in done.stdout
    assert "phases of blockwise-then-end-to-end: calibrate, finetune" in done.stdout
    assert [line.split() for line in done.stdout.splitlines()[-7:]] == [[name, "reused"] for name in STAGES]


def test_check_says_why_a_stage_runs(shared: Project) -> None:
    change = "train.phases.finetune.steps=41"
    done = cli("check", shared.recipe, "--out", shared.out, "--set", change)
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[-7:]}
    assert "runs: train.phases.finetune.steps changed (40 -> 41)" in lines["train"]
    assert "runs: fold runs again" in lines["export"] and "reused" in lines["load"]


def test_check_counts_what_a_pattern_matches_and_prints_it_as_it_is(shared: Project) -> None:
    pattern = "transformer.h.[01].[am]*.c_proj"
    done = cli("check", shared.recipe, "--set", f'format.layers."{pattern}"=float')
    assert done.code == 0, done.stderr
    assert f"format.layers '{pattern}' matches 4 layers" in done.stdout


def test_check_json_has_every_layer_and_every_stage(shared: Project) -> None:
    done = strict(cli("check", shared.recipe, "--out", shared.out, "--json"))
    assert len(done["layers"]) == 11 and [item["stage"] for item in done["stages"]] == list(STAGES)
    assert done["layers"][0] == {"name": "transformer.wte", "weights": "int8", "inputs": "float"}
    assert done["recipe"]["name"] == NAME


FIVE = """\
name: Five Mistakes
model: {family: gpt2, source: model}
task: {name: causal-lm, context: 32}
data:
  calibration: {text: [absent.txt]}
  evaluate: {test: {text: [text.txt]}}
format: w9a9
train: {batchsize: 4}
gate:
  recovery: {test.perplexety: {threshold: 3}}
"""


def test_five_mistakes_are_named_at_once_each_with_its_line(shared: Project) -> None:
    file = shared.folder / "five.yaml"
    file.write_text(FIVE)
    done = cli("check", file)
    assert done.code == 2 and done.stdout == ""
    assert "the recipe has 5 mistakes:" in done.stderr
    checked = strict(cli("check", file, "--json"))["mistakes"]
    assert [(item["line"], item["key"]) for item in checked] == [
        (1, "name"), (5, "data.calibration.text[0]"), (7, "format"), (8, "train.batchsize"),
        (10, 'gate.recovery."test.perplexety"'),
    ]  # fmt: skip
    assert all(item["fix"] and item["message"] for item in checked)
    assert all(f"{file}:{item['line']}: {item['key']}: " in done.stderr for item in checked)
    again = cli("run", file, "--out", shared.out)
    assert again.code == 2 and "mistakes:" in again.stderr


# show, gate, verify -------------------------------------------------------------------------------


def test_check_reads_the_data_once_and_no_code_for_an_empty_cache(
    shared: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key would tell nothing of a stage without an entry, and takes longer than the rest of the check."""
    calls = []
    monkeypatch.setattr("qcompress.recipe.check.judge_data", lambda *_, **__: calls.append("data") or ())
    monkeypatch.setattr("qcompress.pipeline.keys.code_digest", lambda *arguments: calls.append("code") or {})
    done = cli("check", shared.recipe, "--cache", tmp_path / "none")
    assert done.code == 0 and calls == ["data"]
    assert "load     runs: never finished for this recipe" in done.stdout
    cli("check", shared.recipe, "--cache", shared.cache)
    assert calls == ["data", "data", "code"]


def test_show_reads_the_recipe_of_a_run_without_recorded_digests_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns(".placed.json"))
    (bare / "recipe.resolved.yaml").write_text("name: 7\n")
    done = cli("show", bare)
    assert done.code == 4 and "is not the recipe of a run" in done.stderr
    monkeypatch.setattr("qcompress.recipe.validate.validate", lambda document: pytest.fail("it was read"))
    assert cli("show", run).stdout.splitlines()[-1].startswith(f"accept  {NAME}")


def test_show_is_what_run_showed(shared: Project, run: Path) -> None:
    shown, ran = cli("show", shared.out / NAME / "latest"), cli(*shared.command())
    assert shown.code == 0 and shown.stderr == ""
    assert shown.stdout.splitlines()[:-1] == ran.stdout.splitlines()[:-1]
    done = strict(cli("show", run, "--json"))
    assert done["parity"] == json.loads((run / "parity.json").read_text())


def test_gate_judges_by_the_recipe_that_the_run_holds(project: Project, tmp_path: Path) -> None:
    mine = project.copy(tmp_path / "mine")
    assert cli("gate", "--candidate", mine.latest).code == 0
    resolved = mine.latest / "recipe.resolved.yaml"
    content = yaml.safe_load(resolved.read_text())
    content["gate"]["recovery"]["test.perplexity"] = {"threshold": 2.0}
    resolved.write_text(yaml.safe_dump(content))
    done = cli("gate", "--candidate", mine.latest, "--json")
    assert done.code == 3 and strict(done)["verdict"]["verdict"] == "regression"
    assert cli("show", mine.latest).stdout.splitlines()[-1].startswith(f"regression  {NAME}  ")


# list, lint, build, predict -----------------------------------------------------------------------


@pytest.mark.parametrize("what", KINDS)
def test_list_has_a_line_for_each(what: str) -> None:
    expected = {
        "methods": set(METHODS),
        "axes": {f"{axis}: {one.model_fields['name'].default}" for axis in AXES for one in AXES[axis]},
        "models": set(FAMILIES),
        "tasks": set(TASKS),
        "targets": set(TARGETS),
        "formats": {*FORMAT_PRESETS, "weights", "activations"},
    }
    done = strict(cli("list", what, "--json"))
    names = [item["name"] for item in done]
    if what == "recipes":
        assert any(name.endswith("quickstart.yaml") for name in names)
    else:
        assert set(names) == expected[what] and len(names) == len(expected[what])
    assert all(item["about"] and not item["about"].endswith(",") for item in done)
    shown = cli("list", what)
    assert shown.code == 0 and all(name in shown.stdout for name in names)
    assert all(len(line) <= 80 or line in names for line in shown.stdout.splitlines())


def test_methods_and_models_are_described_and_not_spelled_out() -> None:
    for what in ("methods", "models", "formats"):
        for item in strict(cli("list", what, "--json")):
            assert item["about"][0].isupper() or what == "formats", item
            assert not {"schedule", "stepper", "quantizer", "pipeline"} & set(item["about"].split()), item
            assert not set("{}") & set(item["about"]), item
    formats = {item["name"]: item["about"] for item in strict(cli("list", "formats", "--json"))}
    assert formats["w8a8"] == "8-bit weights, 8-bit activations, 8-bit embedding tables."
    assert formats["w4a16-g64"].startswith(
        "4-bit weights with a scale for each 64 inputs, floating-point act"
    )
    assert formats["ternary-a8"].startswith(
        "Ternary weights (stored in int8), 8-bit activations, ternary emb"
    )
    assert formats["ipq"].startswith("Weights as indices into a table of vectors, floating-point activations")


def test_a_target_says_whether_it_can_be_built_here_and_else_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompress.schema.targets.compute_capability", lambda: 89)
    about = {item["name"]: item["about"] for item in strict(cli("list", "targets", "--json"))}
    on_device = "on the device: qcompress build model.onnx --target"
    assert about["h100"].endswith(
        f"SM90, fp32, fp16, bf16, int8, int4; tensorrt >=11,<12; {on_device} h100 --out engine"
    )
    assert on_device not in about["l4"]  # a GPU of that kind is here
    monkeypatch.setattr("qcompress.schema.targets.compute_capability", lambda: None)
    about = {item["name"]: item["about"] for item in strict(cli("list", "targets", "--json"))}
    assert on_device in about["l4"] and about["cpu"].endswith("There is nothing to build.")
    here = "builds here" if find_spec("tensorrt_rtx") else "here, after pip install tensorrt_rtx"
    assert about["rtx-turing"].endswith(f"SM75, fp16, int8; tensorrt_rtx >=1.5,<2; {here}")


def test_there_is_nothing_to_list_under_another_word() -> None:
    done = cli("list", "nonsense")
    assert done.code == 2 and "nothing to list under 'nonsense'" in done.stderr and "methods" in done.stderr


def test_lint_says_what_a_target_refuses(run: Path, tmp_path: Path) -> None:
    model = run / "model.onnx"
    good = cli("lint", model, "--target", "rtx-ada")
    assert good.code == 0 and good.stdout.splitlines()[-1] == f"0 findings  rtx-ada  {model}"
    broken = onnx.load(str(model))
    (tensor,) = [item for item in broken.graph.initializer if item.name == "lm_head.input.scale"]
    tensor.CopyFrom(numpy_helper.from_array(np.array(-1.0, np.float32), tensor.name))
    onnx.save(broken, str(tmp_path / "broken.onnx"))
    bad = cli("lint", tmp_path / "broken.onnx", "--target", "rtx-ada", "--json")
    assert bad.code == 5
    assert any("lm_head.input" in item["layer"] for item in strict(bad)["findings"])


def test_predict_continues_a_text_greedily(shared: Project, run: Path) -> None:
    text = (shared.folder / "text.txt").read_text().split()[0]
    done = cli("predict", run, text, "--tokens", "5")
    assert done.code == 0 and done.stdout.startswith(text) and len(done.stdout) > len(text) + 1
    assert cli("predict", run, text, "--tokens", "5").stdout == done.stdout
    long = cli("predict", run, text, "--tokens", "500")
    assert long.code == 2 and "exceed the context of 32" in long.stderr
    assert cli("predict", run, "").code == 2


# Without torch ------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "onnxruntime", "accelerate", "datasets", "onnxscript", "modelopt", "scipy")

WITHOUT = f"""
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in {HEAVY!r}:
            raise ModuleNotFoundError(f"refused: {{name}}", name=root)

sys.meta_path.insert(0, Refuse())
from typer.testing import CliRunner
import qcompress.cli.main

found = []
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(qcompress.cli.main.app, words)
    crash = repr(done.exception) if done.exception and not isinstance(done.exception, SystemExit) else None
    found.append([done.exit_code, done.stdout, done.stderr, crash])
assert not set(sys.modules) & set({HEAVY!r})
print(json.dumps(found))
"""


def without_torch(*commands: list[str]) -> list[Result]:
    """Commands in a process where torch and its like cannot be imported."""
    asked = python(WITHOUT, json.dumps([[str(word) for word in words] for words in commands]))
    assert asked.code == 0, asked.stderr
    results = []
    for code, stdout, stderr, crash in json.loads(asked.stdout):
        assert crash is None, crash
        results.append(Result(code, stdout, stderr))
    assert len(results) == len(commands)
    return results


def test_much_works_where_torch_is_not_installed(shared: Project, run: Path) -> None:
    commands = [
        ["check", shared.recipe, "--out", shared.out],
        ["show", run],
        ["gate", "--candidate", run],
        ["lint", run / "model.onnx", "--target", "rtx-ada"],
        ["inspect", run / "model.onnx"],
        *(["list", what] for what in KINDS),
    ]
    assert [done.code for done in without_torch(*commands)] == [0] * len(commands)


def test_a_run_that_reuses_everything_needs_no_torch(shared: Project) -> None:
    again, judged = without_torch(shared.command(), shared.command("--set", THRESHOLD))
    assert again.code == 0 and again.stderr.count("reused") == len(STAGES)
    assert again.stdout.splitlines()[-1].startswith(f"accept  {NAME}  ")
    assert judged.code == 3


def test_a_stage_that_needs_torch_says_how_to_get_it(shared: Project) -> None:
    changes = ("seed=5", "export.opset=23", "verify.samples=1")
    outputs = without_torch(*(shared.command("--set", change) for change in changes))
    for done in outputs:
        assert done.code == 6, done
        assert re.search("the stage [a-z]+ needs the package [a-z]+, which is not installed", done.stderr)
        assert "fix: pip install 'qcompress[train]'" in done.stderr


def test_the_command_is_installed_and_python_m_is_the_same(shared: Project) -> None:
    done = python("import runpy, sys; sys.argv = ['qcompress', 'list', 'tasks']; "
                  "runpy.run_module('qcompress', run_name='__main__')")  # fmt: skip
    assert done.code == 0 and done.stdout.startswith("causal-lm")
    helped = cli("--help")
    assert helped.code == 0 and all(
        word in helped.stdout for word in ("run", "check", "show", "verify", "gate", "list", "predict")
    )


@pytest.mark.slow
def test_the_bundled_recipe_is_without_mistakes() -> None:
    for item in strict(cli("list", "recipes", "--json")):
        if item["name"].endswith("quickstart.yaml"):
            assert cli("check", item["name"]).code == 0


@pytest.mark.slow
def test_a_machine_without_a_gpu_refuses_to_train_on_one(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    other = make_project(tmp_path / "other", tiny_model, text_file)
    done = cli(*other.command("--set", "train.device=cuda"))
    assert done.code == 6 and "torch sees no CUDA device" in done.stderr
