"""Options of `init`, and the collected mistakes in them. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qcompress.errors import Mistake, UsageError

Ask = Callable[[str, list[str]], str]
"""Asks the user a question with its possible answers; returns one of the answers."""


@dataclass(frozen=True)
class InitOptions:
    """Options of one `init`; None if not given."""

    model: Path | None
    data: Path | None
    target: str | None
    out: Path = Path("recipe.yaml")
    text_column: str | None = None
    label_column: str | None = None
    pair_column: str | None = None
    method: str | None = None
    format: str | None = None
    with_schema: bool = False
    labels_are: str | None = None
    task: str | None = None


@dataclass
class Mistakes:
    """Mistakes in the options of one `init`, collected so that all are reported together."""

    collected: list[Mistake] = field(default_factory=list)

    def add(self, option: str, message: str, fix: str) -> None:
        """Add a mistake in an option."""
        self.collected.append(Mistake("init", 0, option, message, fix))

    def settle(self) -> None:
        """Raise UsageError with all mistakes, if there are any."""
        if self.collected:
            count = f"{len(self.collected)} mistake{'s' if len(self.collected) != 1 else ''}"
            raise UsageError(
                "\n".join(
                    [f"no recipe was written: {count}:", *(f"  {mistake}" for mistake in self.collected)]
                )
            )
