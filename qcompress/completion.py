"""What a shell completes as the value of an option: words from the tables that commands read."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def words(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Completes with those of the known words that begin as typed.

    >>> words(["ptq", "lsq", "plain"])("p")
    ['ptq', 'plain']
    """
    found = list(known)

    def complete(incomplete: str) -> list[str]:  # typer goes by this name
        return [word for word in found if word.startswith(incomplete)]

    return complete
