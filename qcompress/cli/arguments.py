"""Arguments and options shared by several commands, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli.completion import compatibilities, targets

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
OnnxFile = Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)]
TargetName = Annotated[
    str,
    typer.Option(
        "--target",
        help="A device; `qcompress list targets`.",
        show_default=False,
        autocompletion=targets,
    ),
]
RunFolder = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]
Out = Annotated[Path, typer.Option(help="Folder of runs.")]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of the stage cache; default OUT/.cache.", show_default=False)
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Profiles = Annotated[
    str | None,
    typer.Option(help="JSON list of {batch: [min, opt, max], sequence: [...]}.", show_default=False),
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="For later versions of TensorRT too.")
]
HardwareLevel = Annotated[
    str,
    typer.Option(help="none, ampere-plus or same-compute-capability.", autocompletion=compatibilities),
]
TimingCache = Annotated[
    Path | None, typer.Option(help="File with the builder's timings: read, and updated.", show_default=False)
]
