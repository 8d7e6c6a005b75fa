"""The choice of formats, against every choice there is."""

from __future__ import annotations

import itertools
import random

import pytest

from qcompress.errors import UsageError
from qcompress.pipeline.sensitivity.mixture import Choice, choose


def instance(seed: int) -> dict[str, dict[str, Choice]]:
    draw = random.Random(seed)
    return {
        f"layer{index}": {
            form: Choice(draw.choice([draw.random(), 0.5]), draw.randrange(1, 40) * 64) for form in "abc"
        }
        for index in range(5)
    }


def all_choices(layers: dict[str, dict[str, Choice]]) -> list[tuple[float, int, dict[str, str]]]:
    found = []
    for forms in itertools.product(*layers.values()):
        taken = dict(zip(layers, forms, strict=True))
        picked = [layers[name][form] for name, form in taken.items()]
        found.append((sum(one.cost for one in picked), sum(one.bytes for one in picked), taken))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all_choices_within_the_budget(seed: int) -> None:
    layers = instance(seed)
    every = all_choices(layers)
    draw = random.Random(seed + 1000)
    max_bytes = draw.choice(every)[1]  # a budget that a choice meets exactly
    chosen = choose(layers, max_bytes=max_bytes)
    cost, size = totals(layers, chosen)
    assert size <= max_bytes
    assert cost == pytest.approx(min(one[0] for one in every if one[1] <= max_bytes), abs=1e-4)

    max_cost = draw.choice(every)[0] + 1e-9
    chosen = choose(layers, max_cost=max_cost)
    cost, size = totals(layers, chosen)
    assert cost <= max_cost + 1e-9
    assert size == min(one[1] for one in every if one[0] <= max_cost)


def totals(layers: dict[str, dict[str, Choice]], chosen: dict[str, str]) -> tuple[float, int]:
    assert chosen.keys() == layers.keys()
    picked = [layers[name][form] for name, form in chosen.items()]
    return sum(one.cost for one in picked), sum(one.bytes for one in picked)


def test_of_choices_that_cost_the_same_the_smaller_one_is_taken() -> None:
    layers = {"a": {"big": Choice(1.0, 800), "small": Choice(1.0, 100)}}
    assert choose(layers, max_bytes=1000) == {"a": "small"}
    layers = {"a": {"bad": Choice(2.0, 100), "good": Choice(1.0, 100)}}
    assert choose(layers, max_cost=5.0) == {"a": "good"}


def test_a_budget_that_is_met_to_the_byte_is_met_and_one_byte_less_is_not() -> None:
    """Sizes as of large layers, where a solver's tolerance would be more than a byte."""
    layers = {name: {"uniform": Choice(0.1, 512 * 1_000_003), "float": Choice(0.0, 4 * 512 * 1_000_003)}
              for name in "abc"}  # fmt: skip
    least = 3 * 512 * 1_000_003
    assert choose(layers, max_bytes=least) == dict.fromkeys("abc", "uniform")
    with pytest.raises(UsageError, match=r"the least that these formats make possible is .* bytes"):
        choose(layers, max_bytes=least - 1)
    layers["c"]["odd"] = Choice(0.0, 512 * 1_000_003 + 1)
    assert choose(layers, max_bytes=least)["c"] == "uniform"
    assert choose(layers, max_bytes=least + 1)["c"] == "odd"


def test_a_cost_below_that_of_the_best_formats_is_refused() -> None:
    layers = {"a": {"int8": Choice(0.5, 10)}, "b": {"int8": Choice(0.25, 10)}}
    with pytest.raises(UsageError, match="the least that these formats make possible is 0.75 of divergence"):
        choose(layers, max_cost=0.7)
    with pytest.raises(UsageError, match="a mixture has one budget"):
        choose(layers)
