"""`bundle`: what Triton is told, against ONNX Runtime, a parser of our own and tritonclient; and refusals."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from google.protobuf import descriptor_pb2, text_format
from lines import ENVIRONMENT, cli, finished, plain_session
from tiny_bert import LABELS, PADDING, save_encoder
from transformers import PreTrainedTokenizerFast

from qcompress import api
from qcompress.cli.bundle import triton_config as triton
from qcompress.cli.bundle.triton import bundle
from qcompress.errors import ExportError
from qcompress.system.artifacts import graph_digests, read_json, sha256_file, write_json
from qcompress.verdict.run_directory import load

NAME = "served"
NUMPY = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32, "TYPE_INT8": np.int8}
ORT = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32", "tensor(int8)": "TYPE_INT8"}


@pytest.fixture(scope="module")
def gpt2(tiny_model: Path, text_file: Path) -> Path:
    return finished(tiny_model, text_file).latest


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A run of a BERT that classifies sentences."""
    folder = tmp_path_factory.mktemp("bert")
    save_encoder(folder / "model", text_file, "bert")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PADDING)
    tokenizer.save_pretrained(folder / "model")
    words = text_file.read_text().split()
    rows = [f"{' '.join(words[9 * n : 9 * n + 3 + n % 4])}\t{LABELS[n % 3]}" for n in range(48)]
    (folder / "rows.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    data = {"table": ["rows.tsv"], "columns": {"text": "text", "label": "label"}}
    recipe = {
        "name": "tiny-bert",
        "model": {"family": "bert", "source": "model"},
        "task": {"name": "sequence-classification", "labels": list(LABELS), "context": 32},
        "data": {"train": data, "calibration": data, "evaluate": {"test": {**data, "limit": 16}}},
        "format": "w8a8",
        "method": "ptq",
        "train": {"device": "cpu", "batch_size": 4},
        "build": {"target": "cpu"},
        "verify": {"batch_size": 4, "distance_samples": 16},
        "gate": {
            "float_floor": {"test.accuracy": 0},
            "recovery": {"test.accuracy": {"max-degradation": 1}},
            "parity": {"onnx": {"mean_abs": 0.05, "top1_agreement": 0.5}},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        run = api.run(folder / "recipe.yaml", folder / "runs")
    assert run.verdict == "accept"
    return run.path


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Path:
    """The GPT-2's run with a key-value cache of int8 codes in its graph."""
    project = finished(tiny_model, text_file).copy(tmp_path_factory.mktemp("cached") / "project")
    changes = ("export.cache=true", "export.dynamic=[batch, sequence, past]", "build.target=cpu",
               "build.profiles=[{batch: [1, 2, 4], sequence: [1, 16, 31], past: [0, 0, 31]}]")  # fmt: skip
    assert project.run(*changes).verdict == "accept"
    return project.latest


@pytest.fixture(params=["gpt2", "bert", pytest.param("cached", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def written(run: Path, out: Path, **options: Any) -> Path:
    """A bundle's model folder."""
    bundle(load(run), out, name=NAME, **options)
    return out / NAME


# A reader of our own ------------------------------------------------------------------------------


def parsed(text: str) -> dict[str, list[Any]]:
    """Protobuf's text format by hand: {field: [values]}, in which a message is another such dict."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[{}:]|[^\s{}:]+', text)

    def message(place: int) -> tuple[dict[str, list[Any]], int]:
        fields: dict[str, list[Any]] = {}
        while place < len(tokens) and tokens[place] != "}":
            name, place = tokens[place], place + 1
            if tokens[place] == "{":
                value, place = message(place + 1)
            else:
                value = tokens[place + 1]
                value = json.loads(value) if value[0] in '"-0123456789' else value
                place += 1
            fields.setdefault(name, []).append(value)
            place += 1
        return fields, place

    return message(0)[0]


def model_config_of_tritonclient() -> ModuleType:
    """Its generated module alone: the package imports what a test does not need."""
    package = importlib.util.find_spec("tritonclient")
    if package is None:
        pytest.skip("tritonclient is not installed; it wants an older protobuf than onnx brings")
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What Triton is told ------------------------------------------------------------------------------


def test_inputs_and_outputs_are_those_that_onnx_runtime_sees(run: Path, tmp_path: Path) -> None:
    model = written(run, tmp_path / "repository")
    config = parsed((model / "config.pbtxt").read_text())
    session = plain_session(model / "1" / "model.onnx")
    (most,) = config["max_batch_size"]
    assert most >= 4 and config["name"] == [NAME] and config["backend"] == ["onnxruntime"]
    for side, has in (("input", session.get_inputs()), ("output", session.get_outputs())):
        expected = [
            {"name": [item.name], "data_type": [ORT[item.type]],
             "dims": [size if isinstance(size, int) else -1 for size in item.shape[1:]]}
            for item in has
        ]  # fmt: skip
        stated = [{**item, "dims": item.get("dims", [])} for item in config[side]]
        assert stated == expected and len(expected) >= 1


def test_tritonclient_reads_the_same_message(run: Path, tmp_path: Path) -> None:
    theirs = model_config_of_tritonclient().ModelConfig()
    text = (written(run, tmp_path / "repository") / "config.pbtxt").read_text()
    text_format.Parse(text, theirs)
    ours = triton.from_text(text, "config.pbtxt")
    deterministic = {"deterministic": True}
    assert theirs.SerializeToString(**deterministic) == ours.SerializeToString(**deterministic)
    assert text_format.MessageToString(theirs) == text
    assert len(theirs.input) >= 2 and len(theirs.model_warmup) == 1


def test_the_description_is_tritonclients_to_the_last_number() -> None:
    theirs, ours = descriptor_pb2.FileDescriptorProto(), descriptor_pb2.FileDescriptorProto()
    model_config_of_tritonclient().DESCRIPTOR.CopyToProto(theirs)
    text_format.Parse(triton.DESCRIPTION.read_text(), ours)
    assert ours == theirs and len(ours.message_type) > 20


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_bundled_graph_gives_the_outputs_that_were_verified(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """probe/reference.npz has what the onnx row gave; the inputs are fed as config.pbtxt calls them."""
    run = request.getfixturevalue(kind)
    model = written(run, tmp_path / "repository")
    config = parsed((model / "config.pbtxt").read_text())
    session = plain_session(model / "1" / "model.onnx")
    kit, reference = np.load(run / "probe" / "inputs.npz"), np.load(run / "probe" / "reference.npz")
    logits, positions = reference["logits"], reference["positions"]
    assert len(logits) >= 6
    for row, expected in enumerate(logits):
        length = int(kit["length"][row])
        if "ids" in kit.files:
            ids = kit["ids"][row : row + 1, :length]
            given = {"input_ids": ids, "attention_mask": np.ones_like(ids),
                     "position_ids": np.arange(length)[None]}  # fmt: skip
        else:
            given = {name[6:]: kit[name][row : row + 1, :length] for name in kit.files if "input." in name}
        feed = {item["name"][0]: given[item["name"][0]].astype(NUMPY[item["data_type"][0]])
                for item in config["input"]}  # fmt: skip
        (answer,) = session.run([config["output"][0]["name"][0]], feed)
        known = answer[0][positions[positions < length]] if answer.ndim == 3 else answer[0]
        expected = expected[: len(known)] if answer.ndim == 3 else expected.reshape(-1)
        # the very same kernels; only the rows that share a batch differ
        np.testing.assert_allclose(known, expected, atol=2e-5 * np.abs(logits).max())


def test_a_warm_up_sample_is_an_input_that_the_graph_takes(run: Path, tmp_path: Path) -> None:
    model = written(run, tmp_path / "repository")
    config = parsed((model / "config.pbtxt").read_text())
    session = plain_session(model / "1" / "model.onnx")
    (sample,) = config["model_warmup"]
    (rows,) = sample["batch_size"]
    feed = {}
    for item in sample["inputs"]:
        (value,) = item["value"]
        shape, kind = value["dims"], NUMPY[value["data_type"][0]]
        assert all(size >= 1 for size in shape)
        if "input_data_file" in value:
            content = (model / "warmup" / value["input_data_file"][0]).read_bytes()
            array = np.frombuffer(content, kind).reshape(shape)
            assert (array == 1).all()
        else:
            assert value["zero_data"] == ["true"]
            array = np.zeros(shape, kind)
        feed[item["key"][0]] = np.stack([array] * rows)
    outputs = session.run(None, feed)
    assert len(outputs[0]) == rows and all(np.isfinite(array).all() for array in outputs)


def test_a_key_value_cache_is_an_input_of_any_length(cached: Path, tmp_path: Path) -> None:
    config = parsed((written(cached, tmp_path / "repository") / "config.pbtxt").read_text())
    names = [item["name"][0] for item in config["input"]]
    past = [item for item in config["input"] if item["name"][0].startswith("past_key_values.")]
    present = [item for item in config["output"] if item["name"][0].startswith("present.")]
    assert len(past) == len(present) == 4 and "attention_mask" in names
    for item in past + present:
        assert item["dims"] == [2, -1, 32]


def test_batches_come_from_the_profiles(gpt2: Path, tmp_path: Path) -> None:
    def batching(**options: Any) -> tuple[int, list[int]]:
        text = (written(gpt2, tmp_path / "repository", **options) / "config.pbtxt").read_text()
        shutil.rmtree(tmp_path / "repository")
        config = parsed(text)
        return config["max_batch_size"][0], config["dynamic_batching"][0].get("preferred_batch_size", [])

    assert batching() == (4, [2, 4])
    assert batching(max_batch=3) == (3, [2])
    assert batching(max_batch=64) == (64, [2, 4])
    model = written(gpt2, tmp_path / "repository", instances=3)
    (group,) = parsed((model / "config.pbtxt").read_text())["instance_group"]
    assert group == {"count": [3], "kind": ["KIND_GPU"]}


def copied(run: Path, folder: Path, **build: Any) -> Path:
    """A copy of the run that a test may change; `build` are keys of its recipe."""
    shutil.copytree(run, folder)
    recipe = yaml.safe_load((folder / "recipe.resolved.yaml").read_text())
    recipe["build"] |= build
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def with_graph(run: Path, change: Any) -> None:
    """Another graph, as if it were the measured one."""
    model = onnx.load(run / "model.onnx")
    change(model)
    onnx.save(model, run / "model.onnx")
    parity = read_json(run / "parity.json")
    parity["onnx"]["sha256"] = sha256_file(run / "model.onnx")
    write_json(run / "parity.json", parity)
    certificate = read_json(run / "certificate.json")
    write_json(run / "certificate.json", {**certificate, "files": graph_digests(run / "model.onnx")})
    shutil.rmtree(run / "engine")


def test_a_graph_of_one_batch_size_is_not_batched(gpt2: Path, tmp_path: Path) -> None:
    def fix(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 2

    run = copied(gpt2, tmp_path / "run", target="cpu")
    with_graph(run, fix)
    config = parsed((written(run, tmp_path / "repository") / "config.pbtxt").read_text())
    assert "max_batch_size" not in config and "dynamic_batching" not in config
    assert config["input"][0]["dims"] == [2, -1] and config["output"][0]["dims"][0] == 2
    (sample,) = config["model_warmup"]
    assert sample["batch_size"] == [1] and sample["inputs"][0]["value"][0]["dims"] == [2, 16]
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_CPU"]}]
    done = cli("bundle", run, "--out", tmp_path / "other", "--max-batch", "4")
    assert done.code == 2 and "has no dynamic batch" in done.stderr and not (tmp_path / "other").exists()


def test_optimizers_that_a_graph_does_not_bear_are_off(gpt2: Path, tmp_path: Path) -> None:
    run = copied(gpt2, tmp_path / "run")
    certificate = read_json(run / "certificate.json") | {"disabled_optimizers": ["QDQPropagationTransformer"]}
    write_json(run / "certificate.json", certificate)
    config = parsed((written(run, tmp_path / "repository") / "config.pbtxt").read_text())
    assert config["optimization"] == [{"graph": [{"level": [2]}]}]
    assert "optimization" not in parsed((written(gpt2, tmp_path / "plain") / "config.pbtxt").read_text())


def test_a_plan_is_bundled_with_its_profiles(gpt2: Path, tmp_path: Path) -> None:
    run = with_plan(gpt2, tmp_path / "run")
    model = written(run, tmp_path / "repository", backend="tensorrt")
    config = parsed((model / "config.pbtxt").read_text())
    assert config["platform"] == ["tensorrt_plan"] and config["backend"] == ["tensorrt"]
    assert [file.name for file in (model / "1").iterdir()] == ["model.plan"]
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"], "profile": ["0", "1"]}]
    assert [sample["batch_size"] for sample in config["model_warmup"]] == [[2], [4]]
    done = cli("bundle", run, "--out", tmp_path / "more", "--backend", "tensorrt", "--max-batch", "9")
    assert done.code == 2 and "the plan's profiles go to 8" in done.stderr


def with_plan(run: Path, folder: Path) -> Path:
    """A copy of the run for an A10, with a plan of TensorRT that nothing here can load."""
    shapes = {"sequence": [1, 16, 32]}
    profiles = [{"batch": [1, 2, 4], **shapes}, {"batch": [1, 4, 8], **shapes}]
    copied(run, folder, target="a10", profiles=profiles)
    (folder / "engine" / "model.plan").write_bytes(b"a plan")
    facts = read_json(folder / "engine" / "build.json") | {
        "backend": "tensorrt",
        "target": "a10",
        "versions": {"tensorrt": "11.1.0.5"},
        "plan": {"sha256": sha256_file(folder / "engine" / "model.plan"), "bytes": 6},
        "profiles": profiles,
    }
    write_json(folder / "engine" / "build.json", facts)
    return folder


# The command --------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_and_the_record_holds_every_file(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "repository"
    done = cli("bundle", bert, "--out", out, "--json")
    assert done.code == 0
    record = done.json()
    assert record == {"path": str(out), **read_json(out / "bundle.json")}
    assert record["run"] == bert.name and record["verdict"] == "accept" and record["target"] == "cpu"
    assert record["onnx_sha256"] == read_json(bert / "parity.json")["onnx"]["sha256"]
    assert (
        any(name.startswith("onnxruntime") for name in record["versions"]) and record["name"] == "tiny-bert"
    )
    names = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert names == {*record["files"], "bundle.json"} and "tiny-bert/tokenizer.json" in names
    assert all(sha256_file(out / name) == digest for name, digest in record["files"].items())
    again = cli("bundle", bert, "--out", out)
    assert again.code == 0 and again.stdout.splitlines()[-1] == f"accept  tiny-bert  onnxruntime  {out}"
    assert [item.name for item in out.parent.iterdir()] == ["repository"]


def test_what_is_there_is_never_overwritten_unless_it_is_this_bundle(gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for content in (None, "no JSON", '{"run": "another"}', "[]"):
        if content is not None:
            (out / "bundle.json").write_text(content)
        done = cli("bundle", gpt2, "--out", out)
        assert done.code == 2 and "is not empty and is not this bundle" in done.stderr
        assert "fix: name a new folder" in done.stderr
        assert (out / "mine.txt").read_text() == "mine" and not (out / "tiny").exists()
    shutil.rmtree(out)
    assert cli("bundle", gpt2, "--out", out).code == 0
    assert cli("bundle", gpt2, "--out", out, "--name", "other").code == 2
    assert cli("bundle", gpt2, "--out", out, "--instances", "2").code == 0
    assert "count: 2" in (out / "tiny" / "config.pbtxt").read_text()


@pytest.mark.parametrize(("verdict", "code"), [("regression", 3), ("anomalous", 4), ("inconclusive", 3)])
def test_a_run_that_was_not_accepted_is_refused(verdict: str, code: int, gpt2: Path, tmp_path: Path) -> None:
    run = copied(gpt2, tmp_path / "run")
    write_json(run / "verdict.json", {"verdict": verdict, "goals": [], "reasons": ["it lost too much"]})
    out = tmp_path / "repository"
    done = cli("bundle", run, "--out", out)
    assert done.code == code and f"ended with {verdict}: it lost too much" in done.stderr
    assert "--force" in done.stderr and not out.exists()
    forced = cli("bundle", run, "--out", out, "--force", "--json")
    assert forced.code == 0 and forced.json()["verdict"] == verdict
    assert f'"{verdict}"' in (out / "tiny" / "config.pbtxt").read_text()


def test_a_graph_whose_default_session_misses_the_goals_is_refused(gpt2: Path, tmp_path: Path) -> None:
    run, out = copied(gpt2, tmp_path / "run"), tmp_path / "bundle"
    verdict = read_json(run / "verdict.json")
    assert verdict["verdict"] == "accept" and verdict["deployed"]["passed"]
    parity = read_json(run / "parity.json")
    (row,) = [row for row in parity["rows"] if row["stage"] == "onnx"]
    row["deployed"]["metrics"]["test.perplexity"] *= 40
    write_json(run / "parity.json", parity)
    done = cli("bundle", run, "--out", out)
    assert done.code == 3 and "which Triton serves" in done.stderr and "test.perplexity" in done.stderr
    assert not out.exists()
    forced = cli("bundle", run, "--out", out, "--force", "--json")
    assert forced.code == 0 and not forced.json()["deployed"]["passed"]


def test_a_graph_that_was_not_measured_is_refused_with_force_too(gpt2: Path, tmp_path: Path) -> None:
    run = copied(gpt2, tmp_path / "run")
    with (run / "model.onnx").open("ab") as file:
        file.write(b"\0")
    for words in ((), ("--force",)):
        done = cli("bundle", run, "--out", tmp_path / "repository", *words)
        assert done.code == 4 and "is not the file that was measured" in done.stderr
    parity = read_json(run / "parity.json")
    del parity["onnx"]
    write_json(run / "parity.json", parity)
    done = cli("bundle", run, "--out", tmp_path / "repository")
    assert done.code == 4 and "does not say which graph was measured" in done.stderr
    assert not (tmp_path / "repository").exists()


def test_what_cannot_be_bundled_says_why(gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    deferred = copied(gpt2, tmp_path / "deferred", target="a10")
    (deferred / "engine" / "model.plan").unlink()
    for words, message in (
        (("--format", "bento"), "unknown format 'bento'"),
        (("--backend", "openvino"), "unknown backend 'openvino'"),
        (("--name", "../out"), "is not a valid model name"),
        (("--backend", "tensorrt"), "target rtx-ada takes plans of TensorRT-RTX"),
    ):
        done = cli("bundle", gpt2, "--out", out, *words)
        assert done.code == 2 and message in done.stderr and "fix: " in done.stderr
    done = cli("bundle", deferred, "--out", out, "--backend", "tensorrt")
    assert done.code == 2 and "has no plan for a10" in done.stderr
    assert cli("bundle", tmp_path, "--out", out).code == 2 and not out.exists()


def test_types_and_shapes_that_triton_has_not_are_refused(gpt2: Path, tmp_path: Path) -> None:
    def complex_output(model: onnx.ModelProto) -> None:
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.COMPLEX64

    def shapeless(model: onnx.ModelProto) -> None:
        model.graph.output[0].type.tensor_type.ClearField("shape")

    for number, (change, message) in enumerate(
        ((complex_output, "of type COMPLEX64"), (shapeless, "has no declared shape"))
    ):
        run = copied(gpt2, tmp_path / f"run-{number}", target="cpu")
        with_graph(run, change)
        with pytest.raises(ExportError, match=message):
            written(run, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_nothing_stays_where_writing_fails(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> str:
        raise ExportError("planted")

    monkeypatch.setattr(triton, "to_text", fail)
    with pytest.raises(ExportError, match="planted"):
        written(gpt2, tmp_path / "here" / "repository")
    assert list((tmp_path / "here").iterdir()) == []


def test_the_bill_of_materials_names_every_file_and_package(gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    assert cli("bundle", gpt2, "--out", out).code == 0
    bill = read_json(out / "sbom.cdx.json")
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    model = bill["metadata"]["component"]
    hashes = {item["name"]: item["hashes"][0]["content"] for item in model["components"]}
    written_files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert hashes.keys() == written_files - {"sbom.cdx.json", "bundle.json"}
    assert all(sha256_file(out / name) == digest for name, digest in hashes.items())
    names = {item["name"]: item for item in bill["components"]}
    assert names["onnx"]["purl"].startswith("pkg:pypi/onnx@") and "recipe.resolved.yaml" in names
    references = [item["bom-ref"] for item in [*bill["components"], *model["components"]]]
    assert len(set(references)) == len(references)
    assert "sbom.cdx.json" in read_json(out / "bundle.json")["files"]
    second = tmp_path / "second"
    assert cli("bundle", gpt2, "--out", second).code == 0
    assert (second / "sbom.cdx.json").read_bytes() == (out / "sbom.cdx.json").read_bytes()


@pytest.mark.parametrize("forged", ['{"files": {"model.safetensors": "0"}}', "[]", "no JSON", ""])
def test_the_bill_of_materials_takes_no_digest_from_a_damaged_cache(
    forged: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    run = finished(tiny_model, text_file).copy(tmp_path / "project").latest
    (Path(read_json(run / "manifest.json")["stages"]["load"]["path"]) / "float.json").write_text(forged)
    done = cli("bundle", run, "--out", tmp_path / "repository")
    assert done.code == 4 and "float.json" in done.stderr and "fix: " in done.stderr
    assert not (tmp_path / "repository").exists()


def test_the_bill_of_materials_leaves_out_a_checkpoint_that_the_cache_lost(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    project = finished(tiny_model, text_file).copy(tmp_path / "project")
    run = project.latest
    shutil.rmtree(read_json(run / "manifest.json")["stages"]["load"]["path"])
    assert cli("bundle", run, "--out", tmp_path / "repository").code == 0
    names = [item["bom-ref"] for item in read_json(tmp_path / "repository" / "sbom.cdx.json")["components"]]
    assert "file:recipe.resolved.yaml" in names and not any(name.startswith("checkpoint:") for name in names)
