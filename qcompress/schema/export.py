"""Options of the stages export and build. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qcompress.schema.formats import Options


class Export(Options):
    """The ONNX file."""

    graph: str | None = None
    """An ONNX file, relative to the recipe, that another tool made from `model`: it replaces training,
    folding and exporting, and is linted, measured, built and gated like an exported graph.
    """
    opset: int = Field(default=21, ge=21, le=25)
    """ONNX opset; int4 needs 21."""
    cache: bool = False
    """Keys and values of earlier tokens as inputs, those of all tokens as outputs: one graph for prompt and
    continuation. They are int8 codes if the format rounds them (`format.cache`, `format.attention`).
    """
    dynamic: list[Literal["batch", "sequence", "past"]] = ["batch", "sequence"]
    """Axes that stay symbolic; with a cache all three, unless written otherwise."""

    keep_fp32: list[Literal["norm", "softmax"]] = []
    """Operators that compute in fp32 in a graph of half precision: layer norms, softmaxes."""

    @model_validator(mode="before")
    @classmethod
    def _past_with_cache(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("cache") is True:
            return {"dynamic": ["batch", "sequence", "past"], **value}
        return value


class Profile(Options):
    """Shapes of one optimization profile: [min, opt, max] of each dynamic axis."""

    batch: list[int] = Field(default=[1, 1, 8], min_length=3, max_length=3)
    sequence: list[int] = Field(default=[1, 128, 256], min_length=3, max_length=3)
    past: list[int] = Field(default=[0, 128, 255], min_length=3, max_length=3)
    """Tokens in the key-value cache, for a graph that has one; 0 before the first prompt."""
    axes: dict[str, Annotated[list[int], Field(min_length=3, max_length=3)]] = {}
    """Axes of other names, of external graphs."""

    @model_validator(mode="after")
    def _ordered(self) -> Profile:
        if known := {"batch", "sequence", "past", "total"} & self.axes.keys():
            raise ValueError(f"axes is for other names than {', '.join(sorted(known))}")
        for name, (low, opt, high) in self.ranges.items():
            least = 0 if name == "past" else 1
            if not least <= low <= opt <= high:
                raise ValueError(f"{name} must be {least} <= min <= opt <= max, found {[low, opt, high]}")
        return self

    @property
    def ranges(self) -> dict[str, list[int]]:
        """[min, opt, max] by axis name."""
        return {"batch": self.batch, "sequence": self.sequence, "past": self.past, **self.axes}


class Build(Options):
    """The engine."""

    target: str = "cpu"
    """A device; `qcompress list targets`."""
    here: Literal["auto", "required", "never"] = "auto"
    """auto: build if this machine can, otherwise defer; required: fail (exit code 6) if it cannot."""
    profiles: list[Profile] = Field(default=[Profile.model_construct()], min_length=1)
    """Optimization profiles."""
    version_compatible: bool = False
    """The plan also runs on later versions of TensorRT, perhaps slower. It contains code, a lean runtime, so
    a device must be configured to trust it.
    """
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    """Other GPUs that can run the plan, perhaps slower: Ampere and everything later, or every GPU of the same
    compute capability.
    """
    timing_cache: str | None = None
    """File, relative to the recipe, in which the builder keeps its timings; created if missing."""
    timeout_s: int = Field(default=3600, ge=1)
    """Time limit of the builder, in seconds."""
    memory_mib: int = Field(default=16384, ge=256)
    """Private memory that the builder's process may use."""
