"""The distance of two rows, against the formulas written out in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qcompress.parity.distance import Distance, decibels

FIELDS = {"to", "max_abs", "mean_abs", "range", "cosine", "snr_db", "top1_agreement", "positions"}


def logits(positions: int = 40, vocabulary: int = 300, seed: int = 0, noise: float = 0.05):
    """A reference and a row that is near it, fp32 [positions, vocabulary], and not centred on zero."""
    rng = np.random.default_rng(seed)
    reference = (rng.normal(size=(positions, vocabulary)) * 4 + 1).astype(np.float32)
    return reference, reference + (rng.normal(size=reference.shape) * noise).astype(np.float32)


def measured(*pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, object]:
    distance = Distance(to="folded")
    for reference, row in pairs:
        distance.add(reference, row)
    return distance.to_json()


def by_hand(reference: np.ndarray, row: np.ndarray) -> dict[str, object]:
    a, b = reference.astype(np.float64), row.astype(np.float64)
    return {
        "to": "folded",
        "max_abs": np.max(np.abs(b - a)),
        "mean_abs": np.mean(np.abs(b - a)),
        "range": a.max() - a.min(),
        "cosine": np.dot(a.ravel(), b.ravel()) / (np.linalg.norm(a) * np.linalg.norm(b)),
        "snr_db": 10 * np.log10(np.sum(a * a) / np.sum((b - a) ** 2)),
        "top1_agreement": np.mean(np.argmax(a, 1) == np.argmax(b, 1)),
        "positions": len(a),
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [1e-3, 0.05, 3.0])
def test_every_field_equals_its_formula_in_float64(seed: int, noise: float) -> None:
    reference, row = logits(seed=seed, noise=noise)
    found, expected = measured((reference, row)), by_hand(reference, row)
    assert found.keys() == expected.keys() == FIELDS
    assert found.pop("to") == expected.pop("to")
    for name, value in expected.items():
        # differences of fp32 numbers are rounded to fp32 before they are summed
        assert found[name] == pytest.approx(value, rel=2e-6), name
    if noise == 3.0:
        assert 0.2 < found["top1_agreement"] < 0.9  # or agreement would be no test


def test_a_worked_example() -> None:
    reference = np.array([[1.0, 3.0], [-2.0, 0.0]], np.float32)
    row = np.array([[1.0, 4.0], [-2.0, -3.0]], np.float32)
    found = measured((reference, row))
    assert found["max_abs"] == 3.0 and found["mean_abs"] == 1.0 and found["range"] == 5.0
    assert found["top1_agreement"] == 0.5 and found["positions"] == 2
    assert found["cosine"] == pytest.approx(17 / math.sqrt(14 * 30))
    assert found["snr_db"] == pytest.approx(10 * math.log10(14 / 10))


def test_the_range_is_that_of_the_reference() -> None:
    reference, row = logits()
    row[3, 7] = 1000.0
    assert measured((reference, row))["range"] == pytest.approx(float(np.ptp(reference)))


def test_equal_rows_are_at_no_distance_and_the_report_is_strict_json() -> None:
    reference, _ = logits()
    found = measured((reference, reference.copy()))
    assert found["max_abs"] == 0.0 and found["mean_abs"] == 0.0
    assert found["cosine"] == pytest.approx(1.0) and found["top1_agreement"] == 1.0
    assert found["snr_db"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_many_pieces_are_one_piece() -> None:
    reference, row = logits()
    edges = [0, 1, 2, 17, 39, 40]
    pieces = [(reference[a:b], row[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    assert len(pieces) == 5
    one, many = measured((reference, row)), measured(*pieces)
    for name in FIELDS - {"to"}:
        assert many[name] == pytest.approx(one[name], rel=1e-12), name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_one_logit_that_is_not_a_number_spoils_the_whole_distance(value: float, side: int) -> None:
    good, broken = logits(), logits(seed=1)
    broken[side][5, 6] = value
    for pairs in ((broken, good), (good, broken)):
        found = measured(*pairs)
        numbers = FIELDS - {"to", "positions"}
        assert all(math.isnan(found[name]) for name in numbers) and len(numbers) == 6


def test_a_distance_over_nothing_is_not_a_number() -> None:
    found = measured()
    assert found["positions"] == 0 and math.isnan(found["max_abs"]) and math.isnan(found["top1_agreement"])


def test_a_reference_of_zeros_has_no_range_and_no_signal() -> None:
    zeros = np.zeros((3, 5), np.float32)
    same, other = measured((zeros, zeros)), measured((zeros, zeros + 1))
    assert same["range"] == 0.0 and math.isnan(same["cosine"])
    assert math.isnan(other["cosine"]) and math.isnan(other["snr_db"])


def test_decibels() -> None:
    assert decibels(100.0, 1.0) == 20.0 and decibels(1.0, 0.0) is None and math.isnan(decibels(0.0, 1.0))


def test_one_logit_is_always_the_best_and_has_no_agreement() -> None:
    distance = Distance(to="float")
    distance.add(np.array([[1.0], [2.0]], np.float32), np.array([[1.5], [0.0]], np.float32))
    found = distance.to_json()
    assert found["top1_agreement"] is None and found["positions"] == 2
    assert found["max_abs"] == 2.0 and found["range"] == 1.0
