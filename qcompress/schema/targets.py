"""Table of targets and their limits, decided from the recipe alone. No torch, no TensorRT.

An engine of TensorRT is built on the device itself. TensorRT-RTX builds on any machine, with or without a
GPU, for one compute capability (SM). Versions are those that ship for a device; precisions are the vendor's
support matrices, restricted to what TensorRT-RTX 1.7 builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from qcompress.errors import UsageError
from qcompress.system.gpu import compute_capability

if TYPE_CHECKING:
    from qcompress.schema.export import Build

AMPERE = 80
"""SM of the first Ampere GPUs."""

BLOCKS = (32, 64, 128)
"""Block sizes of int4 weights with a fast kernel."""


@dataclass(frozen=True)
class Target:
    """A device, and the TensorRT that builds for it."""

    name: str
    backend: Literal["tensorrt", "tensorrt_rtx"] | None
    """Python module of the builder; none: the target has no engine."""
    versions: tuple[tuple[str, str], ...]
    """Versions of the backend that build for this device: ranges [from, to)."""
    sm: int | None
    """Compute capability, 86 for 8.6."""
    note: str
    weight_bits: tuple[int, ...] = (8, 4)
    """Bits of the integer types in which weights may be stored."""
    compute: tuple[str, ...] = ("fp32", "fp16", "bf16")
    """Types of matmuls."""

    def accepts(self, version: str) -> bool:
        """True if this version of the backend builds for this device.

        >>> TARGETS["thor"].accepts("11.4.0.106"), TARGETS["thor"].accepts("11.4.1.2")
        (False, True)
        """
        numbers = _numbers(version)
        return any(_numbers(low) <= numbers < _numbers(high) for low, high in self.versions)

    @property
    def jetson(self) -> bool:
        """True for a Jetson."""
        return self.versions in (JETPACK_6, JETPACK_7)

    @property
    def requirement(self) -> str:
        """Backend and its versions, for messages.

        >>> TARGETS["orin-jp6"].requirement
        'tensorrt >=10.3,<11'
        """
        return f"{self.backend} " + " or ".join(f">={low},<{high}" for low, high in self.versions)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


RTX = (("1.5", "2"),)
SERVER = (("11", "12"),)
JETPACK_6 = (("10.3", "11"),)
JETPACK_7 = (("10.3", "11"), ("11.4.1", "12"))
"""JetPack 7 ships TensorRT 10 until 7.2.2 and TensorRT from 11.4.1 on after it."""

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "cpu", None, (), None,
            "ONNX Runtime on any processor, in the forms that its integer kernels take; checked against the "
            "rules that all TensorRT targets share, so that a recipe that passes here builds elsewhere.",
            weight_bits=(8, 4, 2), compute=("fp32", "fp16"),
        ),
        Target(
            "rtx-turing", "tensorrt_rtx", RTX, 75,
            "GeForce RTX 20 and Quadro RTX: fp16 matmuls and int8 only.",
            weight_bits=(8,), compute=("fp16",),
        ),
        Target("rtx-ampere", "tensorrt_rtx", RTX, 86, "GeForce RTX 30 and RTX A-series."),
        Target("rtx-ada", "tensorrt_rtx", RTX, 89, "GeForce RTX 40 and RTX Ada generation."),
        Target("rtx-blackwell", "tensorrt_rtx", RTX, 120, "GeForce RTX 50 and RTX PRO Blackwell."),
        Target(
            "t4", "tensorrt", SERVER, 75, "Tesla T4: int8 and fp16; no bf16, no int4.",
            weight_bits=(8,), compute=("fp32", "fp16"),
        ),
        Target("a10", "tensorrt", SERVER, 86, "A10."),
        Target("a100", "tensorrt", SERVER, 80, "A100 and A30."),
        Target("l4", "tensorrt", SERVER, 89, "L4."),
        Target("l40s", "tensorrt", SERVER, 89, "L40S and L40."),
        Target("h100", "tensorrt", SERVER, 90, "H100 and GH200."),
        Target("h200", "tensorrt", SERVER, 90, "H200."),
        Target("b200", "tensorrt", SERVER, 100, "B200 and GB200."),
        Target("orin-jp6", "tensorrt", JETPACK_6, 87, "Jetson Orin with JetPack 6; build on the Jetson."),
        Target("orin-jp7", "tensorrt", JETPACK_7, 87, "Jetson Orin with JetPack 7; build on the Jetson."),
        Target("thor", "tensorrt", JETPACK_7, 110, "Jetson Thor; build on the Jetson."),
    )
}  # fmt: skip
"""Targets by name."""


def find_target(name: str) -> Target:
    """Target of that name. Raises UsageError for an unknown name."""
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}", fix=f"name one of {', '.join(TARGETS)}")
    return TARGETS[name]


class Refusal(NamedTuple):
    """A recipe setting that its target does not support."""

    key: str
    """The recipe key to change."""
    message: str
    fix: str


def option_refusals(target: Target | str, build: Build) -> Iterator[Refusal]:
    """Refuse options in `build` that the target's builder does not support.

    Hardware compatibility: TensorRT's engine compatibility page (Ampere and later, no Jetson); refusals of
    TensorRT-RTX were measured with 1.7.
    """
    target = find_target(target) if isinstance(target, str) else target
    asked = {
        "version_compatible": build.version_compatible,
        "hardware_compatibility": build.hardware_compatibility != "none",
        "timing_cache": build.timing_cache is not None,
    }
    reasons = {}
    if target.backend is None:
        reasons = dict.fromkeys(asked, f"target {target.name} builds no engine")
    elif target.backend == "tensorrt_rtx":
        reasons = {
            "version_compatible": "TensorRT-RTX ships no lean runtime to put into the plan",
            "hardware_compatibility": "TensorRT-RTX compiles on the device, for its compute capability",
            "timing_cache": "TensorRT-RTX times nothing while it builds",
        }
    elif target.jetson:
        reasons = {"hardware_compatibility": "TensorRT has no hardware compatibility on Jetson"}
    elif build.hardware_compatibility == "ampere-plus" and target.sm < AMPERE:
        reasons = {"hardware_compatibility": f"target {target.name} (SM{target.sm}) is older than Ampere"}
    for name, reason in reasons.items():
        if asked[name]:
            yield Refusal(f"build.{name}", reason, f"drop `{name}`, or name another build.target")


def lacks(target: Target) -> str:
    """Reason why this machine cannot build for a target, without asking TensorRT; empty if it may.
    TensorRT-RTX builds on any machine.
    """
    if target.backend != "tensorrt":
        return ""
    sm = compute_capability()
    if sm == target.sm:
        return ""
    return f"TensorRT builds on the device itself (SM{target.sm}), and this machine has " + (
        f"a GPU of SM{sm}" if sm else "no CUDA device"
    )
