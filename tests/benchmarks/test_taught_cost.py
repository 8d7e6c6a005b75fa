"""What a taught update costs, the teacher's pass included, against an update of stock transformers in float.

Shape: MiniLM's (6 blocks, 384 wide, 1536 inside, 12 heads), 32 sequences of 64 tokens, AdamW. The float side
is transformers' BERT with its fused attention and a loss on labels. The taught student is TernaryBERT's:
ternary weights, dynamic 8-bit activations, of attention operands too, four losses. One interleaved run; the
least of all rounds counts, in CPU time of one thread, so that what other processes take is not counted.

    pytest -m benchmark -s -n 0 tests/benchmarks/test_taught_cost.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import make_recipe
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, logging

from qcompress.models import FAMILIES, describe
from qcompress.models.architecture import Head
from qcompress.models.plan import plan_layers, plan_points
from qcompress.models.prepare import open_points, quantize
from qcompress.schema.method_options import TeacherIntervention
from qcompress.training.methods.protocols import Scene
from qcompress.training.methods.teacher_intervention import INTERVENTION, Intervention

ROUNDS = 20
LIMIT = 1.6
"""The aim is 1.3."""

MODES = {"by itself": None, "TI-O": "output", "TI-C": "context", "TI-M": "attention"}
TERNARY_BERT = {
    "preset": "ternary-a8",
    "layers": {"*.position_embeddings": "float", "*.token_type_embeddings": "float", "classifier": "float"},
}


def checkpoint(folder: Path) -> Path:
    logging.disable_progress_bar()
    config = BertConfig(vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                        intermediate_size=1536, max_position_embeddings=64)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def update(model: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[], None]:
    """One update on a batch that was not seen before."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, 1000, (32, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}

    def step() -> None:
        loss(dict(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def taught(folder: Path, text: Path, mode: str | None, attention: str) -> Callable[[], None]:
    recipe = make_recipe(
        text, model={"family": "bert", "source": "unused"}, method="teacher-intervention",
        task={"name": "sequence-classification", "context": 64},
        format={**TERNARY_BERT, "attention": attention},
    )  # fmt: skip
    architecture = describe("bert", folder, Head("sequence-classification"))
    points = plan_points(recipe, architecture)
    model, teacher = (FAMILIES["bert"].load_float(folder) for _ in range(2))
    open_points(model, "bert", points)
    model = quantize(model, "bert", plan_layers(recipe, architecture), points).model.train()
    objective = Intervention(TeacherIntervention(mode=mode or "gradual"), lambda logits, batch: logits.sum())
    objective.attach(model, Scene(model, architecture, lambda: teacher.eval()))
    objective.begin(INTERVENTION if mode else "finetune")
    return update(model, lambda batch: objective.loss(batch, 0.5))


@pytest.mark.benchmark
def test_a_taught_update_costs_little_more_than_a_float_update_and_the_teachers_pass(
    tmp_path: Path, text_file: Path
) -> None:
    folder = checkpoint(tmp_path)
    stock = BertForSequenceClassification.from_pretrained(folder, attn_implementation="sdpa").train()
    steps = {"float": update(stock, lambda batch: stock(**batch).loss)}
    for attention in ("int8", "float"):
        modes = MODES if attention == "int8" else {"by itself": None}
        for name, mode in modes.items():
            steps[f"{name}, attention {attention}"] = taught(folder, text_file, mode, attention)
    least = dict.fromkeys(steps, float("inf"))
    for round in range(ROUNDS + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            if round > 0:  # the first one allocates
                least[name] = min(least[name], time.process_time() - began)
    ratios = {name: seconds / least["float"] for name, seconds in least.items()}
    print(f"\nfloat {least['float'] * 1000:.0f} ms")
    print("\n".join(f"{name}: {ratio:.3f}" for name, ratio in ratios.items()))
    assert all(ratio <= LIMIT for ratio in ratios.values()), ratios
