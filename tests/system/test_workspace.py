"""Laws of caching, resuming, locking and placing. Children are killed for real, disks are full for real."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from qcompress.errors import ContractError
from qcompress.system import digests, workspace
from qcompress.system.digests import write_sealed
from qcompress.system.workspace import Step, Workspace, followed, point_latest, stage_key, would_reuse

PARTS = {"recipe": "r", "values": {"format": {"weights": 8}}, "code": {"quant/lsq.py": "a" * 64}}
STEPS = 4
CHILDREN = multiprocessing.get_context("spawn")
ROOT = os.name == "posix" and os.geteuid() == 0


def open_space(folder: Path, key: str = "key", **options: object) -> Workspace:
    return Workspace(folder / "runs", folder / "cache", "recipe", key, **options)


def entry_of(folder: Path, stage: str = "train", parts: dict[str, object] = PARTS) -> Path:
    return folder / "cache" / stage / stage_key(stage, parts)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# A stage that goes on from its checkpoint, and a child process that dies in it -----------------------


def train(folder: Path, calls: Path, reached: Callable[[str], None] = lambda moment: None) -> None:
    """Writes model.bin and probe/labels, whose content depends on every step having been made once."""
    reached("start")
    checkpoint = folder / "checkpoint.json"
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "sum": 7}
    with calls.open("a") as log:
        log.write(f"{state['step']}\n")
    for step in range(state["step"], STEPS):
        state = {"step": step + 1, "sum": state["sum"] * 31 + step}
        (folder / "checkpoint.json.tmp").write_text(json.dumps(state))
        os.replace(folder / "checkpoint.json.tmp", checkpoint)
        reached(f"step {step}")
    (folder / "checkpoint-best").mkdir(exist_ok=True)
    (folder / "checkpoint-best/weights").write_text("x")
    with (folder / "model.bin").open("w") as file:
        file.write("half")
        file.flush()
        reached("half a file")
        file.write(f" and half {state['sum']}")
    reached("one file")
    (folder / "probe").mkdir(exist_ok=True)
    (folder / "probe/labels").write_text(str(state))
    (folder / "leftover.json.tmp").write_text("torn")
    reached("all files")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder: Path, moment: str) -> None:
    """Child process: run the stage and be killed at `moment`."""

    def reached(now: str) -> None:
        if now == moment:
            die()

    hash_file, write_sealed, rename = digests.sha256_file, workspace.write_sealed, os.rename

    def rename_or_die(source: Path, target: Path) -> None:
        reached("before the rename")
        rename(source, target)
        reached("after the rename")

    def write_sealed_or_die(path: Path, value: dict[str, object]) -> None:
        if moment == "half a manifest":
            path.write_text(json.dumps(value)[:40])
            die()
        write_sealed(path, value)

    def hash_or_die(path: Path) -> str:
        if path.name == "labels":
            reached("hashing")
        return hash_file(path)

    digests.sha256_file, workspace.write_sealed, os.rename = hash_or_die, write_sealed_or_die, rename_or_die
    with open_space(folder) as space:
        space.step("train", PARTS, lambda partial: train(partial, folder / "calls", reached))


def started(target: Callable[..., None], *arguments: object) -> BaseProcess:
    process = CHILDREN.Process(target=target, args=arguments)
    process.start()
    return process


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.parametrize(
    ("moment", "resumed_at"),
    [
        ("start", [0]),
        ("step 0", [0, 1]),
        ("step 2", [0, 3]),
        ("half a file", [0, 4]),
        ("one file", [0, 4]),
        ("all files", [0, 4]),
        ("hashing", [0, 4]),
        ("half a manifest", [0, 0]),
        ("before the rename", [0]),
        ("after the rename", [0]),
    ],
)
def test_a_run_killed_at_any_moment_ends_with_the_same_digest(
    tmp_path: Path, moment: str, resumed_at: list[int]
) -> None:
    child = started(train_and_die, tmp_path, moment)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert entry_of(tmp_path).exists() == (moment == "after the rename")
    with open_space(tmp_path) as space:
        step = space.step("train", PARTS, lambda partial: train(partial, tmp_path / "calls"))
    assert [int(line) for line in (tmp_path / "calls").read_text().split()] == resumed_at
    assert step.reused == (moment in ("before the rename", "after the rename"))

    with open_space(tmp_path / "whole") as space:
        whole = space.step("train", PARTS, lambda partial: train(partial, tmp_path / "calls"))
    assert step.digest == whole.digest
    assert sorted(files_of(step.path)) == ["manifest.json", "model.bin", "probe/labels"]
    assert sorted(path.name for path in step.path.parent.glob("[!.]*")) == [step.key]


def test_the_digest_is_that_of_the_content_and_the_manifest_tells_all(tmp_path: Path) -> None:
    with open_space(tmp_path) as space:
        step = space.step("train", PARTS, lambda partial: train(partial, tmp_path / "calls"))
    content = {name: data for name, data in files_of(step.path).items() if name != "manifest.json"}
    assert len(content) == 2
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    text = f"model.bin\0{hashes['model.bin']}\nprobe/labels\0{hashes['probe/labels']}\n"
    manifest = json.loads((step.path / "manifest.json").read_text())
    assert step.digest == manifest["digest"] == hashlib.sha256(text.encode()).hexdigest()
    assert manifest["files"] == {
        name: {"sha256": hashes[name], "bytes": len(content[name])} for name in content
    }
    assert (manifest["stage"], manifest["parts"]) == ("train", PARTS)
    assert step.path == entry_of(tmp_path)


def test_time_and_peak_memory_are_those_of_the_stage(tmp_path: Path) -> None:
    def make(size: int) -> Callable[[Path], None]:
        def fill(partial: Path) -> None:
            time.sleep(0.05)
            assert len(b"x" * size) == size
            (partial / "a").write_text("a")

        return fill

    with open_space(tmp_path) as space:
        large = space.step("train", PARTS, make(96 << 20))
        small = space.step("fold", PARTS, make(1))
        again = space.step("train", PARTS, make(1))
    assert 0.05 <= large.seconds < 30
    assert large.peak_mib > 96
    if sys.platform == "linux":
        assert large.peak_mib > small.peak_mib + 64  # the measurement starts anew with each stage
    assert (again.seconds, again.peak_mib, again.reused) == (large.seconds, large.peak_mib, True)


# Reuse ----------------------------------------------------------------------------------------------


def write(**files: str) -> Callable[[Path], None]:
    def make(partial: Path) -> None:
        for name, text in files.items():
            path = partial / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


def flip(file: Path, keep_times: bool = False) -> None:
    """Turn one bit in the middle of a file, as a bad disk does; the system's own write changes the times."""
    data, state = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    if keep_times:
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def manifest_of(entry: Path) -> dict[str, object]:
    return json.loads((entry / "manifest.json").read_text())


def never(partial: Path) -> None:
    raise AssertionError(f"made again: {partial}")


def test_a_finished_stage_is_reused_by_another_run_and_named_in_the_log(tmp_path: Path) -> None:
    said: list[str] = []
    with open_space(tmp_path) as space:
        first = space.step("fold", PARTS, write(a="1"))
    with open_space(tmp_path, "other", log=said.append) as space:
        second = space.step("fold", PARTS, never)
    assert (first.reused, second.reused) == (False, True)
    assert (first.digest, first.path) == (second.digest, second.path)
    assert len(said) == 1
    assert said[0].startswith("fold: reused")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda entry: (entry / "a").write_text("12"), "a has 2 bytes instead of 3"),
        (lambda entry: (entry / "a").unlink(), "a is missing"),
        (lambda entry: (entry / "a").write_text("124"), "a has other content than was written"),
        (lambda entry: flip(entry / "a", keep_times=True), "a has other content than was written"),
        (lambda entry: flip(entry / "manifest.json"), "manifest.json is missing, torn or altered"),
        (
            lambda entry: write_sealed(entry / "manifest.json", {**manifest_of(entry), "parts": {}}),
            "manifest.json belongs to another entry",
        ),
        (lambda entry: (entry / "manifest.json").unlink(), "manifest.json is missing, torn or altered"),
        (
            lambda entry: (entry / "manifest.json").write_text('{"files"'),
            "manifest.json is missing, torn or altered",
        ),
        (
            lambda entry: (entry / "manifest.json").write_text("{}"),
            "manifest.json is missing, torn or altered",
        ),
    ],
)
def test_a_damaged_entry_is_noticed_and_made_again(
    tmp_path: Path, harm: Callable[[Path], object], words: str
) -> None:
    said: list[str] = []
    with open_space(tmp_path, log=said.append) as space:
        step = space.step("fold", PARTS, write(a="123", b="4"))
        harm(step.path)
        assert would_reuse(tmp_path / "cache", "fold", PARTS) == (False, f"damaged: {words}")
        again = space.step("fold", PARTS, write(a="123", b="4"))
    assert any("damaged" in line for line in said)
    assert not again.reused
    assert (again.path / "a").read_text() == "123"
    assert would_reuse(tmp_path / "cache", "fold", PARTS) == (True, "")


def test_an_exception_leaves_the_partial_folder_for_the_next_run(tmp_path: Path) -> None:
    def fail(error: BaseException) -> Callable[[Path], None]:
        def make(partial: Path) -> None:
            (partial / "half").write_text("half")
            raise error

        return make

    with open_space(tmp_path) as space:
        with pytest.raises(KeyboardInterrupt):
            space.step("train", PARTS, fail(KeyboardInterrupt()))
        with pytest.raises(ValueError, match="diverged"):
            space.step("train", PARTS, fail(ValueError("diverged")))
        with pytest.raises(FileNotFoundError, match="no such data"):
            space.step("train", PARTS, fail(FileNotFoundError(errno.ENOENT, "no such data")))
        reused, why = would_reuse(tmp_path / "cache", "train", PARTS)
        assert (reused, why) == (False, "unfinished: goes on from where it was stopped")
        step = space.step("train", PARTS, write(rest="rest"))
    assert sorted(files_of(step.path)) == ["half", "manifest.json", "rest"]


def test_fresh_ignores_finished_and_partial_work_and_keeps_the_old_entry_until_the_new_is_ready(
    tmp_path: Path,
) -> None:
    with open_space(tmp_path) as space:
        old = space.step("fold", PARTS, write(a="old"))
    partial = old.path.with_name(old.key + ".partial")
    partial.mkdir()
    (partial / "stale").write_text("stale")
    other = old.path.with_name("0" * 64 + ".partial")
    other.mkdir()

    def make(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        assert (old.path / "a").read_text() == "old"
        (folder / "a").write_text("new")

    with open_space(tmp_path, fresh=True) as space:
        step = space.step("fold", PARTS, make)
    assert not step.reused
    assert files_of(step.path).keys() == {"a", "manifest.json"}
    assert (step.path / "a").read_text() == "new"
    assert sorted(path.name for path in step.path.parent.glob("[!.]*")) == sorted([step.key, other.name])


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({**PARTS, "values": {"format": {"weights": 4}}}, "format.weights changed (8 -> 4)"),
        ({**PARTS, "code": {"quant/lsq.py": "b" * 64}}, "code: quant/lsq.py changed"),
        (
            {**PARTS, "code": {f"{name}.py": "c" for name in "abcde"}},
            "code: a.py added, code: b.py added, code: c.py added, code: d.py added, and 2 more",
        ),
        ({**PARTS, "recipe": "another"}, ""),
        ({**PARTS, "recipe": "another", "device": "cuda"}, "never finished for this recipe"),
    ],
)
def test_would_reuse_names_what_changed_since_the_newest_entry_of_the_recipe(
    tmp_path: Path, parts: dict[str, object], why: str
) -> None:
    cache = tmp_path / "cache"
    assert would_reuse(cache, "fold", PARTS) == (False, "never finished for this recipe")
    with open_space(tmp_path) as space:
        space.step("fold", {**PARTS, "values": {"format": {"weights": 2}, "old": True}}, write(a="1"))
        space.step("fold", PARTS, write(a="1"))
    assert would_reuse(cache, "fold", parts) == (not why, why)


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    rename = os.rename

    def note(source: Path, target: Path) -> None:
        happened.append("rename")
        rename(source, target)

    monkeypatch.setattr(workspace, "sync", lambda path: happened.append(path.name))
    monkeypatch.setattr(os, "rename", note)
    with open_space(tmp_path) as space:
        step = space.step("train", PARTS, write(a="1", probe__in="2"))
    partial = step.key + ".partial"
    assert happened == ["a", "probe", "in", "manifest.json", partial, "rename", "train"]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (write(**{"manifest.json": "{}"}), "manifest.json"),
        (lambda partial: (partial / "link").symlink_to("/etc/hostname"), "link"),
        (lambda partial: os.mkfifo(partial / "pipe"), "pipe"),
    ],
)
def test_a_stage_that_leaves_no_plain_content_is_refused(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    with open_space(tmp_path) as space, pytest.raises(ContractError, match=f"stage train left {name}"):
        space.step("train", PARTS, make)
    assert not entry_of(tmp_path).exists()


# Two runs, one stage -----------------------------------------------------------------------------


def race(folder: Path, key: str, dies: bool = False) -> None:
    """Child process: make the stage, the first one until the second has said something; say how it went."""
    said: list[str] = []

    def log(line: str) -> None:
        said.append(line)
        (folder / f"{key}.said").write_text(line)

    def reached(moment: str) -> None:
        if moment == "step 1" and key == "first":
            (folder / "making").write_text(key)
            wait_for(folder / "second.said")
            if dies:
                die()

    with open_space(folder, key, log=log) as space:
        step = space.step("train", PARTS, lambda partial: train(partial, folder / "calls", reached))
    result = {"reused": step.reused, "digest": step.digest, "log": said}
    (folder / f"{key}.tmp").write_text(json.dumps(result))
    os.replace(folder / f"{key}.tmp", folder / f"{key}.json")


@pytest.mark.parametrize("dies", [False, True])
def test_of_two_runs_that_need_one_stage_one_waits_for_the_other(tmp_path: Path, dies: bool) -> None:
    first = started(race, tmp_path, "first", dies)
    wait_for(tmp_path / "making")
    second = started(race, tmp_path, "second")
    first.join(60)
    second.join(60)
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL if dies else 0, 0)
    after = json.loads((tmp_path / "second.json").read_text())
    assert f"waiting for it: process {first.pid} on" in after["log"][0]
    calls = (tmp_path / "calls").read_text().split()
    if dies:  # the second takes over what the first left
        assert calls == ["0", "2"]
        assert not after["reused"]
    else:
        before = json.loads((tmp_path / "first.json").read_text())
        assert calls == ["0"]
        assert (before["reused"], after["reused"]) == (False, True)
        assert before["digest"] == after["digest"]


# The run directory ------------------------------------------------------------------------------------

CONTENT = write(
    **{"model.onnx": "graph", "model.onnx.data": "data", "probe__in": "in", "probe__deep__x": "x"}
)
PLACE = {"model.onnx*": "./", "probe": "probe", "model.plan": "engine/model.plan", "model.onnx": "onnx/"}
PLACED = {"model.onnx", "model.onnx.data", "probe/in", "probe/deep/x", "onnx/model.onnx"}


def visible(run: Path) -> set[str]:
    return {name for name in files_of(run) if not name.startswith(".")}


def test_placing_copies_files_folders_and_globs_and_skips_what_is_not_there(tmp_path: Path) -> None:
    with open_space(tmp_path) as space:
        step = space.step("export", PARTS, CONTENT, place=PLACE)
        assert visible(space.run_dir) == PLACED
        (space.run_dir / "model.onnx").write_text("altered by the user")
        assert (step.path / "model.onnx").read_text() == "graph"
        assert not (space.run_dir / "probe").is_symlink()


def test_placing_rewrites_only_what_is_not_as_it_was_placed(tmp_path: Path) -> None:
    def states(run: Path) -> dict[str, tuple[int, int]]:
        stats = {name: (run / name).stat() for name in PLACED}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    with open_space(tmp_path) as space:
        space.step("export", PARTS, CONTENT, place=PLACE)
        before = states(space.run_dir)
        space.step("export", PARTS, never, place=PLACE)
        assert states(space.run_dir) == before
    with open_space(tmp_path, fresh=True) as space:  # the same content, made anew
        space.step("export", PARTS, CONTENT, place=PLACE)
        assert states(space.run_dir) == before
        (space.run_dir / "model.onnx").write_text("other")
        (space.run_dir / "probe/in").unlink()
        space.step("export", {**PARTS, "device": "x"}, CONTENT, place=PLACE)
        after = states(space.run_dir)
    assert {name for name in PLACED if after[name] != before[name]} == {"model.onnx", "probe/in"}
    assert (space.run_dir / "model.onnx").read_text() == "graph"
    assert (space.run_dir / "probe/in").read_text() == "in"


def test_new_content_of_the_same_size_replaces_the_old(tmp_path: Path) -> None:
    with open_space(tmp_path) as space:
        space.step("export", PARTS, write(a="old"), place={"a": "a"})
        space.step("export", {**PARTS, "device": "x"}, write(a="new"), place={"a": "a"})
        assert (space.run_dir / "a").read_text() == "new"


def test_what_a_stage_no_longer_makes_leaves_the_run_unless_a_user_altered_it(tmp_path: Path) -> None:
    place = {"model.plan": "engine/model.plan", "probe": "probe"}
    built = write(**{"model.plan": "plan", "probe__a": "a", "probe__b": "b"})
    with open_space(tmp_path) as space:
        (space.run_dir / "engine").mkdir()
        (space.run_dir / "engine/mine").write_text("mine")
        space.step("build", PARTS, built, place=place)
        assert visible(space.run_dir) == {"engine/model.plan", "engine/mine", "probe/a", "probe/b"}
        (space.run_dir / "probe/b").write_text("the user's own")
        space.step("fold", PARTS, write(x="x"), place={"x": "x", "probe": "probe"})
        assert visible(space.run_dir) == {"engine/model.plan", "engine/mine", "probe/a", "probe/b", "x"}
        space.step("build", {**PARTS, "device": "none"}, write(**{"build.json": "{}"}), place=place)
        assert visible(space.run_dir) == {"engine/mine", "probe/b", "x"}


@pytest.mark.parametrize(
    ("rule", "destination", "names"),
    [
        ("*", "keep/", {"keep/model.onnx", "keep/model.onnx.data", "keep/probe/in", "keep/probe/deep/x"}),
        ("probe/*", "kept/", {"kept/in", "kept/deep/x"}),
        ("probe/", "inputs/", {"inputs/in", "inputs/deep/x"}),
        ("probe/in", "a/b", {"a/b"}),
        ("prob", "a", set()),
        ("deep*", "a/", set()),
    ],
)
def test_a_rule_of_place_means_what_a_shell_would(
    tmp_path: Path, rule: str, destination: str, names: set[str]
) -> None:
    with open_space(tmp_path) as space:
        space.step("export", PARTS, CONTENT, place={rule: destination})
        assert visible(space.run_dir) == names


def test_a_glob_needs_a_folder(tmp_path: Path) -> None:
    with open_space(tmp_path) as space, pytest.raises(ContractError, match="must end in '/'"):
        space.step("export", PARTS, CONTENT, place={"model.onnx*": "model.onnx"})


def test_latest_names_the_run_that_finished_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs/recipe"
    latest = runs / "latest"
    open_space(tmp_path, "one").close()
    assert not os.path.lexists(latest)  # nothing has finished yet
    for key in ("one", "two", "one"):
        open_space(tmp_path, key).close()
        point_latest(runs / key)
        assert os.readlink(latest) == key
    assert latest.resolve() == followed(latest).resolve() == runs / "one"

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    open_space(tmp_path, "three").close()
    assert os.readlink(latest) == "one"
    point_latest(runs / "three")
    assert not latest.is_symlink()
    assert latest.read_text() == "three\n"
    assert followed(latest) == runs / "three"
    assert sorted(path.name for path in latest.parent.iterdir()) == ["latest", "one", "three", "two"]


def test_a_step_says_what_it_was_made_from(tmp_path: Path) -> None:
    with open_space(tmp_path) as space:
        step = space.step("fold", {**PARTS, "shape": (1, 2)}, write(a="1"))
    assert isinstance(step, Step)
    assert (step.stage, step.parts) == ("fold", {**PARTS, "shape": [1, 2]})
    assert step.key == stage_key("fold", {**PARTS, "shape": [1, 2]})


@pytest.mark.parametrize("key", ["", "/abs", "../up", "a/../../b", ".lock"])
def test_names_that_lead_out_of_the_run_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ContractError, match="cannot name something inside"):
        open_space(tmp_path, key)
    with open_space(tmp_path) as space, pytest.raises(ContractError, match="cannot name something inside"):
        space.step("fold", PARTS, write(a="1"), place={"a": key})
