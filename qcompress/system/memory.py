"""Memory limits and failed allocations of this process. Standard library only."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from qcompress.errors import MachineError, QcompressError

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

STATM = Path("/proc/self/statm")


@contextmanager
def bounded(more_bytes: int) -> Iterator[None]:
    """Context that limits the memory of the process to `more_bytes` beyond its current use, on Linux.
    Allocations beyond the limit fail as on a machine without memory.
    """
    if resource is None or not STATM.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + more_bytes
    limits = [limit, *(existing for existing in (soft, hard) if existing != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


STATUS = Path("/proc/self/status")


def limit_memory(mib: int) -> None:
    """Limit private writable memory to `mib` MiB beyond that of the imported libraries, and disable core
    dumps. For a child process: the limit cannot be lifted.

    Not the address space: a CUDA driver reserves far more of that than it ever uses. Other systems than Linux
    have no such limit.
    """
    if resource is None or not STATUS.is_file():
        return
    used_kib = re.search(r"VmData:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    wanted = (mib << 20) + (int(used_kib[1]) << 10 if used_kib else 0)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _address_space() -> int:
    """Bytes of this process's address space."""
    return int(STATM.read_text(encoding="ascii").split()[0]) * resource.getpagesize()


# Failed allocations --------------------------------------------------------------------------------

MIB = 2**20

_WORDS = re.compile(
    r"can't allocate memory|cannot allocate memory|unable to allocate|failed to allocate|bad_?alloc"
    r"|not enough memory|out of memory|outofmemory|failed to map segment|can't start new thread"
    r"|alloc_failed|memory allocation of \d+ bytes failed|memory exhausted",
    re.IGNORECASE,
)
"""Messages of torch, numpy, onnxruntime, CUDA, Rust and the system's loader about a failed allocation."""

COPIES = {"load": 1, "train": 6, "fold": 3, "export": 4, "build": 4, "verify": 4}
"""Smallest number of copies of the float weights that a stage holds at once: train has the teacher, the
weights, their gradients, two moments of Adam and the rounded weights.
"""

LIBRARIES = 600 * MIB
"""Bytes of torch, transformers and onnxruntime without a model."""


FIX = (
    "free memory, raise the limit, or lower train.batch_size and verify.batch_size; what is finished "
    "stays, and the same command resumes"
)


ADDRESS_SPACE = {"train": 1000, "fold": 1000, "export": 1450, "build": 1000, "verify": 1000}
"""Smallest address space, in MiB, in which the libraries of a stage can be loaded on a CPU. With less, some
of them end the process while they are loaded.
"""

STARVED = 16 * MIB
"""Free bytes below which an unexpected error of a library counts as a failed allocation (torch:
SystemError).
"""


class AllocationError(MachineError):
    """An allocation failed."""


def is_allocation(error: BaseException | None) -> bool:
    """True if an error is a failed allocation or was caused by one."""
    if error is None or isinstance(error, AllocationError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    native = type(error).__module__.partition(".")[0] in ("onnxruntime", "safetensors", "safetensors_rust")
    if (native or isinstance(error, RuntimeError | ImportError)) and _WORDS.search(str(error)):
        return True
    if isinstance(error, QcompressError):
        return is_allocation(error.__cause__ or error.__context__)
    return is_allocation(error.__cause__)  # torch's exporter wraps errors in its own


class Allocations:
    """Context that raises AllocationError if an allocation fails. `needs`: an estimate in bytes."""

    def __init__(self, what: str, needs: Callable[[], int | None] = lambda: None) -> None:
        self.what, self.needs = what, needs

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        starved = isinstance(error, Exception) and not isinstance(error, QcompressError | OSError)
        if is_allocation(error) or (starved and available()[0] < STARVED):
            raise _out_of_memory(self.what, self.needs(), error) from None


def demand_memory(task: str, needs: int) -> None:
    """Raise AllocationError if fewer than `needs` bytes are free: for libraries that end the process when an
    allocation fails, such as those in Rust.
    """
    left, origin = available()
    if needs > left:
        raise AllocationError(
            f"{task} takes about {needs // MIB:,} MiB, and {left // MIB:,} MiB are left ({origin})", fix=FIX
        )


def demand_libraries(stage: str) -> None:
    """Raise AllocationError if the limit on address space (ulimit -v) is too low to load the libraries of a
    stage.
    """
    least = ADDRESS_SPACE.get(stage, 0) * MIB
    if resource is None:
        return
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY and soft < least:
        raise AllocationError(
            f"the stage {stage} takes {least // MIB:,} MiB of address space at the least, and the limit is "
            f"{soft // MIB:,} MiB (ulimit -v)",
            fix="raise the limit; what is finished stays, and the same command resumes",
        )


def stage_bytes(stage: str, checkpoint: Path) -> int | None:
    """Smallest memory of a stage for a checkpoint, in bytes; None for a stage without a model."""
    if stage not in COPIES:
        return None
    files = [file for file in checkpoint.glob("*.safetensors") if file.is_file()]
    return LIBRARIES + COPIES[stage] * sum(file.stat().st_size for file in files)


def _out_of_memory(what: str, needs: int | None, error: BaseException) -> AllocationError:
    left, origin = available()
    lines = str(error).strip().splitlines()
    estimate = f"it takes about {needs // MIB:,} MiB at the least, and " if needs is not None else ""
    return AllocationError(
        f"{what} ran out of memory: {estimate}{left // MIB:,} MiB are left ({origin})"
        + (f"; {type(error).__name__}: {lines[0][:200]}" if lines else ""),
        fix=FIX,
    )


def available() -> tuple[int, str]:
    """Bytes that this process can still allocate, and the name of the limit."""
    limits = [(size, origin) for size, origin in _limits() if size is not None]
    return min(limits, default=(0, "unknown"))


def _limits() -> Iterator[tuple[int | None, str]]:
    """Bytes left by the machine, the container and the shell."""
    text = _text(Path("/proc/meminfo"))
    if known := re.search(r"MemAvailable:\s*(\d+) kB", text):
        yield int(known[1]) * 1024, "the machine's memory"
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the machine's memory"
    for limit, used in _groups():
        most, taken = _text(limit).strip(), _text(used).strip()
        if most.isdigit() and taken.isdigit() and int(most) < 2**62:
            yield max(int(most) - int(taken), 0), f"the container's limit of {int(most) // MIB:,} MiB"
    if resource is not None:
        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY and STATM.is_file():
            yield max(soft - _address_space(), 0), f"the limit of {soft // MIB:,} MiB (ulimit -v)"


def _groups() -> Iterator[tuple[Path, Path]]:
    """Files with the limit and the use of this process's control groups, the innermost first."""
    root = Path("/sys/fs/cgroup")
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, _, rest = line.partition(":")
        kinds, _, name = rest.partition(":")
        if kinds not in ("", "memory"):
            continue
        top = root / "memory" if kinds else root
        for place in (top / name.lstrip("/"), *(top / name.lstrip("/")).parents):
            if not place.is_relative_to(top):
                break
            if kinds:
                yield place / "memory.limit_in_bytes", place / "memory.usage_in_bytes"
            else:
                yield place / "memory.max", place / "memory.current"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
