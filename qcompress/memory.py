"""Memory that this process may take, and allocations that fail. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

STATM = Path("/proc/self/statm")


@contextmanager
def bounded(more_bytes: int) -> Iterator[None]:
    """Limit what the process may take beyond what it has, where Linux counts it. An allocation beyond it
    fails as on a machine without memory.
    """
    if resource is None or not STATM.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + more_bytes
    limits = [limit, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Bytes of address space that this process has."""
    return int(STATM.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
