"""Samples that choose and samples that judge."""

from __future__ import annotations

import pytest

from qcompress.pipeline.sensitivity.sampling import Sampling


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_no_sample_chooses_and_judges(seed: int | None) -> None:
    choosing, judging = Sampling(30, 50, seed).parts(list(range(100)))
    assert (len(choosing), len(judging)) == (30, 50)
    assert len({*choosing, *judging}) == 80


def test_a_seed_draws_from_all_of_the_data_and_the_same_ones_again() -> None:
    drawn = [Sampling(30, 50, seed).parts(list(range(1000))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert max(drawn[0][0]) > 500
    assert Sampling(30, 50).limit == 80 and Sampling(30, 50, 0).limit is None


def test_how_many_judge_does_not_change_which_choose() -> None:
    few, many = (Sampling(10, judging, 4).parts(list(range(100))) for judging in (5, 60))
    assert few[0] == many[0] and few[1] == many[1][:5]


def test_of_too_few_samples_those_that_choose_come_first() -> None:
    assert [len(part) for part in Sampling(6, 6, 0).parts(list(range(8)))] == [6, 2]
    assert [len(part) for part in Sampling(6, 6, 0).parts(list(range(4)))] == [4, 0]
