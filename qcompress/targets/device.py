"""The GPU of this machine, asked of the CUDA driver itself, and what it can build. No torch."""

from __future__ import annotations

import ctypes
import sys

from qcompress.targets.table import Target

MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


def compute_capability() -> int | None:
    """SM of the first visible GPU, 86 for 8.6; None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in ((major, MAJOR), (minor, MINOR)):
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return major.value * 10 + minor.value


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
