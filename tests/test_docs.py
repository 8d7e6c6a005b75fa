"""README.md, CONTRIBUTING.md and docs/: links, commands, recipes, keys and tables agree with the package."""

from __future__ import annotations

import importlib
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema
import pytest
import typer
import yaml
from pydantic import BaseModel
from test_layers import ROOMS

from qcompress.cli.listing import LISTS
from qcompress.cli.main import app
from qcompress.graph.lint.rules import RULES
from qcompress.pipeline.key_scope import TOOLS, VALUES
from qcompress.recipe.check import all_mistakes
from qcompress.recipe.json_schema import recipe_schema
from qcompress.schema import adapters, custom, data, export, formats, goals, method_options, quantizers
from qcompress.schema import recipe as recipes
from qcompress.schema import tasks as task_options
from qcompress.schema.axes import AXES, METHODS, PHASES
from qcompress.schema.formats import FORMAT_PRESETS
from qcompress.schema.targets import TARGETS
from qcompress.verdict.judge import EXIT_CODES

ROOT = Path(__file__).parent.parent
README_BYTES = 7000
LINE = 120

WORDS = (
    "fold", "code", "scale", "rounding tie", "row", "parity", "recovery", "certificate", "deployed",
    "forced codes",
)  # fmt: skip

PAGES = (
    "README", "architecture", "custom-components", "data", "foreign-graphs", "formats", "gate-and-ci",
    "glossary", "methods", "quickstart", "recipes", "reliability", "run-directory", "serving", "studies",
)  # fmt: skip

FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{name}.md" for name in PAGES)]

NAMED = re.compile(r"(?<![\w./-])(?:qcompress|tests|recipes|deploy|docs)/[\w./-]*[\w/]")
"""A path of the repository, wherever it stands in a text."""

MADE = ("recipes/model.yaml",)
"""Paths of a reader's own repository."""


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    line: int
    text: str


@dataclass(frozen=True)
class Table:
    """A table, with the headings that it stands under."""

    heading: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Page:
    """A Markdown file, taken apart."""

    def __init__(self, file: Path) -> None:
        self.file, self.text = file, file.read_text(encoding="utf-8")
        self.blocks: list[Block] = []
        self.prose: list[str] = []
        fence, inside, start = None, [], 0
        for number, line in enumerate(self.text.splitlines(), 1):
            mark = re.match(r" *```(\w*)$", line)
            if mark and fence is None:
                fence, inside, start = mark[1], [], number
            elif mark:
                self.blocks.append(Block(fence or "", start, textwrap.dedent("\n".join(inside))))
                fence = None
            elif fence is None:
                self.prose.append(line)
            else:
                inside.append(line)
        assert fence is None, f"{file}:{start}: a block of code is not closed"

    @property
    def headings(self) -> list[str]:
        """The text of each heading, in order."""
        return [found[1] for line in self.prose if (found := re.match(r"#+ (.+)", line))]

    @property
    def anchors(self) -> set[str]:
        """Names that links can point at, as GitHub makes them."""
        made: dict[str, int] = {}
        names = set()
        for heading in self.headings:
            name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            count = made[name] = made.get(name, -1) + 1
            names.add(f"{name}-{count}" if count else name)
        return names

    @property
    def links(self) -> list[str]:
        """Targets of links and images, outside of code."""
        text = re.sub(r"`[^`]*`", "", "\n".join(self.prose))
        return re.findall(r"\]\(([^)\s]+)\)", text)

    @property
    def spans(self) -> list[str]:
        """Code inside of lines."""
        return re.findall(r"`([^`]+)`", " ".join(self.prose))

    @property
    def tables(self) -> list[Table]:
        """All tables."""
        found, heading, rows = [], "", []
        for line in [*self.prose, ""]:
            if line.startswith("|"):
                rows.append(tuple(cell.strip() for cell in line.strip().strip("|").split("|")))
                continue
            if rows:
                found.append(Table(heading, rows[0], tuple(rows[2:])))
                rows = []
            if title := re.match(r"#+ (.+)", line):
                heading = title[1]
        return found


@cache
def page(name: str) -> Page:
    return Page(ROOT / name if name.endswith(".md") else ROOT / "docs" / f"{name}.md")


EVERY = [Page(file) for file in FILES]


def names_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def quoted(cell: str) -> list[str]:
    """Words in backticks."""
    return re.findall(r"`([^`]+)`", cell)


# Size, index, style -------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


def test_every_page_is_tested_and_in_the_index() -> None:
    assert {file.stem for file in (ROOT / "docs").glob("*.md")} == set(PAGES)
    index = page("README")
    assert {link.partition(".md")[0] for link in index.links} >= set(PAGES) - {"README"}


@pytest.mark.parametrize("found", EVERY, ids=lambda found: names_of(found.file))
def test_a_page_has_one_title_short_lines_and_no_forbidden_phrase(found: Page) -> None:
    assert len(re.findall(r"^# ", "\n".join(found.prose), re.MULTILINE)) == 1
    long = [line for line in found.text.splitlines() if len(line) > LINE and not line.startswith("|")]
    assert long == []
    assert re.findall(r"\b(?:is|are) no (?!longer)[^.\n]*", "\n".join(found.prose)) == []


# Links and paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("found", EVERY, ids=lambda found: names_of(found.file))
def test_links_and_anchors_resolve(found: Page) -> None:
    broken = []
    for link in found.links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (found.file.parent / path).resolve() if path else found.file
        inside = target.is_file() and target.is_relative_to(ROOT.resolve())
        if not inside or (anchor and anchor not in Page(target).anchors):
            broken.append(link)
    assert broken == []


def test_links_are_found() -> None:
    assert sum(len(found.links) for found in EVERY) > 60


@pytest.mark.parametrize("found", EVERY, ids=lambda found: names_of(found.file))
def test_files_of_the_repository_that_a_page_names_exist(found: Page) -> None:
    named = {name.rstrip(".") for name in NAMED.findall(found.text)} - set(MADE)
    patterns = {name for name in named if "NAME" in name}
    assert [name for name in named - patterns if not (ROOT / name).exists()] == []
    assert [name for name in patterns if not (ROOT / name).parent.is_dir()] == []


def test_named_files_are_found() -> None:
    assert sum(len(NAMED.findall(found.text)) for found in EVERY) > 60


def test_files_of_a_room_that_the_architecture_names_exist() -> None:
    (rooms,) = (table for table in page("architecture").tables if table.header[0] == "room")
    missing, seen = [], 0
    for room, holds, _ in rooms.rows:
        for name in quoted(holds):
            if re.search(r"\.py$|/$", name):
                seen += 1
                missing += [] if (ROOT / "qcompress" / quoted(room)[0] / name).exists() else [name]
    assert missing == [] and seen >= 35


# Rooms, exit codes, lists -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "architecture"])
def test_rooms_are_the_folders_of_the_package(name: str) -> None:
    (table,) = (table for table in page(name).tables if table.header[0].startswith("room"))
    rooms = [quoted(row[0])[0] for row in table.rows]
    folders = {path.name for path in (ROOT / "qcompress").iterdir() if path.is_dir()} - {"__pycache__"}
    assert sorted(set(rooms) - {"api.py"}) == sorted(folders)
    assert len(rooms) == len(set(rooms))


def test_the_architecture_has_the_directions_of_imports() -> None:
    (table,) = (table for table in page("architecture").tables if table.header[0] == "room")
    for room, _, below in table.rows:
        allowed = set(ROOMS[quoted(room)[0].removesuffix(".py")].split()) - {"errors"}
        assert set(below.split(", ")) == (allowed or {"nothing"}), room


def test_the_readme_has_the_exit_codes_of_the_package() -> None:
    import qcompress.errors as errors
    from qcompress.system.stopping import SIGNALS

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    known = {kind.exit_code for kind in kinds if issubclass(kind, errors.QcompressError)}
    known |= {*EXIT_CODES.values(), *(128 + number for number in SIGNALS)}
    (table,) = (table for table in page("README.md").tables if table.header[0] == "code")
    assert {int(code) for row in table.rows for code in row[0].split(",")} == known


def test_the_gate_page_has_the_verdicts_and_their_exit_codes() -> None:
    table = next(table for table in page("gate-and-ci").tables if table.header[0] == "verdict")
    assert {quoted(row[0])[0]: int(row[1]) for row in table.rows} == EXIT_CODES


LISTED: dict[tuple[str, str], set[str]] = {
    ("methods", "method"): set(METHODS),
    ("methods", "schedule"): set(PHASES),
    ("formats", "preset"): set(FORMAT_PRESETS),
    ("serving", "target"): set(TARGETS),
    ("data", "task"): {kind.model_fields["name"].default for kind in (
        task_options.CausalLm, task_options.SequenceClassification,
        task_options.TokenClassification, task_options.ImageClassification,
        task_options.FeatureExtraction, task_options.FillMask, task_options.QuestionAnswering,
        task_options.AnyTask,
    )},
    ("recipes", "family"): {name for name, _ in LISTS["models"]()},
    ("recipes", "role"): set(recipes.LEARNING_RATES),
}  # fmt: skip
"""First columns of tables, by page and heading of the column, and what stands in them."""


@pytest.mark.parametrize(("name", "column"), LISTED, ids="-".join)
def test_tables_list_what_there_is(name: str, column: str) -> None:
    tables = [table for table in page(name).tables if table.header[0] == column]
    assert tables
    for table in tables:
        words = [word for row in table.rows for word in quoted(row[0])]
        assert sorted(words) == sorted(LISTED[name, column])


def test_the_table_of_presets_has_their_axes() -> None:
    (table,) = (table for table in page("methods").tables if table.header[1] == "quantizer")
    assert table.header[1:] == ("quantizer", "adapter", "objective", "stepper", "schedule")
    base = {"quantizer": "none", "adapter": "none", "objective": "task", "stepper": "plain"}
    for row in table.rows:
        preset = METHODS[quoted(row[0])[0]]
        names = {axis: value if isinstance(value, str) else value["name"] for axis, value in preset.items()}
        for axis, cell in zip(table.header[1:], row[1:], strict=True):
            assert cell.split(",")[0] == (base | names)[axis], row


def test_the_table_of_learning_rates_has_the_defaults() -> None:
    (table,) = (table for table in page("recipes").tables if table.header[0] == "role")
    rates = {quoted(row[0])[0]: float(quoted(row[1])[0]) for row in table.rows}
    assert rates == recipes.LEARNING_RATES


def test_the_table_of_schedules_has_the_steps_of_the_phases() -> None:
    (table,) = (table for table in page("methods").tables if table.header[0] == "schedule")
    for name, phases, _ in table.rows:
        expected = PHASES[quoted(name)[0]]
        assert quoted(phases) == list(expected)
        numbers = {int(number) for number in re.findall(r"\b\d+\b", phases)}
        assert numbers == {phase.steps for phase in expected.values()}


def test_parity_limits_are_those_of_the_gate() -> None:
    """Row by row: `mean X` and `top-1 Y` of the table, against the defaults of the judge."""
    (table,) = (table for table in page("gate-and-ci").tables if table.header[:2] == ("row", "compared with"))
    seen = 0
    for row in table.rows:
        for compute, cell in zip(("fp32", "fp16"), row[2:], strict=True):
            limits = goals.PARITY[compute][quoted(row[0])[0]]
            if row[0] in ("`folded`",):
                assert cell == "equal" and limits.max_abs == 0
            elif "," not in row[0]:
                mean, top = re.fullmatch(r"mean (\S+), top-1 (\S+)", cell).groups()
                assert (float(mean), float(top)) == (limits.mean_abs, limits.top1_agreement)
                seen += 1
    assert seen == 6


def test_what_re_runs_a_stage_is_what_the_keys_cover() -> None:
    (table,) = (table for table in page("run-directory").tables if table.header[0] == "stage")
    assert [quoted(row[0])[0] for row in table.rows] == list(recipes.STAGES)
    for row in table.rows:
        stage, axes = quoted(row[0])[0], set(AXES) if "the five axes" in row[1] else set()
        assert {key for key in quoted(row[1]) if key != "provenance"} | axes == set(VALUES[stage]), stage
        assert [tool for tool in TOOLS[stage] if tool not in f"{row[4]}, onnxruntime-gpu"] == []


def test_the_number_of_lint_rules_is_that_of_the_linter() -> None:
    assert f"`lint` has {len(RULES)} rules" in page("foreign-graphs").text


# The glossary -------------------------------------------------------------------------------------


def test_the_glossary_has_its_ten_words_each_with_a_sentence_and_an_example() -> None:
    text = page("glossary").text
    entries = dict(re.findall(r"^## ([^\n]+)\n\n(.+?)(?=\n## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert sorted(entries) == sorted(WORDS) and len(WORDS) == 10
    for word, entry in entries.items():
        sentence, *rest = entry.strip().split("\n\n")
        assert len(re.findall(r"[.!?](?=\s|$)", sentence)) == 1, word
        assert rest and rest[0].startswith("Example: "), word


# Keys and defaults --------------------------------------------------------------------------------

TOP = ("quantizer", "adapter", "objective", "stepper", "schedule")

SECTIONS: dict[tuple[str, str], type[BaseModel]] = {
    ("recipes", "`model`"): recipes.Model,
    ("recipes", "`train`"): recipes.Train,
    ("recipes", "`export`"): export.Export,
    ("recipes", "`build`"): export.Build,
    ("recipes", "`build.profiles`"): export.Profile,
    ("recipes", "`verify`"): recipes.Verify,
    ("recipes", "`verify.sharpness`"): method_options.Sharpness,
    ("formats", "`format`"): recipes.Format,
    ("formats", "A weight, long form"): formats.WeightFormat,
    ("formats", "A codebook, long form"): formats.CodebookFormat,
    ("formats", "An activation, long form"): formats.ActivationFormat,
    ("data", "`task: causal-lm`"): task_options.CausalLm,
    ("data", "`task: sequence-classification`"): task_options.SequenceClassification,
    ("data", "`task: token-classification`"): task_options.TokenClassification,
    ("data", "`task: image-classification`"): task_options.ImageClassification,
    ("data", "`task: feature-extraction`"): task_options.FeatureExtraction,
    ("data", "`task: fill-mask`"): task_options.FillMask,
    ("data", "`task: question-answering`"): task_options.QuestionAnswering,
    ("data", "`data`"): data.Data,
    ("data", "`data.evaluate.NAME`"): data.TextData,
    ("data", "`columns`"): data.Columns,
    ("data", "`augment`"): data.Augment,
    ("gate-and-ci", "`gate`"): goals.Gate,
    ("methods", "`quantizer.noise`"): quantizers.Noise,
    **{
        ("methods", f"`{axis}: {kind.model_fields['name'].default}`"): kind
        for axis, kinds in AXES.items()
        for kind in kinds
        if set(kind.model_fields) > {"name"}
    },
}
"""Where the keys of each section of a recipe stand: page and heading."""


def defaults(section: type[BaseModel]) -> dict[str, Any]:
    """Keys with their defaults as a recipe would write them; `required` and `none` as words."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if name == "name":
            continue
        value = field.get_default(call_default_factory=True)
        found[field.alias or name] = "required" if field.is_required() else "none" if value is None else value
    return found


@pytest.mark.parametrize(("name", "heading"), SECTIONS, ids=lambda part: part.strip("`"))
def test_a_table_of_keys_has_every_key_and_its_default(name: str, heading: str) -> None:
    tables = [table for table in page(name).tables if table.heading == heading]
    (table,) = (table for table in tables if table.header == ("key", "default", "meaning"))
    expected = defaults(SECTIONS[name, heading])
    assert [quoted(row[0]) for row in table.rows] == [[key] for key in expected]
    for (key, cell, _), value in zip(table.rows, expected.values(), strict=True):
        if cell.startswith("`"):
            (text,) = quoted(cell)
            words = {str(value), "float" if value == "none" else str(value)}
            assert text in words or _number(text) == value or yaml.safe_load(text) == value, key
        else:
            assert cell == value or isinstance(value, list), key


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def test_the_limits_of_a_goal_are_those_of_the_schema() -> None:
    (table,) = (table for table in page("gate-and-ci").tables if table.header[0] == "limit")
    assert [quoted(row[0])[0] for row in table.rows] == list(defaults(goals.Goal))


def test_the_top_level_of_a_recipe_is_whole() -> None:
    (table,) = (table for table in page("recipes").tables if table.heading == "Top level")
    keys = [key for row in table.rows for key in quoted(row[0])]
    assert sorted(keys) == sorted([*recipes.Recipe.model_fields, "extends"])
    assert set(TOP) == set(AXES)


def test_sections_are_many() -> None:
    assert len(SECTIONS) >= 36
    assert {axis for axis in AXES} == set(TOP)
    assert adapters.QuadapterOptions in SECTIONS.values()


# Recipes in YAML blocks ---------------------------------------------------------------------------


def yaml_blocks() -> Iterator[tuple[str, Mapping[str, Any]]]:
    for found in EVERY:
        for block in found.blocks:
            if block.language == "yaml":
                yield f"{names_of(found.file)}:{block.line}", yaml.safe_load(block.text)


@cache
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(recipe_schema())


def mistakes(document: Mapping[str, Any]) -> list[str]:
    """What the schema says of a recipe, or of a part of one: what a part lacks may stand elsewhere."""
    whole = {"model", "data", "task"} <= set(document) and "name" in document
    document = document if whole else {"extends": "other.yaml", **document}
    found = validator().iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


YAML = dict(yaml_blocks())


@pytest.mark.parametrize("where", YAML)
def test_a_recipe_or_a_part_of_one_fits_the_schema(where: str) -> None:
    assert mistakes(YAML[where]) == []


def test_recipes_are_found_and_one_is_whole() -> None:
    assert len(YAML) >= 15
    assert any("name" in document and "data" in document for document in YAML.values())
    assert mistakes({"train": {"batchsize": 8}}) and mistakes({"formats": "w8a8"})


def test_a_whole_recipe_lacks_nothing_but_its_files(tmp_path: Path) -> None:
    whole = [document for document in YAML.values() if "name" in document and "data" in document]
    for document in whole:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(document, sort_keys=False))
        found = all_mistakes(file)[2]
        assert found and all(mistake.key.startswith(("model.source", "data.")) for mistake in found), found


def test_every_short_recipe_in_a_line_fits_the_schema() -> None:
    """`format: {compute: fp16}` and its like: code in a line that starts with a key of a recipe."""
    keys, seen = {*recipes.Recipe.model_fields}, 0
    for found in EVERY:
        for span in found.spans:
            key, colon, value = span.partition(": ")
            if key in keys and colon and value and "..." not in value and "power-of-two" not in value:
                if key in TOP and value in ("objective", "own"):
                    continue
                seen += 1
                assert mistakes(yaml.safe_load(span)) == [], f"{found.file}: {span}"
    assert seen >= 20


# Commands -----------------------------------------------------------------------------------------

LAUNCHERS = re.compile(r"^(?:torchrun|accelerate launch|python3?)\b.*? -m qcompress ")


def lines_of(block: str) -> Iterator[str]:
    """Commands of a shell block, without comments; a line that ends in a backslash goes on."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield LAUNCHERS.sub("qcompress ", line.strip())


def complaint(arguments: list[str], whole: bool = True) -> str:
    """What the command line says of arguments, without running anything; `whole`: nothing may be missing."""
    command, context, name = typer.main.get_command(app), None, "qcompress"
    while hasattr(command, "commands"):
        if not arguments:
            return "" if not whole else "no command"
        if arguments[0].startswith("-"):
            known = {option for param in command.params for option in param.opts} | {"--help"}
            return "" if arguments[0] in known else f"no option {arguments[0]}"
        name, *arguments = arguments
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    if arguments == ["--help"]:
        return ""
    try:
        command.make_context(name, list(arguments), parent=context)
    except Exception as error:  # of typer's own copy of click, which has no public name
        missing = type(error).__name__ == "MissingParameter"
        return "" if missing and not whole else f"{type(error).__name__}: {error}"
    return ""


def commands() -> Iterator[tuple[str, list[str], bool]]:
    """Where a command stands, its arguments, and whether it is whole."""
    for found in EVERY:
        for block in found.blocks:
            if block.language in ("sh", ""):
                for line in lines_of(block.text):
                    if line.startswith("qcompress "):
                        words = shlex.split(line, comments=True)
                        yield f"{names_of(found.file)}:{block.line}", words[1:], True
        for span in found.spans:
            if span.startswith("qcompress "):
                yield f"{names_of(found.file)}: `{span}`", shlex.split(span)[1:], False


def test_commands_are_known_to_the_command_line() -> None:
    found = list(commands())
    assert len(found) >= 60
    wrong = {where: said for where, words, whole in found if (said := complaint(words, whole))}
    assert wrong == {}


def test_the_test_of_commands_sees_mistakes() -> None:
    assert complaint(["runs", "recipe.yaml"]) == "no command runs"
    assert "No such option" in complaint(["run", "recipe.yaml", "--sed", "0"])
    assert "MissingParameter" in complaint(["run"]) and complaint(["run"], whole=False) == ""
    assert complaint(["baseline", "demote", "run"]) == "no command demote"
    assert complaint(["--install-completions"]) and complaint(["sensitivity", "r", "--samples", "1"])
    assert complaint(["run", "recipe.yaml", "more.yaml"])


def test_the_index_has_every_command() -> None:
    (table,) = (table for table in page("README").tables if table.header[0] == "command")
    listed = {quoted(row[0])[0].split()[1] for row in table.rows}
    assert listed == set(typer.main.get_command(app).commands)


def test_targets_of_make_and_marks_of_tests_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    marks = set(re.findall(r'^    "(\w+)[(:]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    named: set[str] = set()
    marked: set[str] = set()
    for found in EVERY:
        code = [*found.spans, *(line for block in found.blocks for line in lines_of(block.text))]
        named |= {name for line in code for name in re.findall(r"^make ([a-z]+)", line)}
        marked |= {name for line in code for name in re.findall(r"pytest -m (\w+)", line)}
    assert len(named) >= 4 and named <= targets
    assert len(marked) == 3 and marked <= marks


# Python -------------------------------------------------------------------------------------------


def test_python_blocks_run_and_what_they_define_is_taken(tmp_path: Path) -> None:
    """The class of custom-components.md is one that `qcompress.run` accepts, and a recipe may name it."""
    pytest.importorskip("torch")
    blocks = [block.text for found in EVERY for block in found.blocks if block.language == "python"]
    assert len(blocks) == 3
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, "docs", "exec"), names)
    with custom.among({"quantizer": {"power-of-two": names["PowerOfTwo"]}}):
        schema = recipes.RECIPE.get()
        made = schema.model_validate(
            {
                "name": "x",
                "model": {"family": "gpt2", "source": "model"},
                "task": "causal-lm",
                "data": {"evaluate": {"test": {"text": ["a.txt"]}}},
                "quantizer": {"weights": {"name": "power-of-two", "factor": 2.0}},
            }
        )
        assert made.quantizer.weights.factor == 2.0
    assert set(names["parameter_roles"].values()) <= set(recipes.LEARNING_RATES)


def test_the_table_of_custom_classes_has_the_protocols() -> None:
    (table,) = (table for table in page("custom-components").tables if len(table.header) == 3)
    found: dict[str, set[str]] = {}
    for row in table.rows:
        axis = quoted(row[0])[0].removesuffix("s")
        found.setdefault(axis, set(quoted(row[2]))).intersection_update(quoted(row[2]))
    assert {axis: methods for axis, methods in found.items()} == {
        axis: set(methods) for axis, methods in custom.PROTOCOLS.items()
    }


def test_modules_that_pages_import_exist() -> None:
    names = re.findall(r"^from (qcompress[\w.]*) import (\w+)", page("custom-components").text, re.MULTILINE)
    assert len(names) == 3
    for module, name in names:
        assert hasattr(importlib.import_module(module), name)
