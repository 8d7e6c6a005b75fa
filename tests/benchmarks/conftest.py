"""Steps are measured as `train` makes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qcompress.system.filesystem import memory_kept


@pytest.fixture(autouse=True)
def _as_in_training() -> Iterator[None]:
    with memory_kept():
        yield
