r"""Text from outside as it may be printed: names of tensors, values of a column, paths, texts of errors.

A character that moves a cursor, ends a line, turns the direction of writing or cannot be encoded is shown as
Python spells it (`\x1b`, `\u202e`). A CI server takes some lines of a log for commands. GitHub: a line that
begins with `::`, even after blanks, or has `##[` anywhere; Azure: `##vso[`; TeamCity: `##teamcity[`. Such
a line is printed with one character of the mark spelled out, and is text.

`show` makes one line of a text, `show_lines` keeps the line ends that are ours: those before two blanks.
`Guard` is the door: all that a command prints to stdout and stderr passes through it. Standard library only.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f"
)
"""Controls of C0 (but tabs and line ends), DEL, C1, line separators, marks of direction, invisible operators,
halves of characters, tags.
"""

UNSAFE = re.compile(f"[{HIDDEN}]")
UNSAFE_IN_LINE = re.compile(f"[{HIDDEN}\t\n]")
ALIEN_LINE_END = re.compile(r"\n(?! {2})")
"""A line end that is not ours: what we write in several lines is indented."""

SEQUENCE = r"\x1b\[[0-9;?]*[A-Za-z]"
"""Colours and movements of the cursor, as rich and tqdm print them on a terminal."""

COMMAND = re.compile(rf"^(?:\s|{SEQUENCE})*::|##\w*\[")
"""Marks of commands in a line of a log; the last character of each is spelled out."""


def _spelled(found: re.Match[str]) -> str:
    text = found[0]
    return text.encode("unicode_escape").decode() if len(text) == 1 else text


def show(text: object) -> str:
    """A text in one line, without a character that is not seen."""
    return UNSAFE_IN_LINE.sub(_spelled, str(text))


def show_lines(text: object) -> str:
    """A text of several lines: a line end stays where the next line is indented by two blanks or more."""
    return UNSAFE.sub(_spelled, ALIEN_LINE_END.sub(r"\\n", str(text)))


def show_block(text: object) -> str:
    """A text whose line ends all stay: a document of ours."""
    return UNSAFE.sub(_spelled, str(text))


def say(*lines: object, stderr: bool = False) -> None:
    """Print lines."""
    for line in lines:
        print(show_lines(line), file=sys.stderr if stderr else sys.stdout)


class Guard:
    """A stream whose lines are text, whatever they hold. A terminal gets colours and carriage returns, which
    progress bars of other packages print; a file and a pipe get no control but tab and line end.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._line = ""
        colours = stream.isatty() or "FORCE_COLOR" in os.environ
        self._allowed = re.compile(rf"{SEQUENCE}|\r|{UNSAFE.pattern}" if colours else UNSAFE.pattern)
        self._colours = colours

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Print a text with every unsafe character and every command spelled out."""
        spelled = self._allowed.sub(self._pass if self._colours else _spelled, text)
        pieces = [self._harmless(piece) for piece in re.split(r"(?<=[\n\r])", spelled)]
        self._print("".join(pieces))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._named():
            self.stream.flush()

    def writelines(self, lines: list[str]) -> None:
        """Print several texts."""
        for line in lines:
            self.write(line)

    def command(self, line: str) -> None:
        """Print a command to the CI server in a line of its own; its values are escaped already."""
        self.write("\n" if self._line else "")
        self._print(f"{line}\n")

    def _print(self, text: str) -> None:
        with self._named():
            self.stream.write(encodable(text, self.stream.encoding))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An error says which stream it is. The stream ends there, because Python flushes it at its end. An
        error of stderr has nowhere to be told.
        """
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            number = self.stream.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            if number == 2:
                return
            error.filename = self.stream.name
            raise

    def _pass(self, found: re.Match[str]) -> str:
        text = found[0]
        return text if len(text) > 1 or text == "\r" else _spelled(found)

    def _harmless(self, piece: str) -> str:
        """A piece of a line, of which `_line` was printed already."""
        before = len(self._line)
        line = self._line + piece
        places = [found.end() - 1 for found in COMMAND.finditer(line) if found.end() > before]
        for place in reversed(places):
            line = f"{line[:place]}\\x{ord(line[place]):02x}{line[place + 1 :]}"
        ended = piece.endswith(("\n", "\r"))
        self._line = "" if ended else line if len(line) < 4096 else "x" + line[-64:]
        return line[before:]


def encodable(text: str, encoding: str | None) -> str:
    """A text with what an encoding lacks spelled out."""
    name = encoding or "utf-8"
    return text if name.lower() in ("utf-8", "utf8") else text.encode(name, "backslashreplace").decode(name)


@contextmanager
def guarded() -> Iterator[None]:
    """All that is printed inside goes through a guard."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (one if isinstance(one, Guard) else Guard(one) for one in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def flushed() -> Iterator[None]:
    """Flush what was printed inside; an output that refuses it is an error."""
    try:
        yield
    finally:
        sys.stdout.flush()


def command(line: str, stderr: bool = False) -> None:
    """Print a command to the CI server."""
    stream = sys.stderr if stderr else sys.stdout
    stream.command(line) if isinstance(stream, Guard) else stream.write(f"{line}\n")


def json_text(text: str) -> str:
    """A JSON document whose strings hold no mark of a command: it says the same to every parser."""
    return re.sub(r"##(\w*\[)", r"\\u0023#\1", text)
