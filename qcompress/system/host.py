"""Properties of this machine, without torch: processor, threads, CUDA devices."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import sys

MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


def threads() -> int:
    """Number of threads of torch and ONNX Runtime; another number gives other bits."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else cores()


def cores() -> int:
    """Logical processors available to this process; all of the machine if the system cannot tell."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def device_kind(wanted: str) -> str:
    """Device of torch for a recipe's `train.device`: cpu or cuda."""
    if wanted == "auto":
        return "cuda" if cuda_devices() else "cpu"
    return wanted


def describe_host() -> dict[str, object]:
    """Host section of the manifest."""
    return {
        "name": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": threads(),
        "gpu": {"sm": [f"{major}{minor}" for major, minor in cuda_devices()]},
    }
