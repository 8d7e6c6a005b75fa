"""The commands `init` and `schema`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli.arguments import AsJson
from qcompress.cli.completion import formats, methods, readings, targets, tasks
from qcompress.cli.terminal import errors, print_json
from qcompress.system.printable import say

if TYPE_CHECKING:
    from qcompress.cli.init.start import InitResult

OPTIONAL = {"show_default": False}


def init(
    model: Annotated[Path | None, typer.Option(help="Directory of a checkpoint.", **OPTIONAL)] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text, table (.csv, .tsv, .jsonl, .parquet), or folder of images.", **OPTIONAL),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="A device; `qcompress list targets`.", autocompletion=targets, **OPTIONAL),
    ] = None,
    out: Annotated[Path, typer.Option(help="The recipe to write.", dir_okay=False)] = Path("recipe.yaml"),
    text_column: Annotated[str | None, typer.Option(help="Column of the text.", **OPTIONAL)] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.", **OPTIONAL)] = None,
    pair_column: Annotated[
        str | None, typer.Option(help="Column of the second text of a pair.", **OPTIONAL)
    ] = None,
    labels_are: Annotated[
        str | None,
        typer.Option(
            help="Content of the column of labels: names, or indices in the model's order.",
            autocompletion=readings,
            **OPTIONAL,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="`qcompress list tasks`; chosen by model and data unless given.",
            autocompletion=tasks,
            **OPTIONAL,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="`qcompress list methods`.", autocompletion=methods, **OPTIONAL),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="A preset such as w8a8.", autocompletion=formats, **OPTIONAL
        ),  # fmt: skip
    ] = None,
    with_schema: Annotated[
        bool, typer.Option("--with-schema", help="Write the schema beside it, for editors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a first recipe for a model and a data file; asks for missing options at a terminal."""
    with errors():
        from qcompress.cli.init.options import InitOptions
        from qcompress.cli.init.start import begin
        from qcompress.schema.targets import TARGETS

        asks = is_terminal()
        try:
            if asks:
                model = model or Path(typer.prompt("Directory of the model", err=True))
                data = data or Path(typer.prompt("File of text or examples, or folder of images", err=True))
                target = target or _ask("Device to deploy on", list(TARGETS))
            options = InitOptions(
                model, data, target, out, text_column, label_column, pair_column, method, form, with_schema,
                labels_are, task,
            )  # fmt: skip
            _report(begin(options, _ask if asks else None), as_json)
        except (typer.Abort, EOFError):  # Ctrl-C and Ctrl-D at a question
            raise KeyboardInterrupt from None


def is_terminal() -> bool:
    """True if stdin is a terminal, so that the user can be asked."""
    return sys.stdin.isatty()


def _ask(question: str, words: list[str]) -> str:
    from rich.prompt import Prompt

    from qcompress.system.screen import Screen

    return Prompt.ask(question, choices=words, default=words[0], console=Screen(stderr=True))


def _report(result: "InitResult", as_json: bool) -> None:
    from qcompress.cli.init.write import flow

    files = {what: str(file) for what, file in result.files.items()}
    if as_json:
        print_json({"files": files, "found": result.found, "chosen": result.chosen, "why": result.why,
                    "notes": result.notes, "next": result.commands})  # fmt: skip
    else:
        for what, reason in result.why.items():
            value = result.chosen[what]
            say(f"{what:13} {value if isinstance(value, str) else flow(value)}  ({reason})")
        for what, file in files.items():
            say(f"wrote {file}" + ("" if what == "recipe" else f"  ({what})"))
    for note in result.notes:
        say(f"note: {note}", stderr=True)
    say("next:", *(f"  {command}" for command in result.commands), stderr=True)


def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    with errors():
        from qcompress.recipe.json_schema import recipe_schema

        print(json.dumps(recipe_schema(), indent=1, ensure_ascii=False))  # keys stay in a recipe's order
