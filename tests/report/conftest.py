"""Fixtures of the report's tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qcompress.report.html import charts


@pytest.fixture(scope="package", autouse=True)
def _equal_charts_once() -> Iterator[None]:
    """Charts take most of a page's time, and pages of one run repeat them: a chart of equal arguments
    is drawn once.
    """
    drawn: dict[str, str] = {}

    def once(draw: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(draw)
        def cached(*arguments: Any, **options: Any) -> str:
            key = repr((draw.__name__, arguments, options))
            if key not in drawn:
                drawn[key] = draw(*arguments, **options)
            return drawn[key]

        return cached

    with pytest.MonkeyPatch.context() as patch:
        for name in ("lines", "stairs", "bars", "intervals"):
            patch.setattr(charts, name, once(getattr(charts, name)))
        yield
