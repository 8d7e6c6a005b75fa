"""Packages and devices that each job needs, checked in package metadata and with nvidia-smi. No torch.

No package is imported: a broken torch must not hide what else is missing.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

import qcompress

TRAIN = "pip install 'qcompress[train]'"
ORT = "onnxruntime-gpu|onnxruntime"
"""Alternative packages of one library; `train` installs the one for the platform."""

TORCH = ("torch", ">=2.11")

JOBS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "train": (TRAIN, (
        TORCH, ("transformers", ">=5.10,<6"), ("accelerate", ">=1.10"), ("datasets", ">=4.0"),
        ("nvidia-modelopt", ">=0.40"), ("requests", ">=2.31"), ("faiss-cpu", ">=1.8"),
        ("scikit-learn", ">=1.4"), ("Pillow", ">=10"),
    )),
    "export": (TRAIN, (TORCH, ("onnxscript", ">=0.5"), ("ml-dtypes", ">=0.5"), ("onnx", ">=1.20,<2"))),
    "onnxruntime": (TRAIN, ((ORT, ">=1.27"),)),
    "rtx engine": ("pip install 'qcompress[rtx]'", (("tensorrt_rtx", ">=1.5"),)),
    "tensorrt engine": ("pip install 'qcompress[tensorrt]'", (("tensorrt", ">=10.3"),)),
    "GPU measurement": (TRAIN, (TORCH, (ORT, ">=1.27"))),
    "triton bundle": ("pip install qcompress", (("onnx", ">=1.20,<2"), ("packaging", ">=23"))),
}  # fmt: skip
"""Install command and packages of each job, with the versions of pyproject.toml."""

ON_GPU = ("tensorrt engine", "GPU measurement")
SMI = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,compute_cap,memory.total",
    "--format=csv,noheader,nounits",
)
SMI_S = 30
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """One requirement of a job, and what is installed."""

    what: str
    wanted: str
    found: str | None
    ok: bool
    fix: str = ""


def diagnose(folder: Path = Path()) -> dict[str, Any]:
    """Check all jobs: {"jobs": [{"job", "ready", "needs": [...]}], "gpus", "gpu_reason", "disk", "python",
    "qcompress"}; the disk is that of `folder`.
    """
    gpus, reason = devices()
    jobs = []
    for job, (install, packages) in JOBS.items():
        needs = [_package(name, wanted, install) for name, wanted in packages]
        if job in ON_GPU:
            needs.append(_gpu(gpus, reason))
        if job == "GPU measurement":
            needs[0] = _with_cuda(needs[0])
        jobs.append(
            {"job": job, "ready": all(need.ok for need in needs), "needs": [asdict(need) for need in needs]}
        )
    disk = shutil.disk_usage(folder)
    return {
        "jobs": jobs,
        "gpus": gpus,
        "gpu_reason": reason,
        "disk": {"folder": str(folder.resolve()), "free_gib": round(disk.free / GIB, 1)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "qcompress": qcompress.__version__,
    }


def _package(names: str, wanted: str, install: str) -> Need:
    installed = next(filter(None, map(_version, names.split("|"))), None)
    ok = installed is not None and SpecifierSet(wanted).contains(installed, prereleases=True)
    name = names.replace("|", " or ")
    if ok:
        return Need(name, wanted, installed, True)
    upgrade = "pip install -U " if installed else "pip install "
    return Need(name, wanted, installed, False, install.replace("pip install ", upgrade, 1))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _with_cuda(torch: Need) -> Need:
    """Refuse a CPU build of torch, which cannot use a GPU."""
    if not torch.ok or not torch.found.endswith("+cpu"):
        return torch
    release = torch.found.removesuffix("+cpu")
    fix = f"pip uninstall -y torch && pip install torch=={release}"
    return Need(torch.what, f"{torch.wanted}, with CUDA", torch.found, False, fix)


def _gpu(gpus: list[dict[str, Any]], reason: str) -> Need:
    wanted = "a GPU and its driver"
    if gpus:
        return Need("nvidia-smi", wanted, ", ".join(gpu["name"] for gpu in gpus), True)
    return Need(
        "nvidia-smi", wanted, None, False, f"{reason}: use a machine with a GPU, or install its driver"
    )


def devices() -> tuple[list[dict[str, Any]], str]:
    """GPUs that nvidia-smi lists, or the reason why there are none."""
    if shutil.which(SMI[0]) is None:
        return [], "nvidia-smi is not installed"
    try:
        done = subprocess.run(SMI, capture_output=True, text=True, errors="replace", timeout=SMI_S)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {SMI_S} s"
    except OSError as error:
        return [], f"nvidia-smi does not start ({error})"
    if done.returncode != 0:
        output = (done.stdout + done.stderr).strip().splitlines()
        return [], f"nvidia-smi failed ({output[0] if output else f'exit code {done.returncode}'})"
    keys = ("name", "driver", "compute_capability", "memory_mib")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    gpus = [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]
    return gpus, "" if gpus else "nvidia-smi lists no GPU"
