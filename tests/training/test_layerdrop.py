"""LayerDrop: what it leaves out, when, and that nothing of it is left afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from qcompress.models import describe, gpt2
from qcompress.training.layerdrop import chunks_of, layer_drop

BLOCKS = 4


@pytest.fixture(scope="module")
def source(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of four blocks. Read only."""
    return tiny.make_checkpoint(tmp_path_factory.mktemp("deep"), text_file, blocks=BLOCKS)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**gpt2.graph_inputs(tiny.token_ids())).logits


def without_dropout(source: Path) -> GPT2LMHeadModel:
    model = gpt2.load_float(source)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def left_out(model: nn.Module, draw: Callable[..., None], *where: int) -> set[int]:
    """Blocks that a pass leaves out, found by what each of them is given and gives."""
    seen: dict[int, bool] = {}
    handles = [
        block.register_forward_hook(
            lambda module, arguments, output, number=number: seen.update({number: output is arguments[0]})
        )
        for number, block in enumerate(model.transformer.h)
    ]
    draw(*where)
    logits(model)
    for handle in handles:
        handle.remove()
    return {number for number, same in seen.items() if same}


def test_a_pass_is_that_of_the_stock_model_without_the_blocks(source: Path) -> None:
    architecture, model = describe("gpt2", source), without_dropout(source).train()
    expected, found = {}, set()
    with layer_drop(model, architecture, 0.5) as draw:
        for step in range(12):
            gone = left_out(model, draw, 0, 0, step)
            if frozenset(gone) not in expected:
                stock = GPT2LMHeadModel.from_pretrained(source, attn_implementation="eager").eval()
                kept = [block for number, block in enumerate(stock.transformer.h) if number not in gone]
                stock.transformer.h = nn.ModuleList(kept)
                stock.config.use_cache = False
                expected[frozenset(gone)] = logits(stock)
            assert torch.equal(logits(model), expected[frozenset(gone)])
            found.add(frozenset(gone))
    assert len(found) > 4


def test_the_share_of_blocks_left_out(source: Path) -> None:
    architecture, model = describe("gpt2", source), without_dropout(source).train()
    counts = torch.zeros(BLOCKS)
    with layer_drop(model, architecture, 0.2) as draw:
        for step in range(2000):
            draw(7, 1, step)
            # the set that a block's forward looks at
            gone = model.transformer.h[0].forward.__closure__
            names = next(cell.cell_contents for cell in gone if isinstance(cell.cell_contents, set))
            counts += torch.tensor([f"transformer.h.{number}" in names for number in range(BLOCKS)])
    spread = 3 * (0.2 * 0.8 / 2000) ** 0.5
    assert ((counts / 2000 - 0.2).abs() < spread).all()


def test_one_block_always_stays(source: Path) -> None:
    architecture, model = describe("gpt2", source), without_dropout(source).train()
    with layer_drop(model, architecture, 0.97) as draw:
        gone = [left_out(model, draw, 0, 0, step) for step in range(40)]
    assert max(len(one) for one in gone) == BLOCKS - 1
    assert len({frozenset(one) for one in gone}) == BLOCKS  # and not always the same one


def test_draws_repeat_and_differ(source: Path) -> None:
    architecture, model = describe("gpt2", source), without_dropout(source).train()
    with layer_drop(model, architecture, 0.5) as draw:
        first = [left_out(model, draw, 0, 0, step) for step in range(16)]
        torch.manual_seed(99)  # the draws are no business of torch's generator
        assert [left_out(model, draw, 0, 0, step) for step in range(16)] == first
        assert [left_out(model, draw, 1, 0, step) for step in range(16)] != first
        assert [left_out(model, draw, 0, 1, step) for step in range(16)] != first


def test_evaluation_uses_every_block_and_nothing_is_left_afterwards(source: Path) -> None:
    architecture, model = describe("gpt2", source), without_dropout(source)
    whole = logits(model)
    with pytest.raises(RuntimeError, match="stop"), layer_drop(model, architecture, 0.99) as draw:
        draw(0)
        assert torch.equal(logits(model), whole)
        assert not torch.equal(logits(model.train()), whole)
        raise RuntimeError("stop")
    assert torch.equal(logits(model), whole)
    with layer_drop(model, architecture, 0.0) as draw:
        draw(0)
        assert all("forward" not in vars(block) for block in model.transformer.h)


def test_blocks_that_share_their_weights_go_together(source: Path) -> None:
    architecture = describe("gpt2", source, blocks=[0, 1, 0, 3])
    h = "transformer.h."
    assert chunks_of(architecture) == [(f"{h}0", f"{h}2"), (f"{h}1",), (f"{h}3",)]
    assert chunks_of(describe("gpt2", source)) == [(f"{h}{number}",) for number in range(BLOCKS)]


def test_each_update_of_a_training_has_a_draw_of_its_own(
    line: Callable[..., Any], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, ...]] = []

    @contextmanager
    def watched(*arguments: Any) -> Iterator[Callable[..., None]]:
        with layer_drop(*arguments) as draw:
            yield lambda *where: (drawn.append(where), draw(*where))

    monkeypatch.setattr("qcompress.training.loop.layer_drop", watched)
    line(name="drawn", steps=4, source=source, method="lsq", train={"layer_drop": 0.5}).train()
    assert len(drawn) == len(set(drawn)) == 4


@pytest.mark.parametrize("stepper", ["plain", "saq"])
def test_training_with_it_is_repeatable_and_is_not_training_without(
    stepper: str, line: Callable[..., Any], source: Path
) -> None:
    def trained(p: float, name: str) -> dict[str, Tensor]:
        sections = {"method": "lsq", "stepper": stepper, "train": {"layer_drop": p}}
        made = line(name=name, steps=4, source=source, **sections).train()
        return load_file(made.trained.path / "trained.safetensors")

    first, again, plain = trained(0.5, "first"), trained(0.5, "again"), trained(0.0, "plain")
    assert first.keys() == plain.keys() and all(torch.equal(first[name], again[name]) for name in first)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert not torch.equal(first[name], plain[name])


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_after_an_error_every_block_has_its_forward_again(source: Path, wrapped: bool) -> None:
    """That of its class, or the one that the caller has put before it."""
    architecture, model = describe("gpt2", source), without_dropout(source).train()
    first, *others = model.transformer.h
    own = first.forward
    if wrapped:
        first.forward = wrapper = lambda *arguments, **keywords: own(*arguments, **keywords)
    with pytest.raises(ZeroDivisionError), layer_drop(model, architecture, 0.5) as draw:
        draw(0)
        logits(model)
        assert all("forward" in vars(block) for block in (first, *others))
        raise ZeroDivisionError
    assert not any("forward" in vars(block) for block in others)
    assert vars(first).get("forward") is (wrapper if wrapped else None)
    assert all(block.forward.__func__ is type(block).forward for block in others)
