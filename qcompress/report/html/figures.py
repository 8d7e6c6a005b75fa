"""A number as a page shows it, and where it comes from.

Every number in a table is a `Figure`, spelled by `spelled` and nowhere else. It carries the number itself
and a pointer into the file of the run that has it, so that a reader, or a test, can look it up:
`parity.json#/rows/0/metrics/test.perplexity` (a JSON pointer, RFC 6901). On a page about several runs the
file has the place of its run before it: `1/parity.json#/...`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompress.report.ladder import spell
from qcompress.system import strict_json

MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """A number, as it is and as it is shown."""

    value: float | None
    shown: str
    source: str = ""
    """Where it stands; empty for what was computed from per-sample results."""
    over: str = ""
    """Where the number stands that it was divided by."""

    @property
    def raw(self) -> str:
        """The number as JSON has it."""
        return strict_json.dumps(self.value)


@dataclass(frozen=True)
class Document:
    """A JSON file of a run; `name` is how figures from it call it."""

    name: str
    content: Any

    def at(self, *path: str | int) -> Any:
        """What stands at a place; None where there is no such key."""
        found = self.content
        for key in path:
            found = found.get(key) if isinstance(found, dict) else found[key]
            if found is None:
                return None
        return found

    def figure(self, *path: str | int, unit: str = "") -> Figure:
        """The number at a place."""
        value = self.at(*path)
        return Figure(value, spelled(value, unit), self._pointer(path))

    def share(self, path: tuple[str | int, ...], over: tuple[str | int, ...]) -> Figure:
        """The number at a place, as a share of the number at another one."""
        part, whole = self.at(*path), self.at(*over)
        value = None if part is None or not whole else part / whole
        return Figure(value, spelled(value, "share"), self._pointer(path), self._pointer(over))

    def _pointer(self, path: tuple[str | int, ...]) -> str:
        keys = (str(key).replace("~", "~0").replace("/", "~1") for key in path)
        return f"{self.name}#/{'/'.join(keys)}"


def computed(value: float | None, unit: str = "") -> Figure:
    """A number that stands in no file."""
    return Figure(value, spelled(value, unit))


def spelled(value: float | None, unit: str = "") -> str:
    """A number as a reader sees it: five digits, counts in full, a dash for what is not there.

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
