"""What this machine is, found without torch: processor, threads, CUDA device."""

from __future__ import annotations

import ctypes
import os
import platform
import socket


def threads() -> int:
    """Threads that torch and ONNX Runtime will use; another number gives other bits."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else len(os.sched_getaffinity(0))


def cuda_devices() -> list[tuple[int, int]]:
    """Compute capability of every CUDA device the driver reports, [] without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        major, minor = ctypes.c_int(), ctypes.c_int()
        if cuda.cuDeviceComputeCapability(ctypes.byref(major), ctypes.byref(minor), index) == 0:
            found.append((major.value, minor.value))
    return found


def device_kind(wanted: str) -> str:
    """Where torch will run for a recipe's `train.device`: cpu or cuda."""
    if wanted == "auto":
        return "cuda" if cuda_devices() else "cpu"
    return wanted


def describe_host() -> dict[str, object]:
    """Facts for the manifest."""
    return {
        "name": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": threads(),
        "gpu": {"sm": [f"{major}{minor}" for major, minor in cuda_devices()]},
    }
