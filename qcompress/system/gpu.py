"""The GPU of this machine, asked of the CUDA driver itself, and what it can build. No torch."""

from __future__ import annotations

from qcompress.schema.targets import Target
from qcompress.system.host import cuda_devices


def compute_capability() -> int | None:
    """SM of the first visible GPU, 86 for 8.6; None without a driver or a GPU."""
    capabilities = cuda_devices()
    if not capabilities:
        return None
    major, minor = capabilities[0]
    return major * 10 + minor


def lacks(target: Target) -> str:
    """What keeps this machine from building for a target, before TensorRT is asked; empty if nothing does.
    TensorRT-RTX builds anywhere.
    """
    if target.backend != "tensorrt":
        return ""
    found = compute_capability()
    if found == target.sm:
        return ""
    return f"TensorRT builds on the device itself (SM{target.sm}), and this machine has " + (
        f"a GPU of SM{found}" if found else "no CUDA device"
    )
