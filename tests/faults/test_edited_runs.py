"""Files of a run directory that were torn, edited or exchanged, and every command that reads a run."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from lines import Project, Result, cli, finished

from qcompress import api
from qcompress.errors import QcompressError
from qcompress.system.artifacts import sha256_file

EDITED, ROT = "edited and torn run directories", "bit rot in the run"
pytestmark = pytest.mark.attack(EDITED)

ALWAYS = ("manifest.json", "parity.json", "verdict.json", "recipe.resolved.yaml")
"""Files that every command reads."""

NAMES = (
    *ALWAYS, "certificate.json", "sizes.json", "lint.json", "config.json", "tokenizer.json",
    "tokenizer_config.json", "engine/build.json", "distributions.json", "samples.json.gz",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Project:
    project = finished(tiny_model, text_file).copy(tmp_path_factory.mktemp("edited") / "project")
    assert cli("baseline", "promote", project.latest, "--out", project.folder / "baseline.json").code == 0
    goals = "gate: {regression: {test.perplexity: {percent-max-degradation: 50}}}"
    (project.folder / "goals.yaml").write_text(goals)
    return project


@pytest.fixture
def run(whole: Project, tmp_path: Path) -> Path:
    shutil.copytree(whole.latest, tmp_path / "run")
    return tmp_path / "run"


def commands(run: Path, whole: Project) -> dict[str, list[str | Path]]:
    """Every command that reads a run and is done in a second."""
    out, goals = run.parent / "out", ["--goals", whole.folder / "goals.yaml"]
    return {
        "show": ["show", run],
        "report": ["report", run, "--out", out.with_suffix(".html")],
        "compare": ["compare", f"a={run}", f"b={whole.latest}"],
        "gate": ["gate", "--candidate", run],
        "gate against": ["gate", "--baseline", whole.folder / "baseline.json", "--candidate", run, *goals],
        "promote": ["baseline", "promote", run, "--out", out.with_suffix(".json")],
        "bundle": ["bundle", run, "--format", "triton", "--out", out],
        "verify": ["verify", run, "--engine", run / "manifest.json"],
        "layers": ["verify", run, "--layers"],
        "predict": ["predict", run, "a text", "--tokens", "1"],
    }


def found_by_all(run: Path, whole: Project, codes: tuple[int, ...] = (4, 5)) -> list[str]:
    """Commands that did not end with one of `codes` and one error."""
    missed = []
    for name, words in commands(run, whole).items():
        done = cli(*words)
        if done.code not in codes or done.stderr.count("error: ") != 1 or "Traceback" in done.stderr:
            missed.append(f"{name}: {done.code} {done.stderr[-300:]}")
    return missed


def tear(file: Path, how: str) -> None:
    data = file.read_bytes()
    file.write_bytes({
        "half": data[: len(data) // 2],
        "empty": b"",
        "list": b"[1, 2]\n",
        "object": b"{}\n",
        "binary": b"\x80\x81\xff" * 40,
        "zeros": bytes(len(data)),
        "deep": b"[" * 100_000,
    }[how])  # fmt: skip


@pytest.mark.parametrize("how", [
    "half", *(pytest.param(how, marks=pytest.mark.slow)
              for how in ("empty", "list", "object", "binary", "zeros", "deep")),
])  # fmt: skip
@pytest.mark.parametrize("name", [
    "verdict.json", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "verdict.json"),
])  # fmt: skip
def test_a_torn_file_is_one_line_in_every_command(
    run: Path, whole: Project, name: str, how: str, tried: Callable[[int], None]
) -> None:
    if not (run / name).is_file():
        pytest.skip(f"the run has no {name}")
    tear(run / name, how)
    tried(len(commands(run, whole)))
    assert not found_by_all(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["half", "empty", "list", "object", "binary", "zeros", "deep"])
@pytest.mark.parametrize("name", ALWAYS)
def test_a_torn_file_is_found_without_the_list_of_digests_too(
    run: Path, whole: Project, name: str, how: str, tried: Callable[[int], None]
) -> None:
    """GitHub's upload-artifact leaves out files whose names begin with a dot."""
    (run / ".placed.json").unlink()
    tear(run / name, how)
    tried(len(commands(run, whole)))
    assert not found_by_all(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["half", "empty", "list", "binary", "deep"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "samples.json.gz", "certificate.json"])
def test_without_the_list_a_bundle_ships_nothing_torn(run: Path, whole: Project, name: str, how: str) -> None:
    (run / ".placed.json").unlink()
    tear(run / name, how)
    for command in ("bundle", "promote", "gate against", "predict", "show"):
        done = cli(*commands(run, whole)[command])
        assert "Traceback" not in done.stderr and done.code in (0, 2, 4, 5), (command, done)
        if command == "bundle" and name != "samples.json.gz":
            assert done.code in (4, 5), done
        if command in ("promote", "gate against") and name == "samples.json.gz":
            assert done.code == 4, done


def regress(run: Path) -> None:
    """Measured as a worse model, and judged so."""
    parity = json.loads((run / "parity.json").read_text())
    for row in parity["rows"]:
        if row["stage"] == "onnx":
            row["metrics"]["test.perplexity"] *= 40
    (run / "parity.json").write_text(json.dumps(parity))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("command", ["bundle", "promote"])
def test_a_regression_that_was_edited_to_accept_is_not_taken(
    run: Path, whole: Project, command: str, listed: bool
) -> None:
    regress(run)
    if not listed:
        (run / ".placed.json").unlink()
    done = cli(*commands(run, whole)[command])
    assert done.code == 4, done
    assert "verdict.json says accept, and parity.json makes it" in done.stderr or listed
    assert not (run.parent / "out").exists() and not (run.parent / "out.json").exists()
    (run / "verdict.json").write_text((run / "verdict.json").read_text().replace('"accept"', '"regression"'))
    assert cli(*commands(run, whole)[command]).code in (2, 3, 4)


@pytest.mark.parametrize("edit", ["samples", "recipe goals", "passed", "other run", "engine"])
def test_edits_that_stay_well_formed_are_named(
    run: Path, whole: Project, edit: str, tmp_path: Path, tried: Callable[[int], None]
) -> None:
    name = "parity.json"
    if edit == "samples":
        name = "samples.json.gz"
        content = json.loads(gzip.decompress((run / name).read_bytes()))
        (run / name).write_bytes(gzip.compress(json.dumps(content, indent=1).encode()))
    elif edit == "recipe goals":
        name = "recipe.resolved.yaml"
        recipe = yaml.safe_load((run / name).read_text())
        recipe["gate"]["recovery"] = {}
        (run / name).write_text(yaml.safe_dump(recipe))
    elif edit == "passed":
        name = "verdict.json"
        (run / name).write_text((run / name).read_text().replace('"passed": true', '"passed": false'))
    elif edit == "other run":
        other = api.run(whole.recipe, tmp_path / "runs", cache=whole.cache, overrides=["verify.samples=4"])
        shutil.copyfile(other.path / name, run / name)
    else:
        name = "engine/build.json"
        build = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({**build, "warnings": ["x"]}))
    tried(len(commands(run, whole)))
    assert not found_by_all(run, whole)
    assert name in cli("show", run).stderr


@pytest.mark.parametrize("name", ["model.onnx", "engine/model.plan"])
@pytest.mark.parametrize("command", ["gate", "gate against", "promote", "bundle"])
def test_an_exchanged_graph_is_named(run: Path, whole: Project, name: str, command: str) -> None:
    if not (run / name).is_file():
        pytest.skip(f"the run has no {name}")
    with (run / name).open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x07")
    done = cli(*commands(run, whole)[command])
    assert done.code in (4, 5) and name in done.stderr + done.stdout, done


def test_what_commands_write_into_a_run_is_theirs(whole: Project, tmp_path: Path) -> None:
    """An honest run passes every check, however often it is measured and judged."""
    project = whole.copy(tmp_path / "project")
    run = project.latest
    for words in (["verify", run], ["gate", "--candidate", run], ["show", run],
                  commands(run, whole)["gate against"],
                  ["verify", run, "--layers"], ["report", run], ["verify", run],
                  ["compare", f"a={run}", f"b={whole.latest}"],
                  ["baseline", "promote", run, "--out", tmp_path / "b.json"],
                  ["bundle", run, "--format", "triton", "--out", tmp_path / "models"]):  # fmt: skip
        done: Result = cli(*words)
        assert done.code == 0, (words, done)
    before = {name: sha256_file(run / name) for name in ("parity.json", "verdict.json", "model.onnx")}
    assert project.run().verdict == "accept"
    assert {name: sha256_file(run / name) for name in before} == before
    assert cli("show", run).code == 0


def test_a_run_that_is_another_recipes_model_is_checked(whole: Project, tmp_path: Path) -> None:
    """`model: {run: ...}` takes what the run had placed, and nothing else."""
    project = whole.copy(tmp_path / "project")
    recipe = {**yaml.safe_load(project.recipe.read_text()), "method": "float", "format": "float"}
    recipe["train"] = {"device": "cpu", "batch_size": 4, "phases": {"finetune": {"steps": 1}}}
    recipe["gate"] = {"float_floor": {"test.perplexity": 10000}}
    recipe["name"] = "float"
    (project.folder / "float.yaml").write_text(yaml.safe_dump(recipe))
    made = api.run(project.folder / "float.yaml", project.out)
    second = yaml.safe_load(project.recipe.read_text())
    second["model"] = {"family": "gpt2", "run": str(made.path)}
    (project.folder / "second.yaml").write_text(yaml.safe_dump(second))
    assert cli("check", project.folder / "second.yaml").code == 0
    weights = bytearray((made.path / "model.safetensors").read_bytes())
    weights[-100] ^= 2
    (made.path / "model.safetensors").write_bytes(weights)
    with pytest.raises(QcompressError, match="model.safetensors was changed after that run had made it"):
        api.run(project.folder / "second.yaml", project.out)


@pytest.mark.slow
@pytest.mark.attack(ROT)
@pytest.mark.parametrize("where", [0.02, 0.5, 0.97])
def test_a_flipped_bit_is_found_by_the_next_command_that_reads_the_file(
    run: Path, whole: Project, where: float, tried: Callable[[int], None]
) -> None:
    """`show` reads small files, `gate` the graph, its data and the plan. Devices read probe/."""
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    names = [name for name in names if not name.startswith(("probe/", "report.html", ".lock", ".placed"))]
    tried(len(names))
    missed = []
    for name in names:
        data = (run / name).read_bytes()
        flipped = bytearray(data)
        flipped[int(len(data) * where)] ^= 1 << (len(name) % 8)
        (run / name).write_bytes(flipped)
        small = cli("show", run)
        done = small if small.code else cli("gate", "--candidate", run)
        if done.code not in (4, 5):
            missed.append(f"{name}: {done}")
        (run / name).write_bytes(data)
    assert not missed
