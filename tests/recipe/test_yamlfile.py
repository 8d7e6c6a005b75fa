import math
import os
import re

import pytest

from qcompress.recipe.yaml_file import (
    BYTES_LIMIT,
    Document,
    Place,
    dotted,
    dump_yaml,
    parse_value,
    parse_yaml,
    read_yaml,
    split_key,
)


def only(document: Document) -> str:
    """The single mistake of a document, as a user reads it."""
    assert len(document.mistakes) == 1, document.mistakes
    return str(document.mistakes[0])


SCALARS = {
    "2e-5": 2e-5,
    "1.0e-3": 1e-3,
    "1E3": 1000.0,
    ".5": 0.5,
    "+1.": 1.0,
    "-3": -3,
    "010": 10,
    "0x1F": 31,
    "0o17": 15,
    "true": True,
    "False": False,
    "~": None,
    "": None,
    "null": None,
    "off": "off",
    "on": "on",
    "yes": "yes",
    "no": "no",
    "y": "y",
    "2024-01-01": "2024-01-01",
    "2001-12-14t21:59:43.10-05:00": "2001-12-14t21:59:43.10-05:00",
    "1_000": "1_000",
    "1:30": "1:30",
    "=": "=",
    "e5": "e5",
    "1e": "1e",
    "0b11": "0b11",
    '"5"': "5",
    "!!str 5": "5",
    "!!int 5": 5,
    "!!float 5": 5.0,
    ".inf": math.inf,
    "-.INF": -math.inf,
}


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_is_what_yaml_1_2_says(text: str) -> None:
    document = parse_yaml(f"a: {text}\n", "f")
    assert document.mistakes == []
    assert document.value == {"a": SCALARS[text]}
    assert type(document.value["a"]) is type(SCALARS[text])


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml("a: .NaN", "f").value["a"])


def test_every_value_has_the_line_it_stands_on() -> None:
    document = parse_yaml("# a recipe\na: 1\nb:\n  c: [x,\n      y]\n  'd.e': {f: 2}\n", "f.yaml")
    assert document.value == {"a": 1, "b": {"c": ["x", "y"], "d.e": {"f": 2}}}
    assert {key: place.line for key, place in document.places.items()} == {
        (): 1,
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "c", 0): 4,
        ("b", "c", 1): 5,
        ("b", "d.e"): 6,
        ("b", "d.e", "f"): 6,
    }
    assert {place.file for place in document.places.values()} == {"f.yaml"}


def test_a_missing_key_is_placed_at_the_section_it_is_missing_from() -> None:
    document = parse_yaml("a: 1\nb:\n  c: 2\n", "f")
    assert document.place(("b", "x", "y")) == Place("f", 2)
    assert document.place(("z",)) == Place("f", 1)


BAD_TEXTS = {
    "a: 1\nb: 2\na: 3\n": r"f:3: a: is written twice, first in line 1 \(fix: keep one of the two\)",
    "a: 1\na: 2\na: 3\n": r"f:2: a: is written twice",
    "a:\n  b: {c: 1, c: 2}\n": r"f:2: a\.b\.c: is written twice, first in line 2",
    "a: 1\n2: x\n": r'f:2: 2: a key must be text \(fix: put it in quotes: "2"\)',
    "a: {true: x}\n": r"f:1: a\.true: a key must be text",
    "~: x\n": r"f:1: ~: a key must be text",
    "? [a, b]\n: x\n": r"f:1: \?: a key must be text",
    "<<: x\n": r"f:1: <<: merge keys are not part of YAML 1\.2 \(fix: use `extends: other\.yaml`\)",
    "a: !!python/object/apply:os.system [ls]\n": r"f:1: a: has the tag !!python/object/apply:os\.system",
    "a: !mine 3\n": r"f:1: a: has the tag !mine, found '3'",
    "a: !!timestamp 2024-01-01\n": r"f:1: a: has the tag !!timestamp",
    "a: !!int x\n": r"f:1: a: has the tag !!int, found 'x'",
    "a: !!set {b}\n": r"f:1: a: has the tag !!set",
    "a: [1,\nb: 2\n": r"f:3: file: column 1: .* that begins in line 1 \(fix: check the indentation",
    "a: 1\n b: 2\n": r"f:2: file: column 3: mapping values are not allowed here",
    "a:\n\tb: 1\n": r"f:2: file: column 1: .*\(fix: indent with spaces, not tabs\)",
    "layers: {*.lm_head: float}\n": r"f:1: file: column 11: .*\(fix: put quotes around text that begins",
    "a: *lm_head\n": r"f:1: file: column 4: found undefined alias 'lm_head' \(fix: put quotes",
    "a: @x\n": r"f:1: file: column 4: .*\(fix: put quotes",
    "a: 1\n---\nb: 2\n": r"f:2: file: column 1: .*another document.*\(fix: write one recipe a file",
    "a: 'x\n": r"f:2: file: column 1: found unexpected end of stream, while scanning a quoted scalar",
    "a: &x [*x]\n": r"f:1: file: column 4: more than 20000 values or 32 levels",
    "[" * 5000: r"f:1: file: column 33: more than 20000 values or 32 levels.*\(fix: write a shorter file",
    "- " * 5000: r"f:1: file: column 65: more than 20000 values or 32 levels",
    "a: " + "9" * 5000: r"f:1: a: is a number of 5000 digits",
    'a: "\\U00110000"\n': r"f:1: file: holds an escape or a version that is not a number",
    'a: "\\Uffffffff"\n': r"f:1: file: holds an escape or a version that is not a number",
    "%YAML 1."
    + "9" * 5000
    + "\n---\na: 1\n": r"f:1: file: holds an escape or a version that is not a number",
    "%YAML 3.0\n---\na: 1\n": r"f:1: file: column 1: found incompatible YAML document",
    'b: 1\na: "x\\0"\n': r"f:2: a: holds a NUL character",
    'a: "\\ud800"\n': r"f:1: a: holds a NUL character or half a character",
    '"a\\0": 1\n': r"f:1: .*: a key must be text \(fix: write printable text|f:1: .*a key must be text",
    "b: 1\na: \x07\n": r"f:2: file: holds the character 0x07 \(fix: remove the control character\)",
    "": r"f:1: file: is empty \(fix: write a recipe",
    "# nothing\n": r"f:1: file: is empty",
    "~\n": r"f:1: file: is empty",
    "- a\n": r"f:1: file: is not a mapping of keys",
    "word\n": r"f:1: file: is not a mapping of keys",
}


@pytest.mark.parametrize("text", BAD_TEXTS, ids=[text[:24].strip() or "empty" for text in BAD_TEXTS])
def test_each_mistake_is_one_with_its_line_and_a_fix(text: str) -> None:
    document = parse_yaml(text, "f")
    assert re.search(BAD_TEXTS[text], only(document)), only(document)
    assert document.mistakes[0].fix


def test_the_other_keys_of_a_text_with_mistakes_are_still_read() -> None:
    document = parse_yaml("a: 1\nb: !x 2\nc: {d: 1, d: 2, e: 3}\n4: x\n", "f")
    assert [mistake.line for mistake in document.mistakes] == [2, 3, 4]
    assert document.value == {"a": 1, "b": None, "c": {"d": None, "e": 3}}
    assert document.tainted == {("b",), ("c", "d"), ("4",)}


def test_aliases_are_read_and_a_bomb_of_them_is_refused() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\n", "f").value == {"a": [1, 2], "b": [1, 2]}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    assert "more than 20000 values" in only(parse_yaml("\n".join(lines), "f"))


def test_what_is_wrong_taints_what_is_above_and_below_it_and_nothing_beside_it() -> None:
    document = parse_yaml("a: {b: {c: 1}, d: 2}\n", "f")
    document.report(("a", "b"), "is wrong", "mend it")
    assert not document.sound(("a",)) and not document.sound(("a", "b", "c"))
    assert document.sound(("a", "d")) and not document.sound(("a", "d"), ("a", "b"))
    assert document.present(("a",)) and not document.present(("a", "b", "c"))
    document.report((), "is wrong", "mend it")
    assert not document.sound(("a", "d")) and document.present(("a", "d"))


KEYS = {
    "a.b": ("a", "b"),
    'format.layers."h.0.*".bits': ("format", "layers", "h.0.*", "bits"),
    "build.profiles[0].batch[2]": ("build", "profiles", 0, "batch", 2),
    'a."say \\"b\\""': ("a", 'say "b"'),
    "max-degradation": ("max-degradation",),
    'a.""': ("a", ""),
    "layers.*": ("layers", "*"),
}


@pytest.mark.parametrize("text", KEYS)
def test_a_key_is_shown_as_it_is_typed(text: str) -> None:
    assert dotted(KEYS[text]) == text
    assert split_key(text) == (KEYS[text], "")
    assert split_key(text + "=1=2") == (KEYS[text], "=1=2")


@pytest.mark.parametrize("text", ["", "=1", ".a=1", "[0]=1", '"a=1', '"\\x"=1', " a=1"])
def test_a_text_that_begins_with_no_key_is_none(text: str) -> None:
    assert split_key(text) is None


def test_a_value_is_placed_at_its_key_without_a_line() -> None:
    document = parse_value("{x: [1, 2e-5]}", ("a", "b"), "--set")
    assert document.value == {"a": {"b": {"x": [1, 2e-5]}}}
    assert set(document.places.values()) == {Place("--set", 0)}
    assert len(document.places) == 6
    assert parse_value("", ("a",), "--set").value == {"a": None}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1", r"^--set: a\.b: column 3: "),
        ("{c: 1, c: 2}", r"^--set: a\.b\.c: is written twice"),
        ("!x 3", r"^--set: a\.b: has the tag !x"),
        ("\x01", r"^--set: a\.b: holds the character 0x01"),
    ],
)
def test_a_mistake_in_a_value_names_its_key(text: str, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(only(parse_value(text, ("a", "b"), "--set")))


def test_a_text_survives_dumping() -> None:
    words = [text.strip('"') for text in SCALARS] + [
        "a: b",
        "# x",
        "*.lm_head",
        "x\ny",
        "é",
        " a ",
        "'",
        "<<",
    ]
    value = {"words": words, "numbers": [2e-5, 1e-3, 1e22, -0.1, 7, True, None], "*.h": {"2e5": {}, "l": []}}
    document = parse_yaml(dump_yaml(value), "f")
    assert document.mistakes == []
    assert document.value == value and len(words) > 30


# Files --------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_one_mistake(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1\n")
    missing = only(read_yaml(tmp_path / "recpie.yaml", "recpie.yaml"))
    assert missing == "recpie.yaml: file: does not exist (fix: did you mean recipe.yaml?)"
    assert "does not exist" in only(read_yaml(tmp_path / "no" / "x.yaml", "x"))
    assert "does not exist" in only(read_yaml(tmp_path / ("x" * 5000), "x"))
    assert "is a directory" in only(read_yaml(tmp_path, "here"))
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in only(read_yaml(tmp_path / "pipe", "pipe"))
    (tmp_path / "long.yaml").write_text("a: 1\n" + "#" * BYTES_LIMIT)
    assert "is larger than 262144 bytes" in only(read_yaml(tmp_path / "long.yaml", "long"))
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    assert "latin:2: file: is not UTF-8: found byte 0xe9" in only(read_yaml(tmp_path / "latin.yaml", "latin"))
    (tmp_path / "utf16.yaml").write_bytes("a: 1\n".encode("utf-16"))
    assert "is not UTF-8: found byte 0xff" in only(read_yaml(tmp_path / "utf16.yaml", "utf16"))


def test_a_file_without_permission_is_one_mistake(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.yaml").write_text("a: 1\n")
    monkeypatch.setattr("builtins.open", refuse)
    assert "cannot be read (Permission denied)" in only(read_yaml(tmp_path / "a.yaml", "a"))


def test_a_byte_order_mark_and_windows_lines_are_no_mistake(tmp_path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    document = read_yaml(tmp_path / "a.yaml", "a")
    assert document.value == {"a": 1, "b": 2} and document.places[("b",)].line == 2
