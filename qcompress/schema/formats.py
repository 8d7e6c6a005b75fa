"""Number formats of weights, activations and embeddings, as plain values. No torch.

A weight is stored per channel (one scale for each output channel), per block (one scale for `block`
consecutive input channels of one output channel) or per tensor. A per-tensor scale is written into files as
equal scales of its channels, so that deployed weights have one layout. Activations that TensorRT accepts are
int8 (or fewer bits in int8), symmetric, one scale per tensor; other granularities can be written so that a
target can refuse them by name.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

if TYPE_CHECKING:
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

INT2_OPSET = 25
"""First ONNX opset with int2."""


class Options(BaseModel):
    """Base of every section of a recipe: frozen, strict, unknown keys refused, docstrings become help.

    pydantic builds the validator of a class when it first validates, so that a command which reads no recipe
    builds none. Defaults and tables of this package are made by `model_construct`, which does not validate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in field_help(cls).items():
            properties[cls.model_fields[name].alias or name]["description"] = text
        return schema


def field_help(section: type[Options]) -> dict[str, str]:
    """Docstring below each field of a section, by field. pydantic's `use_attribute_docstrings` would read the
    source whenever the class is imported.
    """
    texts: dict[str, str] = {}
    for kind in section.__mro__:
        if issubclass(kind, Options):
            body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
            texts = _docstrings(body) | texts
    return {name: texts[name] for name in section.model_fields if name in texts}


def _docstrings(body: list[ast.stmt]) -> dict[str, str]:
    """Strings that follow an annotated name, by name."""
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


class WeightFormat(Options):
    """Storage format of a weight."""

    chosen_by: ClassVar[str] = "bits"
    """Key that chooses this class over the format below it, such as a preset's."""
    own_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of a mapping that is this class and no other; none: every other mapping is."""
    quantizer_key: ClassVar[str | None] = None
    """Key of `quantizer` with the options of its quantizer; None: the key of the layer's role."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Packages that its training uses beside torch; their versions are part of the cache key."""

    bits: Literal[8, 4, 3, 2] = 8
    """Bits of one code."""
    ternary: bool = False
    """Codes are -1, 0 and 1 only; `bits` is 2."""
    granularity: Literal["channel", "tensor"] = "channel"
    """One scale for each output channel (row of a table), or one for the whole tensor."""
    block: Literal[32, 64, 128] | None = None
    """Input channels that share a scale; none: one scale per output channel."""
    container: Literal["int8", "int4", "int2"] | None = None
    """Integer type in the ONNX file; none: int8 for 8 bits, int4 for fewer. TensorRT computes int4 as
    weight-only, so an int8 GEMM with int8 activations needs `int8`. int2, four codes to a byte, requires
    opset 25, and only ONNX Runtime reads it.
    """

    @model_validator(mode="after")
    def _container_holds_the_codes(self) -> WeightFormat:
        if self.bits > self.stored_bits:
            raise ValueError(f"{self.bits}-bit codes do not fit into an {self.container} container")
        if self.bits < 8 and self.block and self.container == "int8":
            raise ValueError("an int8 GEMM has no blocks: drop `block` for one scale per output channel")
        if self.ternary and self.bits != 2:
            raise ValueError("ternary codes are 2-bit codes: write `bits: 2`")
        if self.block and self.granularity == "tensor":
            raise ValueError("one scale for the whole tensor leaves no blocks: drop `block` or `granularity`")
        return self

    @property
    def integers(self) -> bool:
        """True if weight = code * scale: batch norms fold into the scale, and runtimes multiply the codes."""
        return True

    @property
    def vector(self) -> int:
        """Consecutive input channels that are coded together: each weight has a code of its own."""
        return 1

    @property
    def scale_block(self) -> int | None:
        """Input channels that share a scale; None: one scale per output channel or per tensor."""
        return self.block

    @property
    def stored_bits(self) -> int:
        """Bits of one code in the file."""
        return {"int8": 8, "int4": 4, "int2": 2}[self.container or ("int8" if self.bits == 8 else "int4")]

    @property
    def information_bits(self) -> float:
        """Bits of information in one code, independent of its container.

        >>> WeightFormat(bits=3).information_bits
        3
        >>> round(WeightFormat(bits=2, ternary=True).information_bits, 3)
        1.585
        """
        return math.log2(3) if self.ternary else self.bits

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code.

        >>> WeightFormat(bits=4).bounds, WeightFormat(bits=2, ternary=True).bounds
        ((-8, 7), (-1, 1))
        """
        return (-1, 1) if self.ternary else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def __str__(self) -> str:
        name = ("ternary" if self.ternary else f"int{self.bits}") + (f"-g{self.block}" if self.block else "")
        name += f" in int{self.stored_bits}" if self.stored_bits != self.bits else ""
        return name + (" per tensor" if self.granularity == "tensor" else "")


class CodebookFormat(Options):
    """A weight as vectors of `block` consecutive input channels, each the index of one of `centroids`
    (product quantization). It is not an integer grid: runtimes look the vectors up and multiply floats, so
    that it saves bytes on disk and in an engine, but no time.
    """

    chosen_by: ClassVar[str] = "codebook"
    """Key that chooses this class over the format below it."""
    own_keys: ClassVar[tuple[str, ...]] = ("codebook", "centroids", "table")
    """Keys of a mapping that is this class and no other."""
    quantizer_key: ClassVar[str | None] = "codebook"
    """Key of `quantizer` with the options of its quantizer."""
    packages: ClassVar[tuple[str, ...]] = ("faiss-cpu",)
    """Packages that its training uses beside torch; their versions are part of the cache key."""

    codebook: Literal["gather", "decode-int8"] = "gather"
    """gather: indices and table in the file; decode-int8: the file has the decoded weight as int8 codes with
    one scale for the tensor, as in the table, which an int8 GEMM accepts.
    """
    centroids: int = Field(default=256, ge=2, le=256)
    """Vectors in the table; an index takes a byte."""
    block: int = Field(default=8, ge=1)
    """Input channels of one vector; must divide those of the layer."""
    table: Literal["float", "int8"] = "float"
    """Centroids in the compute type, or int8 codes with one scale."""

    @model_validator(mode="after")
    def _int8_has_codes(self) -> CodebookFormat:
        if self.codebook == "decode-int8" and self.table != "int8":
            raise ValueError("the codes of the decoded weight are those of the table: write `table: int8`")
        return self

    @property
    def information_bits(self) -> float:
        """Bits of an index per weight, without the table.

        >>> CodebookFormat(block=8).information_bits
        1.0
        """
        return math.log2(self.centroids) / self.block

    @property
    def stored_bits(self) -> float:
        """Bits per weight in the file, without the table."""
        return 8 if self.codebook == "decode-int8" else 8 / self.block

    @property
    def integers(self) -> bool:
        """True if the decoded weight is stored as integers times a scale."""
        return self.codebook == "decode-int8"

    @property
    def vector(self) -> int:
        """Consecutive input channels that are coded together."""
        return self.block

    @property
    def scale_block(self) -> None:
        """None: a codebook has no scales of blocks."""
        return None

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code of a decoded weight."""
        return -127, 127

    def __str__(self) -> str:
        name = f"codebook {self.centroids}x{self.block}" + (" of int8" if self.table == "int8" else "")
        return name + (" decoded to int8" if self.codebook == "decode-int8" else "")


AnyWeightFormat = WeightFormat | CodebookFormat
WEIGHT_FORMATS: tuple[type[AnyWeightFormat], ...] = (WeightFormat, CodebookFormat)
"""Classes of weight formats; a mapping without keys of another one is the first."""


def weight_format_class(keys: Collection[str]) -> type[AnyWeightFormat]:
    """Class of weight format of a mapping with these keys.

    >>> weight_format_class({"bits", "block"}).__name__, weight_format_class({"table"}).__name__
    ('WeightFormat', 'CodebookFormat')
    """
    return next((one for one in WEIGHT_FORMATS if set(one.own_keys) & set(keys)), WEIGHT_FORMATS[0])


class ActivationFormat(Options):
    """Rounding of the input of a layer."""

    bits: Literal[8, 4, 3, 2] = 8
    """Bits of one code. Fewer than 8 are stored as int8 codes behind a Clip: TensorRT has no narrower
    activations, so they cost as much as int8.
    """
    granularity: Literal["tensor", "channel"] = "tensor"
    """One scale for the whole tensor, or one per channel (which TensorRT refuses)."""
    symmetric: bool = True
    """Zero point 0. An asymmetric format has a nonzero zero point, which TensorRT refuses."""
    signed: bool | Literal["auto"] = "auto"
    """false: codes 0..2^bits-1, twice as fine for inputs that are never negative, still int8 codes with zero
    point 0; not for 8 bits, which int8 does not hold. auto: false if the family knows the input to be behind
    a ReLU and the bits are fewer than 8.
    """

    @model_validator(mode="after")
    def _int8_holds_the_codes(self) -> ActivationFormat:
        if self.signed is False and self.bits == 8:
            raise ValueError("unsigned 8-bit codes do not fit into int8: drop `signed`, or write fewer bits")
        return self

    @model_serializer(mode="wrap")
    def _leave_auto_out(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit the default of `signed`, so that older recipes keep their digests."""
        return {key: value for key, value in dump(self).items() if (key, value) != ("signed", "auto")}

    def settled(self, nonnegative: bool) -> ActivationFormat:
        """Format with `signed` decided, for an input that is or is not known to be nonnegative.

        >>> ActivationFormat(bits=4).settled(nonnegative=True).bounds
        (0, 15)
        """
        unsigned = nonnegative and self.signed == "auto" and self.bits < 8
        return self.model_copy(update={"signed": False}) if unsigned else self

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code: QuantizeLinear saturates at [-128, 127], a Clip at other bounds.

        >>> ActivationFormat().bounds, ActivationFormat(bits=4, signed=False).bounds
        ((-128, 127), (0, 15))
        """
        if self.signed is False:
            return 0, 2**self.bits - 1
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def __str__(self) -> str:
        word = "uint" if self.signed is False else "int"
        return (f"{word}{self.bits}" + (" per channel" if self.granularity == "channel" else "")
                + ("" if self.symmetric else " asymmetric"))  # fmt: skip


WEIGHT_WORDS: dict[str, AnyWeightFormat | None] = {
    "float": None,
    "int8": WeightFormat.model_construct(bits=8),
    "int4": WeightFormat.model_construct(bits=4, block=128),
    "int3": WeightFormat.model_construct(bits=3),
    "int2": WeightFormat.model_construct(bits=2),
    "ternary": WeightFormat.model_construct(bits=2, ternary=True),
    "codebook": CodebookFormat.model_construct(),
}
"""Short forms of `format.weights` and `format.embeddings`."""

ACTIVATION_WORDS: dict[str, ActivationFormat | None] = {
    "float": None,
    "int8": ActivationFormat.model_construct(bits=8),
    "int4": ActivationFormat.model_construct(bits=4),
    "int3": ActivationFormat.model_construct(bits=3),
    "int2": ActivationFormat.model_construct(bits=2),
}
"""Short forms of `format.activations`, `format.attention`, `format.cache` and `format.residual`."""

FORMAT_PRESETS: dict[str, dict[str, Any]] = {
    "float": {"weights": "float", "activations": "float", "embeddings": "float"},
    "w8a8": {"weights": "int8", "activations": "int8", "embeddings": "int8"},
    "w8a16": {"weights": "int8", "activations": "float", "embeddings": "int8"},
    "w4a16-g32": {"weights": {"bits": 4, "block": 32}, "activations": "float", "embeddings": "int8"},
    "w4a16-g64": {"weights": {"bits": 4, "block": 64}, "activations": "float", "embeddings": "int8"},
    "w4a16-g128": {"weights": {"bits": 4, "block": 128}, "activations": "float", "embeddings": "int8"},
    "w4a4": {"weights": {"bits": 4, "container": "int8"}, "activations": "int4", "embeddings": "int8"},
    "w4a8": {"weights": {"bits": 4, "container": "int8"}, "activations": "int8", "embeddings": "int8"},
    "w3a8": {"weights": {"bits": 3, "container": "int8"}, "activations": "int8", "embeddings": "int8"},
    "w2a8": {"weights": {"bits": 2, "container": "int8"}, "activations": "int8", "embeddings": "int8"},
    "ternary-a8": {
        "weights": {"bits": 2, "ternary": True, "granularity": "tensor", "container": "int8"},
        "activations": "int8",
        "embeddings": {"bits": 2, "ternary": True},
    },
    "ipq": {"weights": {"codebook": "gather"}, "activations": "float", "embeddings": {"codebook": "gather"}},
}
"""Presets: `format: w8a8` is a row of this table; keys beside `preset:` override it."""


def as_mapping(key: str, value: object) -> object:
    """Expand a short form of `format.<key>` to its mapping; other values are returned unchanged.

    >>> as_mapping("weights", "int4")
    {'bits': 4, 'ternary': False, 'granularity': 'channel', 'block': 128, 'container': None}
    """
    rounded = ("activations", "attention", "cache", "residual")
    words: dict[str, Any] = ACTIVATION_WORDS if key in rounded else WEIGHT_WORDS
    form = words.get(value) if isinstance(value, str) else None
    return value if form is None else form.model_dump()


def over_preset(key: str, preset: object, written: object) -> object:
    """Merge the recipe's value of `format.<key>` over a preset's: without a key such as `bits` or
    `codebook` that chooses a class, it changes options of the preset's value.

    >>> over_preset("weights", {"bits": 4, "block": 128}, {"block": 64})
    {'bits': 4, 'block': 64}
    """
    below = as_mapping(key, preset)
    choosers = {one.chosen_by for one in WEIGHT_FORMATS}
    if isinstance(written, dict) and isinstance(below, dict) and not written.keys() & choosers:
        return {**below, **written}
    return written
