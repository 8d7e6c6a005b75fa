"""What a key-value cache saves: one token after 512, against running all of the prefix again.

GPT-2's width (768, 12 heads) with 4 blocks and random weights, W8A8, the cache in float and in int8; ONNX
Runtime with one thread, one sequence. Interleaved; the least of all rounds counts, in CPU time.

    pytest -m benchmark -s -n 0 tests/benchmarks/test_decode_speed.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import VOCABULARY, make_recipe, make_tokenizer, start_line
from transformers import GPT2Config, GPT2LMHeadModel, logging

from qcompress.parity.generate import Generator
from qcompress.pipeline.keys import provenance
from qcompress.pipeline.stages.export import export
from qcompress.schema.recipe import Export

PAST, MORE, ROUNDS, LIMIT = 512, 16, 5, 5


def generator(folder: Path, source: Path, text: Path, cache: str | None) -> Generator:
    form = {"preset": "w8a8"} | ({"cache": cache} if cache else {})
    line = start_line(folder, source, text, make_recipe(text, format=form, method="ptq")).train().fold()
    (folder / "export").mkdir()
    export(line.folded, Export(cache=cache is not None), "cpu", provenance(line.recipe), folder / "export")
    return Generator(folder / "export" / "model.onnx", "gpt2", 1)


@pytest.mark.benchmark
def test_a_token_from_the_cache_costs_a_fifth_of_the_prefix(tmp_path: Path, text_file: Path) -> None:
    logging.disable_progress_bar()
    source = tmp_path / "model"
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=768, n_head=12, n_layer=4, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(source)
    make_tokenizer(source, text_file.read_text(encoding="utf-8"))
    prompt = np.random.default_rng(0).integers(0, 300, (1, PAST))
    ways: dict[str, Callable[[int], object]] = {}
    for name, cache in (("prefix again", None), ("float cache", "float"), ("int8 cache", "int8")):
        made = generator(tmp_path / name, source, text_file, cache)
        ways[name] = lambda tokens, made=made: made(prompt.tolist(), tokens)
    least = {(name, tokens): float("inf") for name in ways for tokens in (1, 1 + MORE)}
    for _ in range(ROUNDS):
        for name, tokens in least:
            began = time.process_time()
            ways[name](tokens)
            least[name, tokens] = min(least[name, tokens], time.process_time() - began)
    best = {name: (least[name, 1 + MORE] - least[name, 1]) / MORE for name in ways}
    for name, seconds in best.items():
        print(f"{name}: {1e3 * seconds:.1f} ms a token, {best['prefix again'] / seconds:.1f} x")
    assert all(best["prefix again"] > LIMIT * best[name] for name in ("float cache", "int8 cache"))
