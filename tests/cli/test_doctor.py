"""`doctor --bundle`: every planted fault with its exit code and its words; `doctor`: the table of jobs."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from lines import Kind as Graph
from lines import Result, cli, exported, finished
from test_cli import without_torch

from qcompress.cli import doctor
from qcompress.cli.bundle import examine
from qcompress.cli.bundle.triton import bundle
from qcompress.system.artifacts import graph_digests, read_json, sha256_file, write_json
from qcompress.verdict.run_directory import load

if sys.version_info >= (3, 11):
    import tomllib

PROJECT = Path(__file__).parents[2]
MODEL = "tiny"


@pytest.fixture(scope="module")
def made(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a GPT-2 for processors. Read only."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(finished(tiny_model, text_file).latest, folder / "run")
    file = folder / "run" / "recipe.resolved.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["build"]["target"] = "cpu"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "run" / ".placed.json").unlink()  # which knows the run's own recipe
    bundle(load(folder / "run"), folder / "repository")
    return folder / "repository"


@pytest.fixture
def repository(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "repository")
    return tmp_path / "repository"


def rewritten(repository: Path) -> None:
    """The record is of what lies there: someone changed the bundle and kept its books."""
    record = read_json(repository / "bundle.json")
    record["files"] = {name: sha256_file(repository / name) for name in record["files"]
                       if (repository / name).is_file()}  # fmt: skip
    write_json(repository / "bundle.json", record)


def asked(repository: Path) -> tuple[Result, list[dict[str, Any]]]:
    """The answer; it is never only a stack trace, and says the same twice."""
    told, plain = cli("doctor", "--bundle", repository, "--json"), cli("doctor", "--bundle", repository)
    answer = told.json()
    assert told.code == plain.code == answer["exit_code"]
    assert "Traceback" not in plain.stdout + plain.stderr
    assert plain.stdout.splitlines()[-1] == f"would {'' if told.code == 0 else 'not '}load  {repository}"
    for fault in answer["faults"]:
        assert fault["what"] in plain.stdout and fault["fix"] and f"fix: {fault['fix']}" in plain.stdout
    return told, answer["faults"]


def test_a_whole_bundle_loads(repository: Path) -> None:
    told, faults = asked(repository)
    assert told.code == 0 and faults == []
    (note,) = told.json()["notes"]
    assert re.match(r"ONNX Runtime \d+\.\d+.* opens the graph", note)


def edited(pattern: str, put: str) -> Callable[[Path], None]:
    """config.pbtxt with another text in one place."""

    def edit(repository: Path) -> None:
        file = repository / MODEL / "config.pbtxt"
        text, count = re.subn(pattern, put, file.read_text(), count=1)
        assert count == 1
        file.write_text(text)
        rewritten(repository)

    return edit


def graph(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def edit(repository: Path) -> None:
        file = repository / MODEL / "1" / "model.onnx"
        model = onnx.load(file)
        change(model)
        file.write_bytes(model.SerializeToString())
        rewritten(repository)

    return edit


def record(**changes: Any) -> Callable[[Path], None]:
    def edit(repository: Path) -> None:
        write_json(repository / "bundle.json", read_json(repository / "bundle.json") | changes)

    return edit


def lost(repository: Path) -> None:
    (repository / MODEL / "tokenizer.json").unlink()


def bent(repository: Path) -> None:
    with (repository / MODEL / "1" / "model.onnx").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))


def other_materials(repository: Path) -> None:
    bill = read_json(repository / "sbom.cdx.json")
    bill["components"].pop()
    write_json(repository / "sbom.cdx.json", bill)


def truncated(repository: Path) -> None:
    file = repository / MODEL / "1" / "model.onnx"
    file.write_bytes(file.read_bytes()[:1000])
    rewritten(repository)


def without_mask(repository: Path) -> None:
    shutil.rmtree(repository / MODEL / "warmup")
    rewritten(repository)


def without_graph(repository: Path) -> None:
    (repository / MODEL / "1" / "model.onnx").unlink()
    rewritten(repository)


def junk(repository: Path) -> None:
    (repository / "bundle.json").write_text("{")


def binary(repository: Path) -> None:
    (repository / MODEL / "config.pbtxt").write_bytes(b"\xff\xfe\x00")
    rewritten(repository)


def one_batch(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 2


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "Mulmat"


def future_format(model: onnx.ModelProto) -> None:
    model.ir_version = 99


def future_opset(model: onnx.ModelProto) -> None:
    next(item for item in model.opset_import if item.domain == "").version = 99


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file is missing": (lost, "tiny/tokenizer.json is missing"),
    "a package left the bill of materials": (other_materials, "sbom.cdx.json has another content"),
    "a bit of the graph fell over": (bent, "tiny/1/model.onnx has another content"),
    "the record is missing": (lambda folder: (folder / "bundle.json").unlink(), "is not a bundle"),
    "the record is no JSON": (junk, "cannot be read"),
    "the record is a list": (lambda folder: (folder / "bundle.json").write_text("[]"), "cannot be read"),
    "the record is of another format": (record(format=9), "is of format 9"),
    "the record leads outside": (record(files={"../run/model.onnx": "0"}), "outside the bundle"),
    "the record's name leads outside": (record(name="../run"), "names the model '../run'"),
    "the record's backend is unknown": (record(backend="python"), "names the backend 'python'"),
    "the graph is not listed": (without_graph, "does not list tiny/1/model.onnx"),
    "the config does not parse": (edited("input ", "imput "), "is not a model configuration of Triton"),
    "the config is not text": (binary, "is not UTF-8 text"),
    "the config is another model's": (edited('name: "tiny"', 'name: "big"'), "is of model 'big'"),
    "the config is another platform's": (edited("onnxruntime_onnx", "tensorrt_plan"), "is for tensorrt_plan"),
    "an input has another name": (edited('"input_ids"', '"ids"'), "has no input 'input_ids'"),
    "an input has another type": (edited("TYPE_INT64", "TYPE_INT32"), r"says TYPE_INT32 \[-1\], and"),
    "an output has other dims": (edited("dims: 300", "dims: 301"), r"\[-1, 301\], and the graph TYPE_FP32"),
    "a batch is larger than the largest": (edited("max_batch_size: 4", "max_batch_size: 3"), "batches of 4"),
    "a mask is missing": (without_mask, "warmup/attention_mask-0, for attention_mask, is missing"),
    "the graph has one batch size": (graph(one_batch), "the graph no dynamic batch"),
    "the graph is cut short": (truncated, "is not a readable ONNX file"),
    "the graph has an operator nobody knows": (graph(unknown_operator), "does not take model.onnx: .*Mulmat"),
}  # fmt: skip

LACKING: dict[str, tuple[Callable[[Path], None], str]] = {
    "the graph's format is newer than ONNX Runtime": (graph(future_format), "IR version"),
    "the graph's opset is newer than ONNX Runtime": (graph(future_opset), "[Oo]pset"),
    "there is no GPU": (edited("KIND_CPU", "KIND_GPU"), "asks for a GPU .KIND_GPU., and this machine"),
}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "compute_capability", lambda: None)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("fault", [*BROKEN, *LACKING])
def test_a_planted_fault_is_named(fault: str, repository: Path) -> None:
    plant, words = (BROKEN | LACKING)[fault]
    plant(repository)
    told, faults = asked(repository)
    assert told.code == (5 if fault in BROKEN else 6)
    assert re.search(words, faults[0]["what"]), faults
    assert {item["broken"] for item in faults} == {fault in BROKEN}
    assert len(BROKEN) >= 20 and len(LACKING) == 3


def test_a_folder_without_bundle_json_is_no_bundle(tmp_path: Path) -> None:
    told, faults = asked(tmp_path)
    assert told.code == 5 and "is not a bundle: bundle.json is missing" in faults[0]["what"]


def test_onnx_runtime_that_is_missing_or_dies_is_a_reason(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(examine, "version_of", lambda name: None)
        told, faults = asked(repository)
        assert told.code == 6 and faults[0]["what"] == "ONNX Runtime is not installed"
    killed = "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(examine, "command", lambda *words: [sys.executable, "-c", killed])
    told, faults = asked(repository)
    assert told.code == 5 and "the process that opened it ended (exit code -9)" in faults[0]["what"]


def test_external_data_travel_and_are_missed(
    tiny_model: Path, text_file: Path, made: Path, tmp_path: Path
) -> None:
    """A graph whose weights lie beside it, in the bundle and without its data."""
    run = tmp_path / "run"
    shutil.copytree(made.parent / "run", run)
    shutil.rmtree(run / "engine")
    model = onnx.load(exported(Graph("w8a8"), tiny_model, text_file).file)
    onnx.save(model, run / "model.onnx", save_as_external_data=True, location="model.onnx.data",
              size_threshold=64)  # fmt: skip
    parity = read_json(run / "parity.json")
    parity["onnx"]["sha256"] = sha256_file(run / "model.onnx")
    write_json(run / "parity.json", parity)
    certificate = read_json(run / "certificate.json")
    write_json(run / "certificate.json", {**certificate, "files": graph_digests(run / "model.onnx")})
    out = tmp_path / "repository"
    bundle(load(run), out)
    assert asked(out)[0].code == 0
    (out / MODEL / "1" / "model.onnx.data").unlink()
    assert asked(out)[1][0]["what"] == "tiny/1/model.onnx.data is missing"
    rewritten(out)
    told, faults = asked(out)
    assert told.code == 5 and "model.onnx.data, with the data of tensor" in faults[0]["what"]


# Plans --------------------------------------------------------------------------------------------

HERE = {"tensorrt": "11.1.0.5", "sm": 86}


@pytest.fixture
def plan(made: Path, tmp_path: Path) -> Path:
    """A bundle with a plan that TensorRT 11.1.0 built for an A10 (SM86); nothing here can load it."""
    run = tmp_path / "run"
    shutil.copytree(made.parent / "run", run)
    recipe = yaml.safe_load((run / "recipe.resolved.yaml").read_text())
    recipe["build"]["target"] = "a10"
    (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (run / "engine" / "model.plan").write_bytes(b"a plan")
    facts = read_json(run / "engine" / "build.json") | {
        "versions": {"tensorrt": HERE["tensorrt"]},
        "plan": {"sha256": sha256_file(run / "engine" / "model.plan"), "bytes": 6},
    }
    write_json(run / "engine" / "build.json", facts)
    bundle(load(run), tmp_path / "repository", backend="tensorrt")
    return tmp_path / "repository"


def on_host(monkeypatch: pytest.MonkeyPatch, sm: int | None, tensorrt: str | None) -> None:
    monkeypatch.setattr(examine, "compute_capability", lambda: sm)
    monkeypatch.setattr(examine, "version_of", lambda name: tensorrt if name == "tensorrt" else None)


def engine(**facts: Any) -> Callable[[Path], None]:
    def edit(repository: Path) -> None:
        known = read_json(repository / "bundle.json")
        known["engine"] |= facts
        write_json(repository / "bundle.json", known)

    return edit


@pytest.mark.parametrize(
    ("sm", "tensorrt", "change", "words"),
    [
        (86, "11.1.0.5", engine(), ()),
        (86, "11.1.0.9", engine(), ()),
        (None, "11.1.0.5", engine(), ("asks for a GPU",)),
        (86, None, engine(), ("TensorRT is not installed",)),
        (86, "11.2.0.1", engine(), ("was built with TensorRT 11.1.0.5, and here is 11.2.0.1",)),
        (86, "11.2.0.1", engine(version_compatible=True), ()),
        (86, "11.0.0.1", engine(version_compatible=True), ("and here is 11.0.0.1",)),
        (89, "11.1.0.5", engine(), ("for a GPU of SM86, and this one is SM89",)),
        (89, "11.1.0.5", engine(hardware_compatibility="ampere-plus"), ()),
        (75, "11.1.0.5", engine(hardware_compatibility="ampere-plus"), ("this one is SM75",)),
        (89, "11.1.0.5", engine(hardware_compatibility="same-compute-capability"), ("this one is SM89",)),
        (75, "10.9.0.1", engine(), ("here is 10.9.0.1", "this one is SM75")),
    ],
)
def test_a_plan_is_for_one_gpu_and_one_version(
    sm: int | None, tensorrt: str | None, change: Callable[[Path], None], words: tuple[str, ...],
    plan: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on_host(monkeypatch, sm, tensorrt)
    change(plan)
    told, faults = asked(plan)
    assert told.code == (6 if words else 0)
    assert len(faults) == len(words)
    for fault, word in zip(faults, words, strict=True):
        assert word in fault["what"] and not fault["broken"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edited('profile: "0"', 'profile: "3"'), "asks for profile 3, and the plan has 1"),
        (edited("max_batch_size: 4", "max_batch_size: 8"), "max_batch_size is 8, and the plan takes 4"),
        (edited('"logits"', '"scores"'), "has no output 'logits', and the graph has it"),
    ],
)
def test_a_plan_has_its_profiles_and_the_names_of_its_graph(
    change: Callable[[Path], None], words: str, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host(monkeypatch, 86, "11.1.0.5")
    change(plan)
    told, faults = asked(plan)
    assert told.code == 5 and words in faults[0]["what"]


# The machine --------------------------------------------------------------------------------------


def jobs(machine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {job["job"]: job for job in machine["jobs"]}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
def test_versions_wanted_are_those_of_the_project() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    wanted = {}
    for line in lines:
        name, versions = re.match(r"([\w-]+)(?:\[[^]]*\])?([^;]*)", line).groups()
        wanted[name] = versions.strip()
    told = [(name, versions) for _, packages in doctor.JOBS.values() for name, versions in packages]
    assert len(told) > 15
    for names, versions in told:
        for name in names.split("|"):
            assert wanted[name] == versions, name
    named = {name for names, _ in told for name in names.split("|")}
    for extra in ("train", "rtx", "tensorrt"):
        for line in project["optional-dependencies"][extra]:
            assert re.match(r"[\w-]+", line).group() in named


def test_what_is_installed_is_ready_and_has_its_version() -> None:
    told = cli("doctor", "--json")
    jobs_by_name = jobs(told.json())
    assert told.code == 0 and list(jobs_by_name) == list(doctor.JOBS)
    assert (
        jobs_by_name["train"]["ready"]
        and jobs_by_name["export"]["ready"]
        and jobs_by_name["onnxruntime"]["ready"]
    )
    (torch,) = [need for need in jobs_by_name["train"]["needs"] if need["what"] == "torch"]
    assert torch["found"] == metadata.version("torch") and torch["fix"] == ""
    plain = cli("doctor")
    assert plain.code == 0 and "train  (ready)" in plain.stdout and "GiB free in" in plain.stdout


def test_what_is_missing_or_old_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1", "tensorrt_rtx": "1.7.1", "onnx": "2.0.0", "packaging": "26.3"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    told = cli("doctor", "--json")
    jobs_by_name = jobs(told.json())
    assert told.code == 0
    assert [name for name, job in jobs_by_name.items() if job["ready"]] == ["rtx engine"]
    needs = {need["what"]: need for need in jobs_by_name["train"]["needs"]}
    assert needs["torch"]["found"] == "2.9.1"
    assert needs["torch"]["fix"] == "pip install -U 'qcompress[train]'"
    assert needs["transformers"] == {"what": "transformers", "wanted": ">=5.10,<6", "found": None,
                                     "ok": False, "fix": "pip install 'qcompress[train]'"}  # fmt: skip
    (onnx_need, _) = jobs_by_name["triton bundle"]["needs"]
    assert not onnx_need["ok"] and onnx_need["fix"] == "pip install -U qcompress"
    text = cli("doctor").stdout
    assert "tensorrt engine:\n  pip install 'qcompress[tensorrt]'\n" in text


def test_a_torch_without_cuda_measures_nothing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    for installed, fine in (("2.13.0+cpu", False), ("2.13.0+cu130", True), ("2.13.0", True)):
        monkeypatch.setattr(
            metadata, "version", lambda name, v=installed: v if name == "torch" else real(name)
        )
        need = jobs(doctor.diagnose())["GPU measurement"]["needs"][0]
        assert need["ok"] is fine and need["found"] == installed
        assert fine or need["fix"].endswith("pip install torch==2.13.0")
        assert jobs(doctor.diagnose())["train"]["needs"][0]["ok"]


@pytest.mark.parametrize(
    ("script", "gpus", "reason"),
    [
        ("echo 'NVIDIA L4, 595.71.05, 8.9, 23034'", 1, ""),
        ("echo 'NVIDIA L4, 595.71.05, 8.9, 23034'; echo 'NVIDIA A10, 595.71.05, 8.6, 23028'", 2, ""),
        (
            "echo 'could not communicate with the driver'; exit 9",
            0,
            "nvidia-smi failed (could not communicate",
        ),
        ("exit 3", 0, "nvidia-smi failed (exit code 3)"),
        ("true", 0, "nvidia-smi lists no GPU"),
        (None, 0, "nvidia-smi is not installed"),
    ],
)
def test_the_driver_is_asked_through_nvidia_smi(
    script: str | None, gpus: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = doctor.diagnose()
    assert len(machine["gpus"]) == gpus and machine["gpu_reason"].startswith(reason)
    need = jobs(machine)["tensorrt engine"]["needs"][-1]
    assert need["ok"] is (gpus > 0)
    if gpus:
        assert machine["gpus"][0] == {"name": "NVIDIA L4", "driver": "595.71.05", "compute_capability": "8.9",
                                    "memory_mib": "23034"}  # fmt: skip
    else:
        assert reason in need["fix"]


def test_both_commands_need_no_torch(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    commands = (
        ["bundle", made.parent / "run", "--out", out, "--json"],
        ["doctor", "--json"],
        ["doctor", "--bundle", out, "--json"],
    )
    first, second, third = without_torch(*commands)
    assert first.code == 0 and json.loads(first.stdout)["name"] == MODEL
    assert second.code == 0 and third.code == 0, third
    assert os.path.isfile(out / "tiny" / "config.pbtxt")
