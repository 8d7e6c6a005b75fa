r"""Safe printing of untrusted text: names of tensors, values of a column, paths, texts of errors.

A character that moves a cursor, ends a line, changes the writing direction or cannot be encoded is printed as
an escape sequence of Python (`\x1b`, `\u202e`). CI servers interpret some lines of a log as commands. GitHub:
a line that begins with `::`, even after blanks, or has `##[` anywhere; Azure: `##vso[`; TeamCity:
`##teamcity[`. One character of such a mark is escaped, so that the line is text.

`show` makes a text one line, `show_lines` keeps the line ends before indented lines, which are qcompress's.
All output of a command to stdout and stderr passes through `Guard`. Standard library only.
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
"""Controls of C0 (except tabs and line ends), DEL, C1, line separators, direction marks, invisible operators,
lone surrogates, tags.
"""

UNSAFE = re.compile(f"[{HIDDEN}]")
UNSAFE_IN_LINE = re.compile(f"[{HIDDEN}\t\n]")
ALIEN_LINE_END = re.compile(r"\n(?! {2})")
"""Line end inside untrusted text: continuation lines of qcompress are indented."""

SEQUENCE = r"\x1b\[[0-9;?]*[A-Za-z]"
"""Colours and cursor movements, as rich and tqdm print them on a terminal."""

COMMAND = re.compile(rf"^(?:\s|{SEQUENCE})*::|##\w*\[")
"""Marks of CI commands in a line of a log; the last character of each is escaped."""


def _escape(match: re.Match[str]) -> str:
    text = match[0]
    return text.encode("unicode_escape").decode() if len(text) == 1 else text


def show(text: object) -> str:
    """Text in one line, with hidden characters escaped."""
    return UNSAFE_IN_LINE.sub(_escape, str(text))


def show_lines(text: object) -> str:
    """Text of several lines: a line end is kept if the next line is indented by two blanks or more."""
    return UNSAFE.sub(_escape, ALIEN_LINE_END.sub(r"\\n", str(text)))


def show_block(text: object) -> str:
    """Text with all line ends kept: a document of qcompress."""
    return UNSAFE.sub(_escape, str(text))


def say(*lines: object, stderr: bool = False) -> None:
    """Print lines, with untrusted characters escaped."""
    for line in lines:
        print(show_lines(line), file=sys.stderr if stderr else sys.stdout)


class Guard:
    """Stream that escapes untrusted characters and CI commands. A terminal gets colours and carriage returns,
    which progress bars of other packages print; a file or a pipe gets no control characters except tab and
    line end.
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
        """Print a text with every unsafe character and every command escaped."""
        escaped = self._allowed.sub(self._pass if self._colours else _escape, text)
        pieces = [self._harmless(piece) for piece in re.split(r"(?<=[\n\r])", escaped)]
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
        """Print a command for the CI server on a line of its own; its values must be escaped."""
        self.write("\n" if self._line else "")
        self._print(f"{line}\n")

    def _print(self, text: str) -> None:
        with self._named():
            self.stream.write(encodable(text, self.stream.encoding))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Context that adds the stream's name to an error. The stream is redirected to the null device,
        because Python flushes it at exit. An error of stderr is ignored: it cannot be reported.
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

    def _pass(self, match: re.Match[str]) -> str:
        text = match[0]
        return text if len(text) > 1 or text == "\r" else _escape(match)

    def _harmless(self, piece: str) -> str:
        """Escape commands in a piece of a line, of which `_line` was printed already."""
        before = len(self._line)
        line = self._line + piece
        places = [match.end() - 1 for match in COMMAND.finditer(line) if match.end() > before]
        for place in reversed(places):
            line = f"{line[:place]}\\x{ord(line[place]):02x}{line[place + 1 :]}"
        ended = piece.endswith(("\n", "\r"))
        self._line = "" if ended else line if len(line) < 4096 else "x" + line[-64:]
        return line[before:]


def encodable(text: str, encoding: str | None) -> str:
    """Text with the characters escaped that an encoding lacks."""
    name = encoding or "utf-8"
    return text if name.lower() in ("utf-8", "utf8") else text.encode(name, "backslashreplace").decode(name)


@contextmanager
def guarded() -> Iterator[None]:
    """Context in which stdout and stderr pass through guards."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream if isinstance(stream, Guard) else Guard(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def flushed() -> Iterator[None]:
    """Context that flushes stdout at its end, so that a failing output is an error."""
    try:
        yield
    finally:
        sys.stdout.flush()


def command(line: str, stderr: bool = False) -> None:
    """Print a command for the CI server."""
    stream = sys.stderr if stderr else sys.stdout
    stream.command(line) if isinstance(stream, Guard) else stream.write(f"{line}\n")


def json_text(text: str) -> str:
    """JSON document with CI commands escaped inside its strings; its parsed value is unchanged."""
    return re.sub(r"##(\w*\[)", r"\\u0023#\1", text)
