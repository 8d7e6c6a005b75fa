"""CUDA devices of this machine, asked of the CUDA driver. No torch."""

from __future__ import annotations

import ctypes
import sys

MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


def cuda_driver() -> ctypes.CDLL | None:
    """Library of the CUDA driver, initialised; None without one, or if it reports an error."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return None if cuda.cuInit(0) else cuda
    except (OSError, AttributeError):  # no such library, or a stub without its functions
        return None


def cuda_devices() -> list[tuple[int, int]]:
    """Compute capability of every CUDA device of the driver; empty without a driver."""
    cuda, count = cuda_driver(), ctypes.c_int()
    if cuda is None or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    capabilities = [_capability(cuda, ordinal) for ordinal in range(count.value)]
    return [capability for capability in capabilities if capability is not None]


def _capability(cuda: ctypes.CDLL, ordinal: int) -> tuple[int, int] | None:
    """Compute capability of one device; None if the driver reports an error."""
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGet(ctypes.byref(device), ordinal):
        return None
    for number, attribute in ((major, MAJOR), (minor, MINOR)):
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return major.value, minor.value


def compute_capability() -> int | None:
    """SM of the first visible GPU, 86 for 8.6; None without a driver or a GPU."""
    capabilities = cuda_devices()
    if not capabilities:
        return None
    major, minor = capabilities[0]
    return major * 10 + minor


def device_kind(wanted: str) -> str:
    """Device of torch for a recipe's `train.device`: cpu or cuda."""
    if wanted == "auto":
        return "cuda" if cuda_devices() else "cpu"
    return wanted
