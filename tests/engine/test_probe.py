"""The probe kit and its way back: what a device gets, measures, and may hand in."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lines import (
    COMPARED,
    CONTEXT,
    NAME,
    SETS,
    Project,
    Result,
    cli,
    environment,
    finished,
    plain_session,
    python,
)
from tensorrt_api import NAMES

from qcompress.engine import probe
from qcompress.engine.probe import KIT_BYTES, SCRIPT, read_measurement, write_probe
from qcompress.errors import UsageError
from qcompress.parity.distance import Distance
from qcompress.system import strict_json
from qcompress.system.artifacts import OnnxModel, read_json
from qcompress.tasks.causal_lm import Window, kit

SAMPLES = sum(SETS.values())
KIT = {
    "inputs.npz", "reference.npz", "probe.json", "measure_engine.py", "engine_runners.py", "engine_speed.py",
    "strict_json.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file)


def arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    with np.load(file) as archive:
        return {name: archive[name] for name in archive.files}


def on_device(kit: Path, out: Path, *arguments: str) -> Result:
    """The kit's script as a device runs it: a process, the kit, and no qcompress."""
    command = [sys.executable, str(kit / SCRIPT.name), *arguments, "--out", str(out)]
    found = subprocess.run(command, env=environment(), cwd=kit, capture_output=True, text=True, timeout=300)
    return Result(found.returncode, found.stdout, found.stderr)


@pytest.fixture(scope="module")
def engine_json(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a device hands in; onnxruntime stands in for TensorRT."""
    file = tmp_path_factory.mktemp("device") / "engine.json"
    done = on_device(project.latest / "probe", file, "--onnx", str(project.latest / "model.onnx"))
    assert done.code == 0, done.stderr
    assert f"{SAMPLES} samples, perplexity" in done.stdout
    return file


# The kit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-I", "-P"])
def test_the_kit_starts_where_python_does_not_look_beside_its_script(flag: str, project: Project) -> None:
    script = project.latest / "probe" / SCRIPT.name
    done = subprocess.run([sys.executable, flag, "-B", str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kit_has_its_files_and_names_the_graph_and_the_plan(project: Project) -> None:
    kit = project.latest / "probe"
    assert {file.name for file in kit.iterdir()} == KIT
    facts = read_json(kit / "probe.json")
    build = read_json(project.latest / "engine" / "build.json")
    assert facts == {"sets": list(SETS), "onnx_sha256": build["onnx"]["sha256"],
                     "plan_sha256": build["plan"]["sha256"], "backend": "tensorrt_rtx",
                     "per_sample": "nll", "disabled_optimizers": []}  # fmt: skip
    assert (kit / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()


def test_the_inputs_are_all_windows_of_all_sets(project: Project) -> None:
    inputs = arrays(project.latest / "probe" / "inputs.npz")
    assert inputs["ids"].shape == (SAMPLES, CONTEXT) and inputs["ids"].dtype == np.int32
    assert inputs["set"].tolist() == [0] * SETS["test"] + [1] * SETS["other"]
    assert inputs["length"].tolist() == [CONTEXT] * SAMPLES and inputs["first"].tolist() == [1] * SAMPLES


def test_the_reference_is_what_the_graph_says_at_the_basic_level(project: Project) -> None:
    kit = project.latest / "probe"
    reference, ids = arrays(kit / "reference.npz"), arrays(kit / "inputs.npz")["ids"][:COMPARED]
    assert reference["logits"].shape == (COMPARED, CONTEXT, 300)
    assert reference["positions"].tolist() == list(range(CONTEXT))
    feed = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones(ids.shape, np.int64),
            "position_ids": np.tile(np.arange(CONTEXT), (COMPARED, 1))}  # fmt: skip
    logits = plain_session(project.latest / "model.onnx").run(["logits"], feed)[0]
    far = np.abs(logits - reference["logits"])
    # a rounding that flips moves a few logits visibly; everything else is the order of sums
    assert np.median(far) < 1e-5 and far.mean() < 1e-3 * np.ptp(logits)


def windows(count: int, length: int) -> list[Window]:
    return [Window(np.full(length, 7, np.int64), 1) for _ in range(count)]


def write(folder: Path, compared: int, context: int, vocabulary: int, count: int) -> Path:
    """A kit for logits of this shape, each position filled with its number; the file on disk has holes."""
    logits = np.lib.format.open_memmap(
        folder / "logits.npy", mode="w+", dtype=np.float32, shape=(compared, context, vocabulary)
    )
    logits[:, :, 0] = np.arange(context)
    logits.flush()
    onnx = OnnxModel(folder)
    onnx.file.write_bytes(b"a graph")
    arrays = kit({}, windows(count, context))
    write_probe(folder / "probe", {"test": count}, arrays, folder / "logits.npy", onnx, None)
    return folder / "probe"


@pytest.mark.parametrize(
    ("compared", "context", "vocabulary"), [(3, 1024, 50257), (64, 256, 4096), (6, 1024, 20_000)]
)
def test_the_kit_of_a_large_model_stays_within_twenty_megabytes(
    compared: int, context: int, vocabulary: int, tmp_path: Path
) -> None:
    kit = write(tmp_path, compared, context, vocabulary, 300)
    assert sum(file.stat().st_size for file in kit.iterdir()) <= KIT_BYTES == 20_000_000
    reference = arrays(kit / "reference.npz")
    positions = reference["positions"]
    samples, kept, _ = reference["logits"].shape
    assert kept == len(positions) and np.all(np.diff(positions) > 0)
    assert positions[0] == 0 and positions[-1] == context - 1  # spread over the sequence
    assert np.array_equal(reference["logits"][0, :, 0], positions)
    assert samples * kept * vocabulary * 4 > 15e6  # and it is used, not wasted


def test_a_kit_that_fits_has_every_position(tmp_path: Path) -> None:
    reference = arrays(write(tmp_path, 5, 8, 100, 5) / "reference.npz")
    assert reference["logits"].shape == (5, 8, 100) and reference["positions"].tolist() == list(range(8))


# The script ---------------------------------------------------------------------------------------


def names_after(tree: ast.AST, *path: str) -> set[str]:
    """Attributes that are read of `a.b.c`, for a path ("a", "b", "c")."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == ".".join(path):
            found.add(node.attr)
    return found


def test_the_script_needs_numpy_and_one_runtime_and_python_3_8_can_read_it() -> None:
    own = [*sorted(SCRIPT.parent.glob("*.py")), Path(strict_json.__file__)]
    assert {file.name for file in own} == {name for name in KIT if name.endswith(".py")}
    trees = [ast.parse(file.read_text(), feature_version=(3, 8)) for file in own]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {
        name.partition(".")[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported - set(sys.stdlib_module_names) == {
        "numpy", "onnxruntime", "engine_runners", "engine_speed", "strict_json",
    }  # fmt: skip
    top = {
        alias.name
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert "onnxruntime" not in top
    calls = [node.func.id for node in nodes if isinstance(node, ast.Call) and hasattr(node.func, "id")]
    assert calls.count("__import__") == 1  # of tensorrt or tensorrt_rtx, as the plan was built


def test_every_call_of_the_script_exists_in_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")
    tree = ast.parse(SCRIPT.with_name("engine_runners.py").read_text())
    used = {
        "": names_after(tree, "self", "trt"),
        "Logger": names_after(tree, "self", "trt", "Logger"),
        "TensorIOMode": names_after(tree, "self", "trt", "TensorIOMode"),
        "ICudaEngine": names_after(tree, "self", "engine"),
        "IExecutionContext": names_after(tree, "self", "context"),
        "Runtime": names_after(tree, "runtime"),
    }
    assert {owner: len(names) for owner, names in used.items()} == {
        "": 5, "Logger": 1, "TensorIOMode": 1, "ICudaEngine": 8, "IExecutionContext": 6, "Runtime": 2,
    }  # fmt: skip
    ask = (
        "import json, sys, tensorrt_rtx as trt\n"
        "for owner, names in json.loads(sys.argv[1]).items():\n"
        "    for name in names:\n"
        "        if not hasattr(getattr(trt, owner) if owner else trt, name): print(owner, name)\n"
    )
    asked = python(ask, json.dumps({owner: sorted(names) for owner, names in used.items()}))
    assert asked.code == 0, asked.stderr
    assert asked.stdout == ""
    for version, known in NAMES.items():
        for owner in ("TensorIOMode", "ICudaEngine", "IExecutionContext", "Runtime"):
            assert used[owner] <= set(known[owner].split()), (version, owner)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_inside_a_plan_runs_only_where_the_user_trusts_it(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trusted: bool
) -> None:
    """A version-compatible plan holds a runtime of its own."""
    allowed = []

    class Runtime:
        def __init__(self, logger: object) -> None:
            self.engine_host_code_allowed = True

        def deserialize_cuda_engine(self, plan: bytes) -> None:
            allowed.append(self.engine_host_code_allowed)

    class Logger:
        WARNING = 2

        def __init__(self, level: int) -> None:
            pass

    fake = SimpleNamespace(Runtime=Runtime, Logger=Logger, __version__="11.4.0")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    (tmp_path / "model.plan").write_bytes(b"plan")
    with pytest.raises(RuntimeError, match="cannot load"):
        script.TensorRTRunner(tmp_path / "model.plan", "tensorrt", trusted)
    assert allowed == [trusted]


def test_the_script_refuses_a_file_that_is_not_the_kits(project: Project, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes((project.latest / "model.onnx").read_bytes() + b"\0")
    for option in ("--onnx", "--plan"):
        done = on_device(project.latest / "probe", tmp_path / "engine.json", option, str(other))
        assert done.code == 1 and "is not the file that this probe belongs to" in done.stderr
    assert not (tmp_path / "engine.json").exists()


def test_what_the_script_measured_is_what_the_onnx_row_measured(project: Project, engine_json: Path) -> None:
    found = json.loads(engine_json.read_text())
    assert found["format"] == probe.FORMAT and found["measured"] == "onnx"
    assert len(found["nll"]) == len(found["correct"]) == SAMPLES
    assert "onnxruntime" in found["versions"]
    deployed = next(
        row for row in read_json(project.latest / "parity.json")["rows"] if row["stage"] == "onnx"
    )["deployed"]["metrics"]
    for index, name in enumerate(SETS):
        of_set = arrays(project.latest / "probe" / "inputs.npz")["set"] == index
        nll = np.array(found["nll"])[of_set]
        perplexity = math.exp(nll.sum() / (SETS[name] * (CONTEXT - 1)))
        assert perplexity == pytest.approx(deployed[f"{name}.perplexity"], rel=1e-6)


class Canned:
    """A runner that gives prepared logits and notes what it was asked."""

    def __init__(self, logits: np.ndarray, limits: dict[int, int]) -> None:
        self.logits, self.limits, self.asked = logits, limits, []

    def largest_batch(self, length: int) -> int:
        return self.limits.get(length, 0)

    def __call__(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        ids = feed["input_ids"]
        self.asked.append(ids.shape)
        assert feed["attention_mask"].all() and (feed["position_ids"] == np.arange(ids.shape[1])).all()
        return self.logits[ids[:, 0], : ids.shape[1]]


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module, without a kit around it."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("measure_engine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        patch.setitem(sys.modules, "strict_json", strict_json)
        spec.loader.exec_module(module)
    return module


def inputs_of(lengths: list[int], first: list[int]) -> dict[str, np.ndarray]:
    """Windows whose first token is their number."""
    ids = np.random.default_rng(0).integers(0, 11, (len(lengths), max(lengths))).astype(np.int32)
    ids[:, 0] = np.arange(len(lengths))
    return {"ids": ids, "length": np.array(lengths, np.int32), "first": np.array(first, np.int32)}


def test_the_script_counts_as_the_task_does_and_batches_as_the_engine_allows(script: Any) -> None:
    from qcompress.tasks import TASKS

    inputs = inputs_of([6, 6, 6, 4, 4], [1, 2, 5, 1, 3])
    logits = np.random.default_rng(1).normal(size=(5, 6, 11)).astype(np.float32)
    runner = Canned(logits, {6: 2, 4: 8})
    reference, positions = logits[:4] + 0.25, np.array([0, 2, 5])
    nll, correct, far, _ = script.run(runner, inputs, reference[:, positions], positions, limit=8)
    assert runner.asked == [(2, 6), (1, 6), (2, 4)]
    windows = [
        Window(inputs["ids"][row, :length].astype(np.int64), int(inputs["first"][row]))
        for row, length in enumerate(inputs["length"])
    ]
    expected = TASKS["causal-lm"].measure(windows, logits)
    assert nll == pytest.approx([sample["nll"] for sample in expected], rel=1e-6)
    assert correct == [sample["correct"] for sample in expected]
    distance = Distance(to="onnx")
    for row in range(4):
        known = positions[positions < inputs["length"][row]]
        distance.add(reference[row, known], logits[row, known])
    expected = distance.to_json()
    assert far.keys() == expected.keys() and far["positions"] == 3 * 3 + 2
    assert far.pop("to") == expected.pop("to")
    for name, value in expected.items():
        assert far[name] == pytest.approx(value, rel=1e-6), name


def test_the_script_says_which_length_no_profile_accepts(script: Any) -> None:
    runner = Canned(np.zeros((2, 6, 11), np.float32), {4: 1})
    with pytest.raises(RuntimeError, match="no profile of this engine accepts a sequence of 6 tokens"):
        script.run(runner, inputs_of([4, 6], [1, 1]), np.zeros((1, 2, 11)), np.arange(2), limit=8)


def test_the_script_reports_equal_logits_as_strict_json(script: Any) -> None:
    logits = np.random.default_rng(1).normal(size=(2, 6, 11)).astype(np.float32)
    *_, far, _ = script.run(Canned(logits, {6: 8}), inputs_of([6, 6], [1, 1]), logits, np.arange(6), limit=8)
    assert far["snr_db"] is None and far["max_abs"] == 0.0
    json.dumps(far, allow_nan=False)


# Back again ---------------------------------------------------------------------------------------


@pytest.fixture
def hand_in(project: Project, engine_json: Path, tmp_path: Path) -> Callable[..., Any]:
    """`hand_in(nll=[...])`: read engine.json with these changes; a value of None takes a key away."""

    def read(text: str | None = None, **changes: Any) -> Any:
        found = {**json.loads(engine_json.read_text()), **changes}
        content = json.dumps({key: value for key, value in found.items() if value is not None})
        file = tmp_path / "engine.json"
        file.write_text(content if text is None else text)
        return read_measurement(file, project.latest / "probe", project.latest / "model.onnx")

    return read


def test_a_sound_measurement_is_read_by_set(hand_in: Callable[..., Any], engine_json: Path) -> None:
    found = hand_in()
    assert {name: len(samples) for name, samples in found.samples.items()} == SETS
    whole = [sample["nll"] for samples in found.samples.values() for sample in samples]
    assert whole == json.loads(engine_json.read_text())["nll"]
    assert {sample["tokens"] for samples in found.samples.values() for sample in samples} == {CONTEXT - 1}
    assert found.facts["measured"] == "onnx" and "onnxruntime" in found.facts["versions"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"onnx_sha256": "0" * 64}, "measured on another graph .sha256 000000000000"),
        ({"inputs_sha256": "1" * 64}, "measured on another inputs .sha256 111111111111"),
        ({"measured": "plan", "file_sha256": "2" * 64}, "measured on another plan .sha256 222222222222"),
        ({"nll": [1.0]}, "has 1 samples under 'nll', the probe has 17"),
        ({"correct": [1] * 18}, "has 18 samples under 'correct', the probe has 17"),
        ({"nll": None}, "is not a measurement .KeyError.'nll'"),
        ({"nll": 3}, "is not a measurement"),
        ({"nll": ["many"] * 17}, "is not a measurement"),
        ({"distance": None}, "is not a measurement"),
        ({"distance": {"to": "onnx"}}, "is not a measurement"),
        ({"distance": 3}, "is not a measurement"),
        ({"format": 99}, "format 99, and this version reads 1"),
        ({"text": '{"format": 1, "nll": [1.0, 2.'}, "is not a measurement"),
        ({"text": "[]"}, "is not a measurement"),
        ({"text": ""}, "is not a measurement"),
    ],
)
def test_a_measurement_that_does_not_belong_to_the_run_is_refused(
    changes: dict[str, Any], message: str, hand_in: Callable[..., Any]
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        hand_in(**changes)
    assert refused.value.exit_code == 2 and refused.value.fix


def test_a_measurement_that_does_not_exist_is_refused(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent.json does not exist"):
        read_measurement(tmp_path / "absent.json", project.latest / "probe", project.latest / "model.onnx")


def test_a_plan_built_on_the_device_is_accepted_where_none_was_built_here(
    hand_in: Callable[..., Any], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deferred build: the kit knows no plan to hold the measurement against."""
    facts = {**read_json(project.latest / "probe" / "probe.json"), "plan_sha256": None}
    monkeypatch.setattr(probe, "read_json", lambda path: facts)
    assert hand_in(measured="plan", file_sha256="2" * 64).facts["file_sha256"] == "2" * 64


def test_verify_takes_the_engine_row_in(project: Project, engine_json: Path, tmp_path: Path) -> None:
    mine = project.copy(tmp_path / "mine")
    done = cli("verify", mine.latest, "--engine", engine_json, "--json")
    assert done.code == 0, done.stderr
    rows = {row["stage"]: row for row in done.json()["parity"]["rows"]}
    engine, onnx = rows["engine"], rows["onnx"]
    assert engine["status"] == "measured" and engine["samples"] == SAMPLES
    assert engine["measured_on"]["measured"] == "onnx"
    for name, value in onnx["deployed"]["metrics"].items():
        assert engine["metrics"][name] == pytest.approx(value, rel=1e-6), name
    assert len(engine["metrics"]) == 4 and engine["distance"]["to"] == "onnx"
    from qcompress.parity.sample_results import read_samples

    for name, entry in read_samples(mine.latest / "samples.json.gz").items():
        assert list(entry["rows"]) == ["engine", "float", "folded", "onnx", "trained"]
        assert len(entry["rows"]["engine"]["nll"]) == SETS[name]
    assert done.json()["verdict"]["not_measured"] == []
    shown = cli("show", mine.latest)
    assert shown.stdout.splitlines()[-1] == f"accept  {NAME}  {mine.latest}"


def test_verify_refuses_a_foreign_measurement_and_leaves_the_run_as_it_was(
    project: Project, engine_json: Path, tmp_path: Path
) -> None:
    mine = project.copy(tmp_path / "mine")
    before = (mine.latest / "parity.json").read_bytes()
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps({**json.loads(engine_json.read_text()), "onnx_sha256": "0" * 64}))
    done = cli("verify", mine.latest, "--engine", foreign)
    assert done.code == 2 and "measured on another graph" in done.stderr
    assert (mine.latest / "parity.json").read_bytes() == before
