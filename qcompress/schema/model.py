"""Section `model` of a recipe. No torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, model_validator

from qcompress.schema.families import Family
from qcompress.schema.formats import Options

if TYPE_CHECKING:
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+")
"""Pattern of a model on a hub, organisation/name."""


def _picked(value: object) -> object:
    """Refuse unknown words for `model.blocks` with a specific message."""
    if isinstance(value, str) and value not in ("every-other", "pairs"):
        raise ValueError("write every-other, pairs, or numbers of blocks such as [0, 0, 2, 2]")
    return value


class Model(Options):
    """Source of the float model."""

    family: Family
    """Architecture; `qcompress list models`. Default for `causal-lm`: decoder, whose structure is
    discovered.
    """
    source: str | None = None
    """A directory (relative to the recipe) in transformers' layout with safetensors weights, or a hub id."""
    revision: str | None = None
    """Commit of a hub id."""
    run: str | None = None
    """Directory of an earlier run of `method: float`, instead of `source`."""
    python: str | None = None
    """FILE:FUNCTION, instead of `source`: a Python file, relative to the recipe, whose function (default:
    make) returns a trained torch.nn.Module and an example of its inputs. It runs the user's code.
    """
    blocks: Annotated[
        Annotated[list[int], Field(min_length=1)] | Literal["every-other", "pairs"] | None,
        BeforeValidator(_picked),
    ] = None
    """Numbers of the model's blocks to use, from 0; equal numbers share their weights. every-other: the
    first, third ... (layer dropping); pairs: all, each pair sharing the weights of its first block. None:
    all, unchanged.
    """

    @property
    def origin(self) -> Literal["source", "run", "python"]:
        """The key that names the model."""
        return "source" if self.source is not None else "run" if self.run is not None else "python"

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema of editors, in which `family` may be missing: the task chooses it."""
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        handler.resolve_ref_schema(schema)["required"] = []
        return schema

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if sum(origin is not None for origin in (self.source, self.run, self.python)) != 1:
            raise ValueError("give exactly one of `source`, `run` and `python`")
        if self.python is not None and self.family not in ("image-model", "any-model"):
            raise ValueError(
                f"`python` makes a model of images (family image-model) or of the task any, and not a "
                f"{self.family}"
            )
        if self.source is not None and self.family == "any-model":
            raise ValueError("the task any has models of `python` alone: return the checkpoint's from there")
        if self.run is not None and self.revision is not None:
            raise ValueError("`revision` belongs to a hub id, and `run` is a directory")
        return self
