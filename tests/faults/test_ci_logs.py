"""Names and values from outside reach logs, annotations and reports of a CI server as text alone."""

from __future__ import annotations

import functools
import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from attacked import attacked
from graphs import linear
from lines import Result, cli
from markdown_it import MarkdownIt

from qcompress.parity.sample_results import write_samples
from qcompress.recipe.load import dump_recipe
from qcompress.report.ci_formats import annotations, code_quality, step_summary
from qcompress.schema.recipe import Recipe
from qcompress.system.artifacts import write_json
from qcompress.system.printable import HIDDEN, Guard, guarded, say
from qcompress.system.reporter import Reporter
from qcompress.verdict.judge import write_verdict
from qcompress.verdict.junit import junit

pytestmark = pytest.mark.attack("injection into CI logs")

HOSTILE = {
    "newline": "de\n::warning file=x.py,line=1::owned",
    "return": "de\r::error::owned",
    "both": "de\r\n::set-output name=x::owned",
    "blanks": "de\n \t  ::add-mask::owned",
    "indented": "de\n  ::stop-commands::owned",
    "next-line": "de\x85::error::owned",
    "line-separator": "de\u2028::error::owned\u2029::error::owned",
    "first-version": "##[error]owned",
    "azure": "##vso[task.setvariable variable=PATH]/tmp",
    "teamcity": "de\n##teamcity[buildStatus status='SUCCESS']",
    "gitlab-section": "section_start:1:x\r\x1b[0Kowned",
    "colour": "\x1b[31mred\x1b[0m",
    "clear": "\x1b[2J\x1b[1;1Haccept",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;https://evil.example\x1b\\accept\x1b]8;;\x1b\\",
    "c1": "\x9b31mred",
    "bidi": "\u202etpecca\u202c \u2066x\u2069",
    "backspace": "fail\b\b\b\bpass",
    "delete": "a\x7fb\x00c",
    "markup": "[red]accept[/red] [/] [link=https://evil.example]x[/link]",
    "emoji": ":warning: :smile:",
    "escaped": "%0A::error::owned%0D",
    "table": "a | b || `c` \\| d",
    "html": "<img src=x onerror=alert(1)> <details> &lt;b&gt; <!-- ",
    "markdown": "**x** __y__ ~~z~~ `` ` `` [a](javascript:alert(1)) ![b](https://evil.example/x.png)",
    "addresses": "https://evil.example www.evil.example @everyone #1 <https://evil.example>",
    "entities": "]]> ]]&gt; &#10;::error::x &amp;",
    "tags": "x\U000e0041\U000e0042 \ufeff\u200b",
}

NAMES = tuple(HOSTILE)
each = pytest.mark.parametrize(
    "name", [pytest.param(one, marks=() if one == "newline" else pytest.mark.slow) for one in NAMES]
)

OURS = re.compile(r"::(error|warning|notice) file=[^:,\s]+,title=qcompress gate[^:,\s]* ?[a-z]*::\S.*")
COMMAND = re.compile(r"##\w*\[")
UNSEEN = re.compile(f"[{HIDDEN}]")


def commands(text: str) -> list[str]:
    """Lines that GitHub's runner takes for commands; it drops blanks before them."""
    return [line for line in re.split(r"[\r\n]", text) if line.strip().startswith("::")]


def harmless(*texts: str, ours: int = 0) -> None:
    """No line is a command but `ours` annotations, and no character is hidden."""
    text = "\n".join(texts)
    command_names = commands(text)
    assert len(command_names) == ours, command_names
    assert all(OURS.fullmatch(line) for line in command_names), command_names
    assert not COMMAND.search(text), COMMAND.search(text)
    assert not UNSEEN.search(text), UNSEEN.search(text)


def told(result: Result, *codes: int, ours: int = 0) -> None:
    assert result.code in codes, (result.code, result.stdout, result.stderr)
    harmless(result.stdout, result.stderr, ours=ours)


# Values of a column -------------------------------------------------------------------------------------


def write_run(folder: Path, value: str, wrong: float) -> Path:
    """A finished run of a classifier on a set with a column, as it lies on disk."""
    folder.mkdir(parents=True)
    count = 200
    label = (np.random.default_rng(0).random(count) < 0.4).astype(int)
    parts = [(value, "other")[at % 2] for at in range(count)]
    miss = np.random.default_rng(1).random(count) < [wrong if part == value else 0.05 for part in parts]
    given = np.where(miss, 1 - label, label)
    goals = {"dev.accuracy@column=*": {"max-degradation": 0.1}}
    recipe = Recipe.model_validate({
        "name": "tiny", "model": {"family": "bert", "source": "unused"},
        "task": {"name": "sequence-classification", "labels": ["neg", "pos"]},
        "data": {"evaluate": {"dev": {"table": ["dev.csv"], "slices": ["column"]}}},
        "format": "w8a8", "gate": {"regression": goals}, "verify": {"require": []},
    })  # fmt: skip
    (folder / "recipe.resolved.yaml").write_text(dump_recipe(recipe))
    rows = [{"label": int(a), "prediction": int(b), "loss": 0.5} for a, b in zip(label, given, strict=True)]
    metrics = {"dev.accuracy": float((label == given).mean())}
    row: dict[str, Any] = {"stage": "onnx", "status": "measured", "reason": None, "metrics": metrics}
    row |= {"distance": None, "deployed": {"metrics": metrics, "distance": None}}
    report = {"rows": [row], "inputs": {"dev": "same"}, "main": {"dev": ["accuracy"]}, "sets": ["dev"]}
    write_json(folder / "parity.json", report)
    samples = {"onnx": {"dev": rows}}
    write_samples(folder / "samples.json.gz", samples, ("label",), {"dev": {"column": parts}})
    write_json(folder / "manifest.json", {"versions": {}, "stages": {}, "host": {}, "recipe": "tiny"})
    verdict = {"verdict": "accept", "goals": [], "reasons": [], "not_measured": []}
    write_verdict(folder, verdict, "tiny")
    return folder


@each
def test_a_value_of_a_column(name: str, tmp_path: Path) -> None:
    """From the samples of a run to every form in which the gate names it."""
    value = HOSTILE[name].strip()
    run, worse = (write_run(tmp_path / one, value, wrong) for one, wrong in (("a", 0.05), ("b", 0.6)))
    told(cli("baseline", "promote", run, "--out", tmp_path / "baseline.json"), 0)
    files = {"--junit": tmp_path / "junit.xml", "--code-quality": tmp_path / "quality.json"}
    summary = tmp_path / "summary.md"
    options = [word for option, file in files.items() for word in (option, file)]
    done = cli("gate", "--baseline", tmp_path / "baseline.json", "--candidate", worse, "--github", *options,
                environment={"GITHUB_STEP_SUMMARY": str(summary)})  # fmt: skip
    verdict = json.loads((worse / "gate.json").read_text())
    assert verdict["verdict"] == "regression" and any(value in reason for reason in verdict["reasons"])
    told(done, 3, ours=len(verdict["reasons"]))
    as_json = cli("gate", "--baseline", run, "--candidate", worse, "--json", environment={"COLUMNS": "300"})
    told(as_json, 3)
    assert [goal["metric"] for goal in as_json.json()["goals"]] == [
        goal["metric"] for goal in verdict["goals"]
    ]
    assert not UNSEEN.search(files["--junit"].read_text())
    ElementTree.parse(files["--junit"])
    (issue,) = json.loads(files["--code-quality"].read_text())
    assert not UNSEEN.search(issue["description"]) and "\n" not in issue["description"]
    only_text(summary.read_text())


def only_text(summary: str) -> None:
    """A Markdown document of a heading, a list and a table, with text in them and nothing else."""
    tokens = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"]).parse(summary)
    inline = {child.type for token in tokens for child in token.children or ()}
    assert inline <= {"text", "text_special"}, inline
    blocks = {token.type.rpartition("_")[0] for token in tokens} - {""}
    listed = {"bullet_list", "list_item", "paragraph"}
    parts = {"table", "thead", "tbody", "tr", "th", "td"}
    assert blocks <= {"heading"} | listed | parts, blocks
    rows = [token for token in tokens if token.type == "tr_open"]
    cells = [token for token in tokens if token.type in ("th_open", "td_open")]
    assert len(cells) == 7 * len(rows)
    assert "://" not in summary and not re.search(r"(?i)www\.", summary) and "@e" not in summary
    assert not UNSEEN.search(summary)


@each
def test_the_forms_of_a_verdict(name: str) -> None:
    """The value in every place of a verdict, the recipe's name and its path too."""
    value = HOSTILE[name]
    goal = {"metric": f"dev.accuracy@{value}=*", "goal": {"max-degradation": 0.01}, "value": 0.8, "loss": 0.1,
            "baseline": 0.9, "interval": [0.08, 0.12], "detectable": None, "outcome": "fail",
            "passed": False}  # fmt: skip
    verdict = {"verdict": "regression", "goals": [goal], "reasons": [value, f"x {value}"],
               "not_measured": [value], "on_inconclusive": "fail"}  # fmt: skip
    for line in annotations(verdict, value):
        assert len(commands(line)) == 1 and not re.search(r"[\r\n]", line) and not UNSEEN.search(line)
        _, properties, data = re.match(r"::(\w+) (.*?)::(.*)", line).groups()
        keys = [one.partition("=")[0] for one in properties.split(",")]
        assert keys == ["file", "title"]
        assert "owned" not in properties.partition("title=")[2]
        assert not re.search(r"%(?!25|0A|3A|2C)", properties + data)
    only_text(step_summary(verdict, value))
    document = junit(verdict, value)
    ElementTree.fromstring(document)
    assert not UNSEEN.search(document)
    for issue in code_quality(verdict, value):
        assert not UNSEEN.search(issue["description"] + issue["location"]["path"])


# Names in an ONNX file ----------------------------------------------------------------------------------


@functools.cache
def plain_graph() -> bytes:
    return linear().SerializeToString()


def renamed(file: Path, value: str) -> Path:
    """A quantized layer whose tensors and nodes all have the value in their names."""
    model = onnx.load_from_string(plain_graph())
    text = model.SerializeToString()
    model = onnx.load_from_string(text)
    graph = model.graph
    names = {one.name for one in (*graph.initializer, *graph.input, *graph.output)}
    names |= {name for node in graph.node for name in (*node.input, *node.output)} - {""}
    new = {name: f"{value}{name}" for name in names}
    for one in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        one.name = new.get(one.name, one.name)
    for node in graph.node:
        node.name = f"{value}{node.name}"
        for side in (node.input, node.output):
            side[:] = [new.get(name, name) for name in side]
    onnx.save(model, file)
    return file


@each
def test_names_of_tensors_and_nodes(name: str, tmp_path: Path) -> None:
    file = renamed(tmp_path / "model.onnx", HOSTILE[name])
    for target in ("rtx-ada", "orin-nx"):
        told(cli("lint", file, "--target", target), 0, 2, 5)
        done = cli("lint", file, "--target", target, "--sarif")
        told(done, 0, 2, 5)
        if done.stdout:
            assert done.json()["version"] == "2.1.0"
            for result in done.json()["runs"][0]["results"]:
                assert not UNSEEN.search(json.dumps(result, ensure_ascii=False))
    told(cli("inspect", file), 0, 2, 5)
    told(cli("inspect", file, "--json"), 0, 2, 5)
    if name in ("both", "first-version", "colour", "bidi"):  # seconds where there is a builder
        told(cli("build", file, "--target", "rtx-ada", "--out", tmp_path / "engine"), 0, 2, 5, 6)


# Paths, recipes, errors ---------------------------------------------------------------------------------

COMMANDS = (
    ("show",), ("report",), ("compare",), ("verify",), ("baseline", "promote"), ("check",), ("run",),
    ("sensitivity",), ("inspect",), ("doctor", "--bundle"), ("gate", "--candidate"), ("list",),
)  # fmt: skip


@each
def test_a_path_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = HOSTILE[name].replace("\0", "")
    for words in COMMANDS:
        told(cli(*words, value), 2)
    told(cli("lint", value, "--target", value), 2)
    told(cli("init", "--model", value, "--data", value, "--target", value), 2)
    told(cli("bundle", value, "--out", value), 2)
    told(cli("predict", value, value), 2)


@each
def test_words_of_a_recipe(name: str, tmp_path: Path) -> None:
    """As a name, a value, a key, a pattern and text that is no YAML."""
    value = json.dumps(HOSTILE[name]).replace("\\ud", "\\\\ud")
    recipe = tmp_path / "recipe.yaml"
    for text in (
        f"name: {value}\nmodel: {{family: gpt2, source: {value}}}\n",
        f"{value}: {value}\n",
        f"format: {{layers: {{{value}: {value}}}}}\nmethod: {value}\n",
        f"data: {{evaluate: {{{value}: {{text: [{value}]}}}}}}\n",
        f"a: [{value}\n{value}: ]",
        HOSTILE[name],
    ):
        recipe.write_text(text, encoding="utf-8", newline="")
        told(cli("check", recipe), 2)
        told(cli("check", recipe, "--json"), 2)
        told(cli("check", recipe, "--set", f"{HOSTILE[name]}={HOSTILE[name]}"), 2)


@pytest.mark.slow
@each
def test_the_reporter(name: str) -> None:
    stream = io.StringIO()
    reporter = Reporter(Guard(stream))
    value = HOSTILE[name]
    reporter.say(value)
    reporter.say(f"note: {value}")
    with reporter.bar(value, 1) as bar:
        bar.advance(value)
    harmless(stream.getvalue())


def test_a_text_in_pieces(tried: Any) -> None:
    """However a text is cut into writes, the log is the same."""
    text = "\n".join(HOSTILE.values())
    whole = io.StringIO()
    Guard(whole).write(text)
    harmless(whole.getvalue())
    cut = random.Random(0)
    for _ in range(100):
        stream = io.StringIO()
        guard, rest = Guard(stream), text
        while rest:
            size = cut.choice((1, 1, 2, 3, 7, 50))
            guard.write(rest[:size])
            rest = rest[size:]
        harmless(stream.getvalue())
    tried(101)


def test_plain_text_is_untouched() -> None:
    """Umlauts, emoji with joiners, right-to-left words, `::` within a line, tabs."""
    text = "Größe 5 ± 1\tstd::vector a: :b 日本 👩‍🔧 שלום ## heading\n  indented\n\nname::x\n"
    stream = io.StringIO()
    Guard(stream).write(text)
    assert stream.getvalue() == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_a_log_of_another_encoding(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with guarded():
            say(*HOSTILE.values(), "± \udcff 日本")
        stream.flush()
    harmless(raw.getvalue().decode(encoding))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both", "indented", "first-version", "link", "bidi", "html"])
def test_words_on_the_command_line(name: str, tmp_path: Path) -> None:
    """Errors of typer itself, in a child process; requested colours do not bypass the guard."""
    value = HOSTILE[name].replace("\0", "")
    for words, more in (([value], {}), (["show", "--nope", value], {}), (["list", value], {})):
        ended = attacked(*words, folder=tmp_path, PYTHONIOENCODING="utf-8", **more)
        assert ended.code == 2, ended.text
        harmless(ended.text)
    coloured = attacked("list", value, folder=tmp_path, FORCE_COLOR="1")
    assert not commands(coloured.text) and not COMMAND.search(coloured.text)


@pytest.mark.slow
@each
def test_the_script_of_the_gate(name: str, tmp_path: Path) -> None:
    """A recipe or a baseline of this name that is not there."""
    script = Path(__file__).parents[2] / "deploy" / "gate.sh"
    value = HOSTILE[name].replace("\0", "")
    (tmp_path / "recipe.yaml").write_text("")
    for words in ((value, "baseline.json"), ("recipe.yaml", value)):
        for github in ("true", "false"):
            done = subprocess.run([shutil.which("bash"), script, *words], cwd=tmp_path, text=True, timeout=30,
                                  env={"GITHUB_ACTIONS": github, "PATH": "/usr/bin:/bin"},
                                  capture_output=True, errors="replace")  # fmt: skip
            assert done.returncode == 2
            command_names = commands(done.stdout + done.stderr)
            assert len(command_names) == (github == "true"), command_names
            for line in command_names:
                assert re.fullmatch(r"::error file=[^:,]*,title=qcompress gate::.*", line), line
            assert "\x1b" not in done.stdout + done.stderr
