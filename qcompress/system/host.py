"""Properties of this machine, without torch: processor, threads, and the host section of the manifest."""

from __future__ import annotations

import os
import platform
import socket

from qcompress.system.gpu import cuda_devices


def threads() -> int:
    """Number of threads of torch and ONNX Runtime; another number gives other bits."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else cores()


def cores() -> int:
    """Logical processors available to this process; all of the machine if the system cannot tell."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
