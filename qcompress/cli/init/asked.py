"""What `init` was asked for, and the mistakes in it, all reported at once. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qcompress.errors import Mistake, UsageError

Ask = Callable[[str, list[str]], str]
"""Puts a question with its possible answers to a person, and returns one of them."""


@dataclass(frozen=True)
class Asked:
    """The options of one `init`; None where the choice is left to it, or one is missing."""

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


@dataclass
class Mistakes:
    """Collects what is wrong with the options of one `init`."""

    found: list[Mistake] = field(default_factory=list)

    def add(self, option: str, message: str, fix: str) -> None:
        self.found.append(Mistake("init", 0, option, message, fix))

    def settle(self) -> None:
        """Raise UsageError with every mistake, if there is one."""
        if self.found:
            count = f"{len(self.found)} mistake{'s' if len(self.found) != 1 else ''}"
            raise UsageError(
                "\n".join([f"no recipe was written: {count}:", *(f"  {one}" for one in self.found)])
            )
