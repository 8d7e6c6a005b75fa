"""Compute capability of this machine's GPU, from the CUDA driver. No torch."""

from __future__ import annotations

from qcompress.system.host import cuda_devices


def compute_capability() -> int | None:
    """SM of the first visible GPU, 86 for 8.6; None without a driver or a GPU."""
    capabilities = cuda_devices()
    if not capabilities:
        return None
    major, minor = capabilities[0]
    return major * 10 + minor
