"""Numbers of a page with a pointer to their source.

Every number in a table is a `Figure`, formatted by `spelled` alone. It has the number and a JSON pointer
(RFC 6901) into the run's file, so that a reader or a test can look the number up:
`parity.json#/rows/0/metrics/test.perplexity`. On a page about several runs the file name has the run's number
before it: `1/parity.json#/...`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompress.report.ladder import spell
from qcompress.system import strict_json

MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """A number and its formatted text."""

    value: float | None
    shown: str
    source: str = ""
    """JSON pointer of the number; empty if it was computed from per-sample results."""
    over: str = ""
    """JSON pointer of the divisor of a ratio."""

    @property
    def raw(self) -> str:
        """The number in JSON."""
        return strict_json.dumps(self.value)


@dataclass(frozen=True)
class Document:
    """A JSON file of a run; `name` is the file's name in pointers."""

    name: str
    content: Any

    def at(self, *path: str | int) -> Any:
        """Value at a path of keys; None if a key is missing."""
        value = self.content
        for key in path:
            value = value.get(key) if isinstance(value, dict) else value[key]
            if value is None:
                return None
        return value

    def figure(self, *path: str | int, unit: str = "") -> Figure:
        """Figure of the number at a path."""
        value = self.at(*path)
        return Figure(value, spelled(value, unit), self._pointer(path))

    def share(self, path: tuple[str | int, ...], over: tuple[str | int, ...]) -> Figure:
        """Figure of the number at `path` divided by the number at `over`."""
        numerator, denominator = self.at(*path), self.at(*over)
        value = None if numerator is None or not denominator else numerator / denominator
        return Figure(value, spelled(value, "share"), self._pointer(path), self._pointer(over))

    def _pointer(self, path: tuple[str | int, ...]) -> str:
        keys = (str(key).replace("~", "~0").replace("/", "~1") for key in path)
        return f"{self.name}#/{'/'.join(keys)}"


def computed(value: float | None, unit: str = "") -> Figure:
    """Figure of a computed number, without a source."""
    return Figure(value, spelled(value, unit))


def spelled(value: float | None, unit: str = "") -> str:
    """Format a number: five digits, integers in full, a dash for None.

    `share` and `signed` are spelled with fewer digits; `bytes` as MiB or KiB.

    >>> [spelled(31.280169), spelled(1873029), spelled(1873029, "bytes"), spelled(4.5e-05, "share"),
    ...  spelled(0.2, "signed %"), spelled(None, "s"), spelled(True)]
    ['31.28', '1,873,029', '1.786 MiB', '4.5e-05', '+0.2 %', '-', 'yes']
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if unit == "bytes":
        return f"{value / MIB:.4g} MiB" if value >= MIB else f"{value / 1024:.4g} KiB"
    if unit == "share":
        return f"{value:.2g}"
    if unit.startswith("signed"):
        return f"{value:+.3g}{unit.removeprefix('signed')}"
    shown = f"{value:,}" if isinstance(value, int) else spell(value)
    return f"{shown} {unit}" if unit else shown
