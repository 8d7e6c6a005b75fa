"""The commands `bundle` and `doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli.arguments import AsJson, RunFolder
from qcompress.cli.terminal import console, errors, print_json
from qcompress.errors import UsageError


def bundle(
    folder: RunFolder,
    out: Annotated[Path, typer.Option(help="The model repository to write.", show_default=False)],
    kind: Annotated[str, typer.Option("--format", help="triton.")] = "triton",
    backend: Annotated[str, typer.Option(help="onnxruntime or tensorrt.")] = "onnxruntime",
    name: Annotated[
        str | None, typer.Option(help="Name of the model; default: the recipe's.", show_default=False)
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Default: the profiles' largest.", show_default=False)
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Number of model instances.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Accept a run that was not accepted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run as a Triton model repository; a run that was not accepted is refused."""
    with errors():
        from qcompress.cli.bundle.triton import bundle as write
        from qcompress.report.bundle_table import print_bundle
        from qcompress.verdict.run_directory import load

        if kind != "triton":
            raise UsageError(f"unknown format {kind!r}", fix="pass --format triton")
        options = {"backend": backend, "name": name, "max_batch": max_batch, "instances": instances}
        record = write(load(folder), out, force=force, **options)
        if as_json:
            print_json({"path": str(out), **record})
        else:
            print_bundle(console(), record, str(out))


def doctor(
    folder: Annotated[
        Path | None,
        typer.Option("--bundle", help="Show why this bundle would not load here.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what each job needs and what this machine lacks, or why a bundle would not load on it."""
    with errors():
        from qcompress.report.bundle_table import print_examined, print_machine

        if folder is None:
            from qcompress.cli.doctor import diagnose

            document = diagnose()
        else:
            from qcompress.cli.bundle.examine import examine

            if not folder.is_dir():
                what = "is a file, and a bundle is a folder" if folder.exists() else "does not exist"
                raise UsageError(f"{folder} {what}", fix="name the folder that `qcompress bundle` wrote")
            document = examine(folder)
        if as_json:
            print_json(document)
        else:
            (print_machine if folder is None else print_examined)(console(), document)
        raise typer.Exit(document.get("exit_code", 0))
