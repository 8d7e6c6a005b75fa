"""Shell completion of option values, from the tables that the commands read."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def words(known: Iterable[str]) -> Callable[[], list[str]]:
    """Completion function for these words; typer selects those that begin with the typed text.

    >>> words({"ptq": 1, "lsq": 2})()
    ['ptq', 'lsq']
    """
    listed = list(known)
    return lambda: listed
