"""A page as a program sees it, by Python's own parser, and a reader of the pointers in it that shares no code
with what wrote them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "wbr", "br", "hr", "img", "input"}


@dataclass
class Node:
    """An element: its tag, attributes, and the text of everything in it."""

    tag: str
    attributes: dict[str, str]
    parents: tuple[str, ...]
    text: str = ""
    children: list[Node] = field(default_factory=list)

    def all(self, tag: str) -> list[Node]:
        return [
            descendant
            for child in self.children
            for descendant in ([child] if child.tag == tag else []) + child.all(tag)
        ]


class Page(HTMLParser):
    """The elements of a page in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.nodes: list[Node] = []
        self.open: list[Node] = []
        self.feed(text)
        self.close()
        assert self.open == [], [node.tag for node in self.open]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attributes}) == len(attributes), attributes
        node = Node(tag, {name: value or "" for name, value in attributes}, tuple(n.tag for n in self.open))
        self.nodes.append(node)
        if self.open:
            self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1].tag == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, text: str) -> None:
        for node in self.open:
            node.text += text

    def all(self, tag: str) -> list[Node]:
        return [node for node in self.nodes if node.tag == tag]

    def section(self, anchor: str) -> Node:
        (match,) = [node for node in self.all("section") if node.attributes["id"] == anchor]
        return match

    @property
    def figures(self) -> list[Node]:
        return [node for node in self.nodes if "data-value" in node.attributes]


def read(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def look_up(pointer: str, runs: list[Path]) -> Any:
    """Value at a figure's JSON pointer; None if nothing is there."""
    name, _, path = pointer.partition("#/")
    place, _, rest = name.partition("/")
    folder, file = (runs[int(place)], rest) if place.isdigit() else (runs[0], name)
    text = (folder / file).read_text(encoding="utf-8")
    lines = file.endswith(".jsonl")
    whole = (line for line in text.splitlines() if line.endswith("}"))
    value = [*map(json.loads, whole)] if lines else json.loads(text)
    for key in path.split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        if value is None:
            return None
        value = value[int(key)] if isinstance(value, list) else value.get(key)
    return value


def same(first: Any, second: Any) -> bool:
    """Equal to the last bit, NaN too."""
    both = (first, second)
    return all(isinstance(value, float) and math.isnan(value) for value in both) or first == second
