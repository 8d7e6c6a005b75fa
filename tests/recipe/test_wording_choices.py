"""The fix for a value of a closed set: every word that it begins, else the nearest one."""

from __future__ import annotations

import pytest

from qcompress.recipe.messages import choose
from qcompress.schema.formats import FORMAT_PRESETS


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("w4a16", ["w4a16-g32", "w4a16-g64", "w4a16-g128"]),
        ("W4A16-g", ["w4a16-g32", "w4a16-g64", "w4a16-g128"]),
        ("w8", ["w8a8", "w8a16"]),
        ("tern", ["ternary-a8"]),
        ("W8A8", ["w8a8"]),
        ("w8a9", ["w8a8"]),
        ("w4a16-g127", ["w4a16-g128"]),
    ],
)
def test_a_word_that_begins_others_is_answered_with_all_of_them(written: str, meant: list[str]) -> None:
    fix = choose(written, list(FORMAT_PRESETS))
    assert fix == f"did you mean {' or '.join(f'`{word}`' for word in meant)}?"


def test_what_resembles_nothing_is_answered_with_an_example() -> None:
    for written in ("xyz", "", "w", 4, None):
        assert choose(written, list(FORMAT_PRESETS)) == "write one of these, such as float"
