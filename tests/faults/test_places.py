"""Destinations that are read-only, full, gone, too long, or something else than a file or a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attacked import attacked, refused
from graphs import linear
from lines import Project, Result, cli, finished

from qcompress import api
from qcompress.artifacts import write_text
from qcompress.places import append_whole, demand_place, write_named

pytestmark = pytest.mark.attack("read-only and vanished places")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Project:
    return finished(tiny_model, text_file).copy(tmp_path_factory.mktemp("places") / "project")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("graph") / "model.onnx"
    file.write_bytes(linear().SerializeToString())
    return file


def mount(place: Path, *options: str) -> None:
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "qcompress-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")


@pytest.fixture
def unmounted(tmp_path: Path) -> Iterator[list[Path]]:
    mounted: list[Path] = []
    yield mounted
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


# Destinations -------------------------------------------------------------------------------------------


def read_only(folder: Path, mounted: list[Path]) -> Path:
    mount(folder / "ro", "ro")
    mounted.append(folder / "ro")
    return folder / "ro" / "made"


def deep_read_only(folder: Path, mounted: list[Path]) -> Path:
    return read_only(folder, mounted) / "a" / "b"


def full(folder: Path, mounted: list[Path]) -> Path:
    mount(folder / "full", "size=8k")
    mounted.append(folder / "full")
    (folder / "full" / "ballast").write_bytes(bytes(8192))
    return folder / "full" / "made"


def without_inodes(folder: Path, mounted: list[Path]) -> Path:
    mount(folder / "few", "nr_inodes=1")
    mounted.append(folder / "few")
    return folder / "few" / "made"


def immutable(folder: Path, mounted: list[Path]) -> Path:
    place = folder / "immutable"
    place.mkdir()
    if (
        shutil.which("chattr") is None
        or subprocess.run(["chattr", "+i", place], capture_output=True).returncode
    ):
        pytest.skip("this file system has no immutable folders")
    return place / "made"


def below_a_file(folder: Path, mounted: list[Path]) -> Path:
    (folder / "file").write_text("kept")
    return folder / "file" / "made"


def far_below_a_file(folder: Path, mounted: list[Path]) -> Path:
    return below_a_file(folder, mounted) / "a" / "b"


def long_name(folder: Path, mounted: list[Path]) -> Path:
    return folder / ("n" * 300)


def long_parent(folder: Path, mounted: list[Path]) -> Path:
    return folder / ("n" * 300) / "made"


def long_path(folder: Path, mounted: list[Path]) -> Path:
    return folder / "/".join(["n" * 200] * 25) / "made"


def circle(folder: Path, mounted: list[Path]) -> Path:
    (folder / "circle").symlink_to(folder / "circle")
    return folder / "circle" / "made"


def lost_link(folder: Path, mounted: list[Path]) -> Path:
    (folder / "lost").symlink_to("/proc/nowhere")
    return folder / "lost" / "made"


def in_proc(folder: Path, mounted: list[Path]) -> Path:
    return Path("/proc/qcompress-test/made")


def in_sys(folder: Path, mounted: list[Path]) -> Path:
    return Path("/sys/qcompress-test")


PLACES: dict[Callable[[Path, list[Path]], Path], int] = {
    read_only: 6, deep_read_only: 6, full: 6, without_inodes: 6, immutable: 6, below_a_file: 2,
    far_below_a_file: 2, long_name: 2, long_parent: 2, long_path: 2, circle: 2, lost_link: 6, in_proc: 6,
    in_sys: 6,
}  # fmt: skip

QUICK = (read_only, below_a_file, long_name)

COMMANDS: dict[str, Callable[[Path, Path, Path], list[str | Path]]] = {
    "report": lambda run, graph, to: ["report", run, "--out", to],
    "promote": lambda run, graph, to: ["baseline", "promote", run, "--out", to],
    "junit": lambda run, graph, to: ["gate", "--candidate", run, "--junit", to],
    "quality": lambda run, graph, to: ["gate", "--candidate", run, "--code-quality", to],
    "summary": lambda run, graph, to: ["gate", "--candidate", run, "--github"],
    "build": lambda run, graph, to: ["build", graph, "--target", "rtx-ada", "--out", to],
    "bundle": lambda run, graph, to: ["bundle", run, "--out", to],
    "sensitivity": lambda run, graph, to: [
        "sensitivity", run.parents[2] / "recipe.yaml", "--out", to, "--try", "int8"
    ],
    "run": lambda run, graph, to: ["run", run.parents[2] / "recipe.yaml", "--out", to],
    "init": lambda run, graph, to: [
        "init", "--model", run.parents[2] / "model", "--data", run.parents[2] / "text.txt", "--target", "cpu",
        "--out", to.with_name(f"{to.name}.yaml"),
    ],
}  # fmt: skip


def listed(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def told(result: Result, *codes: int) -> None:
    assert result.code in codes, (result.code, result.stdout, result.stderr)
    assert "error: " in result.stderr and "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize(
    ("command", "place"),
    [
        pytest.param(command, place, marks=() if command == "report" and place in QUICK else pytest.mark.slow)
        for command in COMMANDS
        for place in PLACES
    ],
)
def test_a_destination(
    command: str,
    place: Callable[[Path, list[Path]], Path],
    project: Project,
    graph: Path,
    tmp_path: Path,
    unmounted: list[Path],
) -> None:
    """Refused with its name; what was there is as it was, and nothing is left behind."""
    to = place(tmp_path, unmounted)
    before = listed(tmp_path)
    environment = {"GITHUB_STEP_SUMMARY": str(to)} if command == "summary" else {}
    found = cli(*COMMANDS[command](project.latest, graph, to), environment=environment)
    told(found, *({2, 6} if command in ("init", "run") or place is lost_link else {PLACES[place]}))
    assert to.parent.name[:60] in found.stderr or to.name[:60] in found.stderr
    if command != "run":  # what is finished stays, and goes on
        assert listed(tmp_path) == before
    if place is immutable:
        subprocess.run(["chattr", "-i", to.parent], check=True)


@pytest.mark.parametrize("command", [
    "report", *(pytest.param(one, marks=pytest.mark.slow) for one in ("promote", "junit", "quality", "init"))
])  # fmt: skip
def test_a_folder_where_a_file_should_be(command: str, project: Project, graph: Path, tmp_path: Path) -> None:
    to = tmp_path / "folder.yaml"
    to.mkdir()
    (to / "kept").write_text("kept")
    words = COMMANDS[command](project.latest, graph, to if command != "init" else tmp_path / "folder")
    found = cli(*words)
    assert found.code == 2 and "folder" in found.stderr.lower() or "directory" in found.stderr.lower()
    assert listed(tmp_path) == {"folder.yaml": b"", "folder.yaml/kept": b"kept"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["build", "bundle", "sensitivity", "run"])
def test_a_file_where_a_folder_should_be(command: str, project: Project, graph: Path, tmp_path: Path) -> None:
    to = tmp_path / "file"
    to.write_text("kept")
    told(cli(*COMMANDS[command](project.latest, graph, to)), 2)
    assert listed(tmp_path) == {"file": b"kept"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "promote", "junit", "quality", "summary"])
def test_a_disk_that_fills_keeps_the_old_file(
    command: str, project: Project, graph: Path, tmp_path: Path, unmounted: list[Path]
) -> None:
    mount(tmp_path / "disk", "size=16k")
    unmounted.append(tmp_path / "disk")
    to = tmp_path / "disk" / "kept"
    to.write_text("kept\n")
    (tmp_path / "disk" / "ballast").write_bytes(bytes(12288))
    environment = {"GITHUB_STEP_SUMMARY": str(to)} if command == "summary" else {}
    if command == "summary":
        to.write_text("k" * 4096)
    before = to.read_bytes()
    told(cli(*COMMANDS[command](project.latest, graph, to), environment=environment), 6)
    assert to.read_bytes() == before and sorted(os.listdir(to.parent)) == ["ballast", "kept"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ("verify",), ("gate", "--candidate"), ("report",), ("verify", "--layers"),
])  # fmt: skip
def test_a_run_on_a_read_only_disk(
    words: tuple[str, ...], project: Project, tmp_path: Path, unmounted: list[Path]
) -> None:
    """It is shown and bundled; what would be written into it is refused."""
    place = tmp_path / "run"
    mount(place, "size=64m")
    unmounted.append(place)
    run = place / "run"
    shutil.copytree(project.latest, run, symlinks=True)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    before = listed(run)
    told(cli(words[0], run, *words[1:]) if words[0] != "gate" else cli(*words, run), 6)
    assert listed(run) == before
    assert cli("show", run).code == 0
    assert cli("report", run, "--out", tmp_path / "page.html").code == 0
    assert cli("bundle", run, "--out", tmp_path / "bundle").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["schema"], ["list", "recipes"], ["list", "methods", "--json"], ["show"], ["show", "--json"], ["doctor"],
])  # fmt: skip
def test_a_stdout_that_is_full(words: list[str], project: Project) -> None:
    words = [*words, str(project.latest)] if words[0] == "show" else words
    ended = attacked_into("/dev/full", *words)
    assert ended.returncode == 6, ended.stderr
    assert "error: <stdout>: No space left" in ended.stderr and "Traceback" not in ended.stderr


def attacked_into(stdout: str, *words: str) -> subprocess.CompletedProcess[str]:
    from lines import environment

    with open(stdout, "w") as stream:
        return subprocess.run([sys.executable, "-m", "qcompress", *words], stdout=stream, text=True,
                              stderr=subprocess.PIPE, env=environment())  # fmt: skip


@pytest.mark.slow
def test_a_reader_that_has_gone(project: Project) -> None:
    """`| head` is not an error of the machine."""
    from lines import environment

    command = f"{sys.executable} -m qcompress schema | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment())
    assert "Traceback" not in done.stderr and "error" not in done.stderr.lower()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["gone", "gone/below"])
def test_a_current_folder_that_has_gone(where: str, project: Project, tmp_path: Path) -> None:
    (tmp_path / where).mkdir(parents=True)
    from lines import environment

    gone = f"cd {tmp_path / where} && rm -r {tmp_path / 'gone'}"
    script = f"{gone} && exec {sys.executable} -m qcompress baseline promote"

    done = subprocess.run(["bash", "-c", f"{script} {project.latest} --out here/b.json"], text=True,
                          capture_output=True, env=environment())  # fmt: skip
    assert done.returncode == 6 and "error: " in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_device_stays_a_device(project: Project, tmp_path: Path) -> None:
    """`--junit /dev/null` of a root user: no file takes the place of the device."""
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o20666, os.makedev(1, 3))
        device.write_text("")
    except OSError:
        pytest.skip("this user may not make a device")
    assert cli("gate", "--candidate", project.latest, "--junit", device).code == 0
    assert device.is_char_device() and os.listdir(tmp_path) == ["null"]
    api.promote(project.latest, device)
    assert device.is_char_device()


@pytest.mark.slow
def test_a_link_stays_a_link(project: Project, tmp_path: Path) -> None:
    (tmp_path / "link.xml").symlink_to("real.xml")
    assert cli("gate", "--candidate", project.latest, "--junit", tmp_path / "link.xml").code == 0
    assert (tmp_path / "link.xml").is_symlink() and (tmp_path / "real.xml").is_file()


@pytest.mark.slow
def test_a_pipe_that_nobody_reads(project: Project, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(attacked("gate", "--candidate", project.latest, "--junit", tmp_path / "pipe", timeout_s=60), 6,
            str(tmp_path / "pipe"))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("length", [200, 251, 252, 255])
def test_a_name_of_the_most_letters(length: int, tmp_path: Path) -> None:
    """The partial file beside it must not be longer than the file system takes."""
    for letter in ("n", "é"):
        name = letter * (length // len(letter.encode()))
        write_named(tmp_path / "new" / name, "text")
        assert (tmp_path / "new" / name).read_text() == "text"
        assert os.listdir(tmp_path / "new") == [name]
        shutil.rmtree(tmp_path / "new")


@pytest.mark.slow
def test_what_fails_within_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename fails: the old file is whole, the partial one is gone, the destination is named."""
    file = tmp_path / "file.json"
    file.write_text("kept")

    def fail(*paths: object) -> None:
        raise OSError(5, "Input/output error", *map(str, paths[:1]))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="file.json'$"):
        write_text(file, "new")
    assert listed(tmp_path) == {"file.json": b"kept"}
    with pytest.raises(Exception, match=r"file\.json: Input/output error"):
        write_named(file, "new")
    append_whole(file, " more")
    assert file.read_text() == "kept more"
    demand_place(file)
    assert listed(tmp_path) == {"file.json": b"kept more"}
