"""Number formats: what they hold, what they are called, and what they refuse."""

from __future__ import annotations

import itertools
import math
import re
from typing import get_args

import pytest
from pydantic import ValidationError

from qcompress.schema.formats import ACTIVATION_WORDS, FORMAT_PRESETS, WEIGHT_WORDS, WeightFormat, as_mapping
from qcompress.schema.recipe import Format

CHOICES = {
    "bits": [8, 4, 3, 2],
    "ternary": [False, True],
    "granularity": ["channel", "tensor"],
    "block": [None, 32, 64, 128],
    "container": [None, "int8", "int4", "int2"],
}
"""Everything that a weight format can be asked for."""


def accepted() -> list[WeightFormat]:
    valid = []
    for values in itertools.product(*CHOICES.values()):
        try:
            valid.append(WeightFormat(**dict(zip(CHOICES, values, strict=True))))
        except ValidationError:
            continue
    return valid


def test_the_choices_of_this_file_are_all_that_there_are() -> None:
    assert set(CHOICES) == set(WeightFormat.model_fields)
    for name, values in CHOICES.items():
        annotation = WeightFormat.model_fields[name].annotation
        kinds = get_args(annotation)
        if annotation is not bool:
            literals = [value for kind in kinds for value in (get_args(kind) or (kind,))]
            assert {value for value in literals if value is not type(None)} <= set(values), name


def test_the_codes_of_every_format_fit_into_what_stores_them() -> None:
    formats = accepted()
    # 8 bits: 2 containers, each with 4 kinds of block or one scale; others: no blocks in an int8 container
    assert len(formats) == 2 * 5 + 2 * (2 * 5 + 2) + 2 * (3 * 5 + 2)
    for form in formats:
        low, high = form.bounds
        assert low < 0 < high <= -low
        assert -(2 ** (form.stored_bits - 1)) <= low and high < 2 ** (form.stored_bits - 1)
        assert high - low + 1 == (3 if form.ternary else 2**form.bits)
        assert form.information_bits == pytest.approx(math.log2(high - low + 1))
        assert form.information_bits <= form.bits <= form.stored_bits
        assert form.stored_bits == int((form.container or ("int8" if form.bits == 8 else "int4"))[-1])


def test_two_bits_are_the_codes_from_minus_2_to_1_and_ternary_ones_are_three() -> None:
    assert WEIGHT_WORDS["int2"].bounds == (-2, 1) and WEIGHT_WORDS["int3"].bounds == (-4, 3)
    assert WEIGHT_WORDS["ternary"].bounds == (-1, 1)


def test_no_two_formats_have_one_name() -> None:
    """A message that tells two formats apart has only their names for it. A container that changes nothing
    is not named.
    """
    formats = accepted()
    meanings = {(form.bounds, form.granularity, form.block, form.stored_bits) for form in formats}
    assert len({str(form) for form in formats}) == len(meanings)
    assert str(WeightFormat(bits=2, ternary=True, granularity="tensor", container="int8")) == (
        "ternary in int8 per tensor"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "container": "int4"}, "8-bit codes do not fit"),
        ({"bits": 3, "container": "int2"}, "3-bit codes do not fit into an int2 container"),
        ({"bits": 2, "block": 32, "container": "int8"}, "an int8 GEMM has no blocks"),
        ({"bits": 4, "ternary": True}, "write `bits: 2`"),
        ({"bits": 2, "block": 32, "granularity": "tensor"}, "leaves no blocks"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WeightFormat(**options)


@pytest.mark.parametrize("preset", FORMAT_PRESETS)
def test_a_preset_is_what_its_name_says(preset: str) -> None:
    form = Format.model_validate(preset)
    if preset == "float":
        assert form.is_float
        return
    if preset == "ipq":
        assert str(form.weights) == str(form.embeddings) == "codebook 256x8"
        assert form.activations is None
        return
    weights, activations, block = re.fullmatch(r"(ternary-|w\d)a(\d+)(?:-g(\d+))?", preset).groups()
    assert str(form.weights).startswith(f"int{weights[1]}" if weights[0] == "w" else "ternary")
    assert (form.activations is None) is (activations == "16")
    assert form.weights.block == (int(block) if block else None)
    assert form.embeddings is not None
    # int8 activations want an int8 GEMM, which int4 codes do not become
    assert form.activations is None or form.weights.stored_bits == 8


def test_every_word_is_a_format_of_its_own() -> None:
    assert list(WEIGHT_WORDS) == ["float", "int8", "int4", "int3", "int2", "ternary", "codebook"]
    for key, words in (("weights", WEIGHT_WORDS), ("activations", ACTIVATION_WORDS)):
        for word, form in words.items():
            assert as_mapping(key, word) == (word if form is None else form.model_dump())
            assert getattr(Format.model_validate({key: word}), key) == form
