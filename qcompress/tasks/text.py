"""Text from files or from `datasets`, and digests that identify data. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.errors import MachineError, UsageError
from qcompress.schema.recipe import TextData
from qcompress.system.artifacts import sha256_file
from qcompress.system.memory import MIB, demand_memory
from qcompress.system.untrusted_file import demand_file

if TYPE_CHECKING:
    import datasets


def read_text(data: TextData, base: Path, most: int | None = None) -> str:
    """Read the whole text, or `most` lines of each file and rows of a dataset. Files are concatenated; rows
    of a dataset are joined by blank lines, as is usual for perplexity on WikiText.
    """
    if data.text is not None and most is not None:
        return "".join(line for name in data.text for line in islice(open_text(base / name), most))
    if data.text is not None:
        return "".join(read_file(base / name) for name in data.text)
    rows = open_dataset(data, base)
    if data.column not in rows.column_names:
        raise UsageError(
            f"dataset {data.dataset} has the columns {', '.join(rows.column_names)}, not {data.column!r}",
            fix="set `column:` to the one that holds the text",
        )
    if most is not None:
        rows = rows.select(range(min(most, len(rows))))
    texts = list(rows[data.column])
    if other := sorted({type(text).__name__ for text in texts if not isinstance(text, str)}):
        raise UsageError(
            f"column {data.column!r} of dataset {data.dataset} is not all text: {', '.join(other)}",
            fix="set `column:` to the one that holds the text, in every row",
        )
    return "\n\n".join(texts)


def read_lines(data: TextData, base: Path, most: int | None = None) -> list[str]:
    """Read one example a line from all files, or from the first `most` lines of each; empty lines are
    skipped.
    """
    lines = [line for name in data.text or () for line in islice(open_text(base / name), most)]
    examples = [line.strip() for line in lines if line.strip()]
    if not examples:
        raise UsageError(f"{', '.join(data.text or ())} has no line of text", fix="name more text")
    return examples


CHARACTER_BYTES, TOKEN_BYTES = 100, 400
"""Memory of the package `tokenizers` for a character and for a token of one text: 0.9 to 1.8 times the
measured use (GPT-2's tokenizer, MiniLM's and one of 512 tokens; English, digits, Japanese; texts of 4 MB).
"""

ENCODER_BYTES = 32 * MIB
"""Memory of a tokenizer for a short text."""

PROBE = 2**14
"""Number of characters that are tokenized for the estimate."""


def demand_encoder_memory(texts: Sequence[str], tokenizer: Any) -> None:
    """Raise AllocationError if there is too little memory to tokenize `texts` in one call."""
    demand_memory("tokenizing", ENCODER_BYTES)
    characters = sum(map(len, texts))
    probe = next((text[:PROBE] for text in texts if text), "")
    if not probe:
        return
    tokens = len(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]) / len(probe)
    needs = ENCODER_BYTES + int(characters * (CHARACTER_BYTES + TOKEN_BYTES * tokens))
    demand_memory(f"tokenizing {characters:,} characters at once", needs)


INSTALL = "pip install 'qcompress[train]'"


def open_dataset(data: TextData, base: Path) -> datasets.Dataset:
    """Open a dataset on the hub or in a local directory."""
    try:
        import datasets
    except ImportError as error:
        raise MachineError(
            f"reading the dataset {data.dataset} needs `datasets` ({error})", fix=INSTALL
        ) from None
    path = base / data.dataset
    name = str(path) if path.exists() else data.dataset
    try:
        return datasets.load_dataset(name, data.config, split=data.split, revision=data.revision)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(
            f"dataset {data.dataset} (config {data.config}, split {data.split}) cannot be read: {error}",
            fix="check the name, or name local files instead",
        ) from None


def fingerprint(data: TextData, base: Path) -> dict[str, str]:
    """Digests that identify the data: of the files' content, or the coordinates of a dataset."""
    if data.files:
        return {
            f"{index}:{Path(name).name}": sha256_file(base / name) for index, name in enumerate(data.files)
        }
    path = base / (data.folder or data.dataset)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): sha256_file(file) for file in files}
    return {"dataset": f"{data.dataset}/{data.config}/{data.split}@{data.revision}"}


def open_text(file: Path, longest: int = -1) -> Iterator[str]:
    """Lines of a file, one at a time, with their line ends; a byte-order mark is dropped. Raises UsageError
    for a line of more than `longest` characters.
    """
    try:
        with demand_file(file).open(encoding=UTF8, newline="") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(longest), ""), 1):
                if len(line) == longest:
                    raise UsageError(
                        f"{file.name}:{number} has more than {longest - 1:,} characters",
                        fix="correct or remove that row",
                    )
                yield line
    except UnicodeDecodeError:
        read_file(file)  # raises an error with the position
        raise
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror})", fix="check the file") from None


def read_file(path: Path) -> str:
    """Whole text of a file, with its line ends; a byte-order mark is dropped."""
    try:
        return demand_file(path).read_bytes().decode(UTF8)  # not read_text, which would rewrite line ends
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start})", fix=f"write it as UTF-8{_or(path)}"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})", fix="check the file") from None


def _or(path: Path) -> str:
    """Addition to a fix that names the likely encoding of a file which is not UTF-8."""
    with path.open("rb") as stream:
        return "; it is UTF-16" if stream.read(2) in (b"\xff\xfe", b"\xfe\xff") else ""


def printable(text: str) -> str:
    r"""Text that any terminal and any file accepts: half a character is written as `\ud83d`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_text(cell: object) -> bool:
    """True for text without half a character, which neither tokenizers nor files accept."""
    return isinstance(cell, str) and (cell.isascii() or printable(cell) == cell)


UTF8 = "utf-8-sig"
"""UTF-8; a byte-order mark at the beginning of a file is not part of its text."""
