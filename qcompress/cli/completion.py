"""What a shell completes as the value of an option: words from the tables that commands read."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def words(known: Iterable[str]) -> Callable[[], list[str]]:
    """Offers the known words, of which typer takes those that begin as typed.

    >>> words({"ptq": 1, "lsq": 2})()
    ['ptq', 'lsq']
    """
    found = list(known)
    return lambda: found
