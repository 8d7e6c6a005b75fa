"""The command `sensitivity`."""

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli.arguments import AsJson, Cache, Out, RecipeFile, Set
from qcompress.cli.terminal import console, errors, print_json


def sensitivity(
    recipe: RecipeFile,
    out: Out = Path("runs"),
    cache: Cache = None,
    overrides: Set = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--try", help="A weight format: int8, int4, int4-g32, int4-channel; default int8, int4."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Calibration samples to measure on.")] = 64,
    fresh: Annotated[
        int | None,
        typer.Option(
            min=2, help="Held-out samples that judge the mixture; default as many.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Draw the samples from all of the data; default: the first ones.", show_default=False
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Find the best mixture of at most so many bytes.", show_default=False),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(min=0, help="Find the smallest mixture of at most this cost.", show_default=False),
    ] = None,
    as_small_as: Annotated[
        str | None,
        typer.Option(help="Find the best mixture of at most this format's bytes.", show_default=False),
    ] = None,
    controls: Annotated[
        list[str] | None,
        typer.Option(
            "--control", help="Also a mixture of the same bytes by other costs: weight-error, shuffled."
        ),
    ] = None,
    wins: Annotated[
        bool, typer.Option("--wins/--no-wins", help="Measure the gain of keeping each layer float.")
    ] = True,
    all_layers: Annotated[bool, typer.Option("--all", help="Show all layers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the cost of rounding each layer, and choose the format of each for a budget."""
    with errors():
        from qcompress import api
        from qcompress.report.sensitivity_table import print_sensitivity
        from qcompress.system.reporter import Reporter

        document = api.sensitivity(
            recipe, out, cache=cache, overrides=overrides or (), formats=formats or ("int8", "int4"),
            samples=samples, fresh=fresh, seed=seed, max_bytes=max_bytes, max_cost=max_cost,
            as_small_as=as_small_as, controls=controls or (), wins=wins, reporter=Reporter(),
        )  # fmt: skip
        if as_json:
            print_json(document)
        else:
            print_sensitivity(console(), document, all_layers)
