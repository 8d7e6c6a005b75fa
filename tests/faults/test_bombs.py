"""Data files that claim or unpack to more than they have, nesting without end, pipes and devices as files."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacked import attacked
from lines import finished, python

from qcompress.system import strict_json

pytestmark = pytest.mark.attack("hostile data files, bombs and devices")

SECONDS, MIB = 20, 500
"""The issue's limits are 5 s and 500 MB on a free machine; tests run beside others."""

READ = """
import sys, time
from pathlib import Path
from qcompress.errors import QcompressError
from qcompress.schema.recipe import TextData
from qcompress.system.filesystem import peak_mib
from qcompress.tasks import images, table
from qcompress.parity.sample_results import read_samples
file, begin = Path(sys.argv[1]), time.monotonic()
try:
    if sys.argv[2] == "images":
        for one in images.read_pictures(TextData(npz=[file.name]), file.parent, {}).pictures: one.open()
    elif sys.argv[2] == "image":
        images.open_image(file)
    elif sys.argv[2] == "samples":
        read_samples(file)
    else:
        table.read_table(TextData(table=[file.name]), file.parent, table.Wanted({"text": "text"}))
    print("read")
except QcompressError as error:
    print(error.exit_code, error)
except ValueError as error:
    print("ValueError", error)
print(peak_mib(), time.monotonic() - begin)
"""


def read(file: Path, how: str) -> tuple[str, float, float]:
    """Outcome of a reader on a file, its peak memory in MiB and its seconds."""
    done = python(READ, str(file), how)
    assert done.code == 0, done
    *said, numbers = done.stdout.strip().split("\n")
    mib, seconds = map(float, numbers.split())
    return "\n".join(said), mib, seconds


def npy(shape: tuple[int, ...], descr: str = "|u1", version: int = 1) -> bytes:
    """The header of an array."""
    out = io.BytesIO()
    facts = {"descr": descr, "fortran_order": False, "shape": shape}
    if version == 3:
        text = repr(facts).encode()
        out.write(b"\x93NUMPY\x03\x00" + struct.pack("<I", len(text)) + text)
    else:
        np.lib.format.write_array_header_1_0(out, facts)
    return out.getvalue()


def archive(file: Path, *members: tuple[str, bytes, int], pack: bool = True) -> None:
    """A numpy archive: name, content and how many zero bytes follow."""
    how = zipfile.ZIP_DEFLATED if pack else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", how, compresslevel=1) as opened:
        for name, content, zeros in members:
            with opened.open(f"{name}.npy", "w", force_zip64=True) as stream:
                stream.write(content)
                for start in range(0, zeros, 2**24):
                    stream.write(bytes(min(2**24, zeros - start)))


OK = npy((2, 4, 4, 3)), 96

ARCHIVES: dict[str, Callable[[Path], Any]] = {
    "images of petabytes": lambda file: archive(file, ("images", npy((10**9, 1000, 1000, 3)), 0)),
    "labels of petabytes": lambda file: archive(file, ("images", *OK), ("labels", npy((10**15,), "<i8"), 0)),
    "labels of 10^30": lambda file: archive(file, ("images", *OK), ("labels", npy((10**15, 10**15)), 0)),
    "a negative axis": lambda file: archive(file, ("images", npy((-2, 4, 4, 3)), 96)),
    "two negative axes": lambda file: archive(file, ("images", npy((-2, -4, 4, 3)), 96)),
    "a deflate bomb": lambda file: archive(file, ("images", npy((6000, 128, 128, 3)), 6000 * 49152)),
    "a bomb of labels": lambda file: archive(file, ("images", *OK), ("labels", npy((2,)), 300 * 2**20)),
    "a header of 300 MB": lambda file: archive(
        file, ("images", b"\x93NUMPY\x02\x00" + struct.pack("<I", 300 * 2**20), 300 * 2**20)
    ),
    "version 3": lambda file: archive(file, ("images", npy((10**12, 4, 4, 3), version=3), 0)),
    "version 9": lambda file: archive(file, ("images", b"\x93NUMPY\x09\x00" + npy((2, 4, 4, 3))[8:], 96)),
    "objects": lambda file: archive(file, ("images", *OK), ("labels", npy((2,), "|O"), 16)),
    "cut short": lambda file: (archive(file, ("images", *OK)), os.truncate(file, 150)),
    "one byte short": lambda file: archive(file, ("images", npy((2, 4, 4, 3)), 95), pack=False),
    "random bytes": lambda file: file.write_bytes(np.random.default_rng(0).bytes(999)),
    "a pickle": lambda file: file.write_bytes(b"\x80\x04cos\nsystem\n"),
    "a pipe": os.mkfifo,
    "an endless device": lambda file: file.symlink_to("/dev/zero"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_claims_too_much_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    ARCHIVES[name](file)
    said, mib, seconds = read(file, "images")
    assert said.startswith("2 ") and "data.npz" in said, said
    assert mib < MIB and seconds < SECONDS, (mib, seconds)


def png(width: int, height: int, rows: int | None = None) -> bytes:
    """A black picture; `rows`: how many of them are there."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    packer = zlib.compressobj(9)
    row = b"\0" + bytes(3 * width)
    content = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", content) + chunk(b"IEND", b"")


PICTURES: dict[str, Callable[[Path], Any]] = {
    "100 million pixels": lambda file: file.write_bytes(png(20_000, 5_000)),
    "192 million pixels": lambda file: file.write_bytes(png(12_000, 16_000, 10)),
    "a claim of 3.6 billion pixels": lambda file: file.write_bytes(png(60_000, 60_000, 1)),
    "a claim of 2^62 pixels": lambda file: file.write_bytes(png(2**31 - 1, 2**31 - 1, 0)),
    "no pixels": lambda file: file.write_bytes(png(0, 0)),
    "cut short": lambda file: file.write_bytes(png(64, 64)[:60]),
    "a BMP that claims 60000 x 60000": lambda file: file.write_bytes(
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    ),
    "a GIF that claims 65535 x 65535": lambda file: file.write_bytes(
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;"
    ),
    "PostScript by another name": lambda file: file.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    ),
    "empty": lambda file: file.write_bytes(b""),
    "a text": lambda file: file.write_text("<svg/>"),
    "a pipe": os.mkfifo,
    "an endless device": lambda file: file.symlink_to("/dev/zero"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_claims_too_much_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    PICTURES[name](file)
    said, mib, seconds = read(file, "image")
    assert said.startswith("2 ") and "one.png" in said, said
    assert mib < MIB and seconds < SECONDS, (mib, seconds)


def parquet(file: Path, text: Any, rows: int, parts: int = 1) -> None:
    """A column of equal cells, which the file has once."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    indices = pa.array(np.zeros(rows, np.int32))
    table = pa.table({"text": pa.DictionaryArray.from_arrays(indices, pa.array([text]))})
    with pq.ParquetWriter(file, table.schema) as writer:
        for _ in range(parts):
            writer.write_table(table)


COLUMNS = 200_000

TABLES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "200,000 columns": (
        "csv",
        lambda file: file.write_text(
            ",".join(f"c{i}" for i in range(COLUMNS)) + "\n" + ",".join("1" * COLUMNS) + "\n"
        ),
    ),
    "200,000 columns of tabs": (
        "tsv",
        lambda file: file.write_text("\t".join(f"c{i}" for i in range(COLUMNS)) + "\n"),
    ),
    "an object of 200,000 keys": (
        "jsonl",
        lambda file: file.write_text(json.dumps({f"c{i}": 1 for i in range(COLUMNS)}) + "\n"),
    ),
    "100 new keys a line": (
        "jsonl",
        lambda file: file.write_text(
            "".join(json.dumps({f"c{100 * row + i}": 1 for i in range(100)}) + "\n" for row in range(2000))
        ),
    ),
    "a cell of 100 MB": ("csv", lambda file: file.write_text("text\n" + "a" * 100 * 10**6 + "\n")),
    "a quoted cell of 100 MB": (
        "csv",
        lambda file: file.write_text('text\n"' + "a b\n" * 25 * 10**6 + '"\n'),
    ),
    "a quote that never closes": ("csv", lambda file: file.write_text('text\n"' + "a\n" * 20 * 10**6)),
    "a line of 100 MB without a cell": ("tsv", lambda file: file.write_text("text\n" + "\t" * 10**8)),
    "a JSON line of 100 MB": ("jsonl", lambda file: file.write_text('{"text": "' + "a" * 10**8 + '"}\n')),
    "lists in lists": ("jsonl", lambda file: file.write_text("[" * 200_000 + "\n")),
    "objects in objects": ("jsonl", lambda file: file.write_text('{"text":' * 100_000 + "\n")),
    "a number of a million digits": ("jsonl", lambda file: file.write_text("9" * 10**6 + "\n")),
    "zeros": ("csv", lambda file: (file.touch(), os.truncate(file, 3 * 2**30))),
    "a cell of 1 MB, 5,000 times": ("parquet", lambda file: parquet(file, "a" * 2**20, 5_000)),
    "an empty cell, 40 million times": ("parquet", lambda file: parquet(file, "", 10_000_000, 4)),
    "no parquet": ("parquet", lambda file: file.write_bytes(b"PAR1xxxxPAR1")),
    "a parquet footer of 2 GB": (
        "parquet",
        lambda file: file.write_bytes(b"PAR1" + bytes(99) + struct.pack("<I", 2**31 - 1) + b"PAR1"),
    ),
    "a pipe": ("csv", os.mkfifo),
    "a pipe for parquet": ("parquet", os.mkfifo),
    "an endless device": ("jsonl", lambda file: file.symlink_to("/dev/zero")),
    "a circle of links": ("tsv", lambda file: file.symlink_to(file.name)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_takes_too_much_is_refused(name: str, tmp_path: Path) -> None:
    suffix, make = TABLES[name]
    file = tmp_path / f"data.{suffix}"
    make(file)
    said, mib, seconds = read(file, "table")
    assert said.startswith("2 ") and "data." in said, said
    assert mib < MIB and seconds < SECONDS, (mib, seconds)


SAMPLES: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: gzip.compress(bytes(300 * 2**20), 1),
    "spaces before a value": lambda: gzip.compress(b" " * 300 * 2**20 + b"{}", 1),
    "a list of zeros": lambda: gzip.compress(b'{"sets": [' + b"0," * 100 * 2**20 + b"0]}", 1),
    "many members": lambda: gzip.compress(bytes(2**20), 9) * 300,
    "lists in lists": lambda: gzip.compress(b"[" * 10**6),
    "cut short": lambda: gzip.compress(b'{"sets": {}}' * 99)[:40],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_packed_samples_that_take_too_much_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "samples.json.gz"
    file.write_bytes(SAMPLES[name]())
    done = python(READ, str(file), "samples")
    if name == "cut short":  # EOFError, which the callers name
        assert "EOFError" in done.stderr
        return
    *said, numbers = done.stdout.strip().split("\n")
    mib, seconds = map(float, numbers.split())
    assert said[0].startswith("ValueError"), done
    assert mib < MIB and seconds < SECONDS


DEEP = {
    "lists": "[" * 10**6,
    "objects": '{"a":' * 10**6,
    "both": '[{"a":' * 10**5,
    "closed": "[" * 10**5 + "]" * 10**5,
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_json_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match="nested too deeply|line 1"):
        strict_json.loads(DEEP[name])


KINDS = ("a pipe", "a device", "a socket", "a folder", "a circle of links", "nothing")


def planted(kind: str, file: Path) -> None:
    """Put something that is not a file in the place of one."""
    if file.is_symlink() or file.exists():
        file.unlink()
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    elif kind == "a folder":
        file.mkdir()
    elif kind == "a circle of links":
        file.symlink_to(file.name)
    elif kind == "a socket":
        here = Path.cwd()
        os.chdir(file.parent)  # a socket's path must be short
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(file.name)
        finally:
            os.chdir(here)


PLACES = ("recipe", "data", "engine", "baseline", "goals", "graph")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", PLACES)
def test_what_is_not_a_file_is_refused(
    what: str, kind: str, tmp_path: Path, tiny_model: Path, text_file: Path
) -> None:
    project = finished(tiny_model, text_file)
    bad = tmp_path / "bad"
    planted(kind, bad)
    words: list[str | Path] = {
        "recipe": ["check", bad],
        "data": ["check", project.recipe, "--set", f'data.train.text=["{bad}"]'],
        "engine": ["verify", project.latest, "--engine", bad],
        "baseline": ["gate", "--baseline", bad, "--candidate", project.latest],
        "goals": ["gate", "--baseline", project.latest, "--candidate", project.latest, "--goals", bad],
        "graph": ["inspect", bad],
    }[what]
    ended = attacked(*words, timeout_s=60)
    assert "Traceback" not in ended.text and ended.code == 2 and "bad" in ended.text, ended
    assert ended.seconds < SECONDS
