"""YAML reader with line numbers: plain values, the line of every key, and the mistakes in the text. No torch.

Scalars follow YAML 1.2, not PyYAML's 1.1: `2e-5` is a number; `off`, `yes`, `on`, `2024-01-01`, `1_000` and
`1:30` are text, so that a schema refuses them by type instead of reading something else. Only the core tags
exist, a key is text and appears once, and size, depth and aliases are bounded: no file can hang a check.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from qcompress.errors import Mistake

Key = tuple[str | int, ...]
"""Path of a value: mapping keys and list indices, from the top."""

BYTES_LIMIT = 2**18
DEPTH_LIMIT = 32
NODES_LIMIT = 20_000
"""Largest number of values in a text, with every alias expanded."""
DIGITS_LIMIT = 40

FILE = "file"
"""Key shown in mistakes that concern a whole file."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
"""Types of plain text in YAML 1.2's core schema; the first match wins."""

_BARE = r'[^\s."\[\]=]+'
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_KEY = re.compile(rf"(?:{_BARE}|{_QUOTED})(?:\.(?:{_BARE}|{_QUOTED})|\[[0-9]{{1,6}}\])*")


@dataclass(frozen=True)
class Place:
    """A line of a file, counted from 1; 0 without a line."""

    file: str
    line: int


@dataclass
class Document:
    """Plain values with the line of each, and the mistakes found in them so far.

    A key with a mistake is tainted: checks that read it later would report that mistake again in other words.
    """

    value: dict[str, Any]
    places: dict[Key, Place]
    mistakes: list[Mistake] = field(default_factory=list)
    tainted: set[Key] = field(default_factory=set)

    def place(self, key: Key) -> Place:
        """Line of a key; for a key that is not written, the line of its section."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places[key]

    def report(self, key: Key, message: str, fix: str) -> None:
        """Add a mistake at a key, and taint the key."""
        place = self.place(key)
        self.mistakes.append(Mistake(place.file, place.line, dotted(key) or FILE, message, fix))
        self.tainted.add(key)

    def sound(self, *keys: Key) -> bool:
        """True if these keys are untainted, including the keys above and below them."""
        return not any(bad[: len(key)] == key[: len(bad)] for bad in self.tainted for key in keys)

    def present(self, *keys: Key) -> bool:
        """True if these keys and the keys above them are untainted; keys below may be tainted.

        A mistake about a whole file, such as an `extends` that leads nowhere, does not taint its keys.
        """
        return not any(bad and bad == key[: len(bad)] for bad in self.tainted for key in keys)


def dotted(key: Key) -> str:
    """Format a key as it is shown and typed.

    >>> print(dotted(("format", "layers", "h.0.*", "bits")), dotted(("build", "profiles", 0)))
    format.layers."h.0.*".bits build.profiles[0]
    """
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            word = part if re.fullmatch(_BARE, part) else json.dumps(part, ensure_ascii=False)
            text += f".{word}" if text else word
    return text


def split_key(text: str) -> tuple[Key, str] | None:
    """Split a text into the key at its beginning and the rest; None if it does not begin with a key.

    >>> split_key('format.layers."h.0.*".bits=4')
    (('format', 'layers', 'h.0.*', 'bits'), '=4')
    """
    match = _KEY.match(text)
    if match is None:
        return None
    parts: list[str | int] = []
    for part in re.findall(rf"{_QUOTED}|\[[0-9]+\]|{_BARE}", match[0]):
        if part[0] == "[":
            parts.append(int(part[1:-1]))
        elif part[0] == '"':
            try:
                parts.append(json.loads(part))
            except ValueError:
                return None
        else:
            parts.append(part)
    return tuple(parts), text[match.end() :]


def read_yaml(file: Path, shown: str) -> Document:
    """Read a file; `shown` is its name in mistakes. A file that cannot be read is one mistake."""
    try:
        if not os.path.exists(file):
            close = difflib.get_close_matches(file.name, _yaml_names(file.parent), n=1)
            return _refused(
                shown, "does not exist", f"did you mean {close[0]}?" if close else "check the path"
            )
        if not os.path.isfile(file):
            what = "is a directory" if os.path.isdir(file) else "is not a regular file"
            return _refused(shown, what, "name a YAML file")
        with open(file, "rb") as stream:
            content = stream.read(BYTES_LIMIT + 1)
    except OSError as error:
        return _refused(shown, f"cannot be read ({error.strerror})", "check the file's permissions")
    except ValueError:
        return _refused(shown, "the file's name holds a NUL character", "name a file that can exist")
    if len(content) > BYTES_LIMIT:
        return _refused(shown, f"is larger than {BYTES_LIMIT} bytes", "name a recipe, not data")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8: found byte 0x{content[error.start]:02x}"
        return _refused(shown, message, "save the file as UTF-8", line)
    return parse_yaml(text, shown)


def parse_yaml(text: str, shown: str) -> Document:
    """Parse a text. A syntax error is one mistake, with its line and column."""
    document = Document({}, {(): Place(shown, 1)})
    value = _read(text, document, ())
    if document.sound(()) and value is None:
        document.report((), "is empty", "write a recipe; `qcompress init` makes a first one")
    elif () not in document.tainted and not isinstance(value, dict):
        document.report((), "is not a mapping of keys", "write `key: value` lines, such as `method: ptq`")
    document.value = value if isinstance(value, dict) else {}
    return document


def parse_value(text: str, key: Key, shown: str) -> Document:
    """Document with one value at a key, as if it were written there; without line numbers."""
    document = Document({}, {key[:length]: Place(shown, 0) for length in range(len(key) + 1)})
    value = _read(text, document, key)
    for part in reversed(key):
        value = {part: value}
    document.value = value
    document.places = dict.fromkeys(document.places, Place(shown, 0))
    document.mistakes = [replace(mistake, line=0) for mistake in document.mistakes]
    return document


def dump_yaml(value: dict[str, Any]) -> str:
    """YAML text that `parse_yaml` reads back as an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _refused(shown: str, message: str, fix: str, line: int = 0) -> Document:
    document = Document({}, {(): Place(shown, line)})
    document.report((), message, fix)
    return document


def _yaml_names(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.endswith((".yaml", ".yml"))]
    except OSError:
        return []


# From text to nodes -------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with the scalars of YAML 1.2 and bounded depth; nothing is constructed."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        self.depth += 1
        if self.depth > DEPTH_LIMIT:
            raise _too_large(self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which YAML 1.1 or 1.2 would read as another type."""


for _name, _words in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_words})$"), None)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_words})$"), None)


def _too_large(mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(
        problem=f"more than {NODES_LIMIT} values or {DEPTH_LIMIT} levels, with all aliases written out",
        problem_mark=mark,
    )


def _read(text: str, document: Document, key: Key) -> Any:
    """Value of a text; its lines and mistakes are added to the document, below the key."""
    shown = document.places[()].file
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return None if node is None else _plain(node, key, document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.places[key] = Place(shown, mark.line + 1)
        document.report(key, f"column {mark.column + 1}: {_syntax_message(error)}", _syntax_fix(error))
    except yaml.reader.ReaderError as error:
        document.places[key] = Place(shown, text.count("\n", 0, error.position) + 1)
        document.report(key, f"holds the character {error.character:#04x}", "remove the control character")
    except (ValueError, OverflowError):
        # PyYAML converts \U escapes and %YAML versions with chr() and int(), and lets their errors through.
        document.report(key, "holds an escape or a version that is not a number", "write plain text")
    return None


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    message = error.problem or ""
    if error.context:
        message += f", {error.context}"
        if error.context_mark and error.context_mark.line != error.problem_mark.line:
            message += f" that begins in line {error.context_mark.line + 1}"
    return message


def _syntax_fix(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or ""
    if "levels" in problem:
        return "write a shorter file of less depth"
    if "\\t" in problem:
        return "indent with spaces, not tabs"
    if "alias" in problem or "start any token" in problem or "alphabetic" in f"{problem} {error.context}":
        return "put quotes around text that begins with *, &, @, % or a backquote, such as a layer's glob"
    if "another document" in problem:
        return "write one recipe a file: remove the `---` line"
    return "check the indentation, colons, quotes and brackets around this line"


# From nodes to values -----------------------------------------------------------------------------


def _plain(node: yaml.Node, key: Key, document: Document) -> Any:
    """Value of a node; None, with a mistake, if it has no valid value."""
    place = Place(document.places[()].file, node.start_mark.line + 1)
    document.places.setdefault(key, place)
    if len(document.places) > NODES_LIMIT or len(key) > DEPTH_LIMIT:
        raise _too_large(node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, key, document)
    if node.tag != _TAG + ("map" if isinstance(node, yaml.MappingNode) else "seq"):
        document.report(key, f"has the tag {_shown_tag(node)}", "remove the tag")
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*key, index), document) for index, item in enumerate(node.value)]
    return _mapping(node, key, document)


def _mapping(node: yaml.MappingNode, key: Key, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name_node, value_node in node.value:
        name = name_node.value if isinstance(name_node, yaml.ScalarNode) else "?"
        at = (*key, name)
        first = document.places.get(at)
        if name not in values or at not in document.tainted:
            document.places[at] = Place(document.places[()].file, name_node.start_mark.line + 1)
        if name_node.tag != _TAG + "str" or _unprintable(name):
            quotable = isinstance(name_node, yaml.ScalarNode) and not _unprintable(name)
            fix = f'put it in quotes: "{name}"' if quotable else "write a plain word"
            document.report(at, "a key must be text", fix)
        elif name == "<<":
            document.report(at, "merge keys are not part of YAML 1.2", "use `extends: other.yaml`")
        elif name not in values:
            values[name] = _plain(value_node, at, document)
        elif first and at not in document.tainted:
            values[name] = None
            document.report(at, f"is written twice, first in line {first.line}", "keep one of the two")
    return values


def _scalar(node: yaml.ScalarNode, key: Key, document: Document) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "str" and not _unprintable(text):
        return text
    if kind == "str":
        document.report(key, "holds a NUL character or half a character", "write printable text")
    elif kind not in _SCALARS or not re.fullmatch(_SCALARS[kind], text):
        document.report(key, f"has the tag {_shown_tag(node)}, found {text[:40]!r}", "remove the tag")
    elif kind == "bool":
        return text.lower() == "true"
    elif kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    elif kind == "int" and len(text) > DIGITS_LIMIT:
        document.report(key, f"is a number of {len(text)} digits", "write fewer digits")
    elif kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return None


def _shown_tag(node: yaml.Node) -> str:
    return node.tag.replace(_TAG, "!!")[:60]


def _unprintable(text: str) -> bool:
    """True for characters that break files: NUL ends names in the operating system, and a lone surrogate
    cannot be encoded.
    """
    return any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text)
