"""The command `report`, the page at the end of a run, and pages about several runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from lines import Project, cli, finished, python
from pages import look_up, read, same

from qcompress import api
from qcompress.errors import UsageError
from qcompress.report.html import subprocess_writer

PAGE = "report.html"


@pytest.fixture
def project(tiny_model: Path, text_file: Path, tmp_path: Path) -> Project:
    return finished(tiny_model, text_file).copy(tmp_path / "copy")


@pytest.fixture
def pair(project: Project, tmp_path: Path) -> list[Path]:
    """A run, and a copy of it whose last metrics were changed in the report alone."""
    copies = [shutil.copytree(project.latest, tmp_path / name) for name in ("first", "second")]
    content = json.loads((copies[1] / "parity.json").read_text())
    content["rows"][3]["metrics"]["other.perplexity"] *= 1.5
    (copies[1] / "parity.json").write_text(json.dumps(content))
    return copies


# The command --------------------------------------------------------------------------------------


def test_the_page_goes_into_the_run_or_where_it_is_told(project: Project, tmp_path: Path) -> None:
    done = cli("report", project.latest)
    assert done.code == 0 and done.stdout.startswith(str(project.latest / PAGE))
    done = cli("report", project.latest, "--out", tmp_path / "new" / "page.html", "--json")
    file = tmp_path / "new" / "page.html"
    assert done.json() == {"path": str(file), "bytes": file.stat().st_size}
    assert file.read_bytes() == (project.latest / PAGE).read_bytes()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    done = cli("report", tmp_path)
    assert done.code == 2 and "is not a finished run" in done.stderr and not done.stdout
    with pytest.raises(UsageError, match="a report has no arms"):
        api.report([f"lsq={tmp_path}"])


WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnxruntime", "sklearn", "datasets"):
            raise ModuleNotFoundError(f"refused: {name}")

sys.meta_path.insert(0, Refuse())
from qcompress.cli.main import app
app(["report", *sys.argv[1:]], standalone_mode=False)
"""


def test_a_page_needs_no_torch(project: Project) -> None:
    done = python(WITHOUT, str(project.latest))
    assert done.code == 0 and (project.latest / PAGE).is_file(), done.stderr


# At the end of a run ------------------------------------------------------------------------------


def test_a_run_ends_with_its_page(project: Project) -> None:
    assert not (project.latest / PAGE).exists()
    done = cli(*project.command())
    assert done.code == 0 and "accept" in done.stdout and "no report.html" not in done.stderr
    assert "Verdict" in (project.latest / PAGE).read_text()


def test_a_page_that_fails_changes_nothing_but_a_line(project: Project) -> None:
    (project.latest / PAGE).mkdir()  # where no file can be put
    (project.latest / PAGE / "full").touch()
    before = cli("show", project.latest)
    done = cli(*project.command())
    assert (done.code, done.stdout) == (0, before.stdout)
    assert "no report.html: " in done.stderr


@pytest.mark.parametrize(
    ("program", "said"),
    [("import sys; sys.exit('broken')", "no report.html: broken"),
     ("import os; os.abort()", "no report.html: exit code -6"),
     ("import time; time.sleep(60)", "no report.html: it took more than 1 s")],
)  # fmt: skip
def test_however_it_fails(program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(subprocess_writer.sys, "executable", str(script))
    monkeypatch.setattr(subprocess_writer, "TIMEOUT_S", 1.0)
    told: list[str] = []
    subprocess_writer.write_beside(tmp_path, told.append)
    assert len(told) == 1 and told[0].startswith(said)


def test_without_the_packages_there_is_no_page_and_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess_writer, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess_writer.subprocess, "run", None)
    told: list[str] = []
    subprocess_writer.write_beside(tmp_path, told.append)
    assert told == ["no report.html: it needs jinja2 and matplotlib"]


def test_a_new_verdict_makes_the_page_anew(project: Project) -> None:
    cli("report", project.latest)
    goals = project.latest / "recipe.resolved.yaml"
    goals.write_text(goals.read_text().replace("test.perplexity: 10000", "test.perplexity: 1"))
    (project.latest / ".placed.json").unlink()  # which knows the run's own goals
    assert cli("gate", "--candidate", project.latest).code == 4
    assert read(project.latest / PAGE).all("p")[0].text == "anomalous"


def test_a_run_that_has_no_page_gets_none_from_the_gate(project: Project) -> None:
    assert cli("gate", "--candidate", project.latest).code == 0
    assert not (project.latest / PAGE).exists()


# Several runs -------------------------------------------------------------------------------------


def test_several_runs_stand_beside_each_other(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("report", *pair).code == 0
    page = read(tmp_path / PAGE)
    pointed = [node.attributes for node in page.figures if "data-from" in node.attributes]
    assert len(pointed) > 50
    assert {figure["data-from"].partition("/")[0] for figure in pointed} == {"0", "1"}
    for figure in pointed:
        assert same(json.loads(figure["data-value"]), look_up(figure["data-from"], pair)), figure
    losses = page.section("losses")
    body = [[cell.text.strip() for cell in line.children] for line in losses.all("tr")]
    one, other = (
        next(line for line in body if line[1] == f"{name}.perplexity") for name in ("test", "other")
    )
    ends = [node.attributes["data-from"] for node in losses.all("data") if "data-from" in node.attributes]
    assert ends == [
        f"{place}/parity.json#/rows/3/metrics/{name}.perplexity"
        for name in ("test", "other")
        for place in (0, 1)
    ]
    assert one[4:] == ["+0", "+0", "+0", "identical"]
    assert other[4:] == ["-", "-", "-", "the per-sample results do not give it"]


def test_runs_on_other_samples_get_no_interval(pair: list[Path], tmp_path: Path) -> None:
    content = json.loads((pair[1] / "parity.json").read_text())
    content["inputs"]["test"] = "0" * 64
    (pair[1] / "parity.json").write_text(json.dumps(content))
    losses = read(api.report(pair, tmp_path / PAGE)).section("losses")
    assert "measured on other samples" in losses.text
    (pair[1] / "samples.json.gz").unlink()
    losses = read(api.report(pair, tmp_path / PAGE)).section("losses")
    assert "samples.json.gz is missing" in losses.text


def test_a_folder_of_seeds_is_its_runs(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "seeds"
    for seed in (0, 3):
        shutil.copytree(project.latest, folder / f"seed-{seed}")
    (folder / "seeds.json").write_text(json.dumps({"verdicts": {"0": "accept", "3": "accept"}}))
    page = read(api.report([folder], tmp_path / PAGE))
    assert "tiny/seed-0" in page.section("verdict").text and "tiny/seed-3" in page.section("metrics").text
