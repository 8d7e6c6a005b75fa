"""What learned scales cost: one training step with LSQ against the same step in float.

The encoder has MiniLM's shape (6 layers, width 384, inner width 1536, 12 heads, 36 linear layers) and is made
of plain torch modules; the batch is 32 sequences of 64 tokens. Embeddings and the head are left out: they
cost the same on both sides and would flatter the ratio. Run by hand: `pytest -m benchmark tests/benchmarks`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.quant.affine import Grid
from qcompress.quant.layers import QuantizedLinear
from qcompress.quant.quantizers import LsqActivation, LsqWeight
from qcompress.quant.ranges import Statistics
from qcompress.schema.quantizers import Lsq

pytestmark = pytest.mark.benchmark

LAYERS, WIDTH, INNER, HEADS, BATCH, TOKENS = 6, 384, 1536, 12, 32, 64
ROUNDS = 20
LIMIT = 1.20
"""Noise is 1 to 2 % over the fastest of each part, and more where other processes use the memory: learned
scales add passes over memory, while a float step is mostly matrix products.
"""

Linear = Callable[[int, int], nn.Module]


class Encoder(nn.Module):
    """A BERT encoder: self-attention and feed-forward, each with dropout, residual and LayerNorm."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(linear) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Layer(nn.Module):
    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (linear(WIDTH, WIDTH) for _ in range(4))
        self.inner, self.outer = linear(WIDTH, INNER), linear(INNER, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for part in (self.query, self.key, self.value))  # fmt: skip
        context = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).transpose(1, 2).flatten(2)
        x = self.first(x + F.dropout(self.output(context), 0.1))
        return self.second(x + F.dropout(self.outer(F.gelu(self.inner(x))), 0.1))


def quantized(granularity: str) -> Linear:
    """Linear layers with learned scales, int4 weights and int8 activations."""

    def linear(inputs: int, outputs: int) -> nn.Module:
        plain = nn.Linear(inputs, outputs)
        weights = LsqWeight(Lsq(), Grid(0, None, granularity), (-8, 7), plain.weight.shape)
        weights.init(plain.weight.detach())
        rounding = LsqActivation(Lsq(), (-128, 127), inputs)
        ones = torch.ones(inputs)
        rounding.init(Statistics(largest=3 * ones, mean=0.8 * ones, rows=torch.randn(64, inputs)))
        return QuantizedLinear(plain.weight, plain.bias, 0, weights, rounding)

    return linear


def training_step(linear: Linear) -> Callable[[], list[float]]:
    """One update: forward, backward, AdamW, and what every quantizer does after it. Gives the seconds of its
    parts, which are cut before and after each linear layer, and where a gradient arrives at one.
    """
    torch.manual_seed(0)
    model = Encoder(linear).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    # the input has a gradient on both sides, as behind embeddings that train
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    target = torch.randn(BATCH, TOKENS, WIDTH)
    quantizers = [module for module in model.modules() if hasattr(module, "advance")]
    assert len(quantizers) == (0 if linear is nn.Linear else 72)
    times: list[float] = []

    def cut(*_: object) -> None:
        times.append(time.process_time())

    def after(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(cut)
        cut()

    for module in model.modules():
        if isinstance(module, (nn.Linear, QuantizedLinear)):
            module.register_forward_pre_hook(cut)
            module.register_forward_hook(after)

    def step() -> list[float]:
        times.clear()
        cut()
        loss = F.mse_loss(model(x), target)
        cut()
        loss.backward()
        cut()
        optimizer.step()
        cut()
        optimizer.zero_grad(set_to_none=True)
        x.grad = None
        for quantizer in quantizers:
            quantizer.advance()
        cut()
        assert len(times) == 3 * 6 * LAYERS + 5
        return [end - start for start, end in pairwise(times)]

    return step


def test_a_step_with_learned_scales_costs_little_more_than_a_float_step() -> None:
    """Interleaved, and the fastest of each part: what disturbs one side disturbs the other, and no step of a
    second and a half is left alone as a whole. CPU time of one thread, so that what other processes take is
    not counted.
    """
    linears = {"float": nn.Linear, "channel": quantized("channel"), "tensor": quantized("tensor")}
    steps = {name: training_step(linear) for name, linear in linears.items()}
    parts: dict[str, list[list[float]]] = {name: [] for name in steps}
    for round in range(ROUNDS + 2):
        for name, step in steps.items():
            taken = step()
            if round >= 2:  # the first allocate
                parts[name].append(taken)
    fastest = {name: sum(min(column) for column in zip(*rows, strict=True)) for name, rows in parts.items()}
    whole = {name: min(sum(row) for row in rows) for name, rows in parts.items()}
    ratios = {name: seconds / fastest["float"] for name, seconds in fastest.items()}
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"\nfloat {fastest['float'] * 1e3:.0f} ms a step, {threads} threads, load {load:.1f}")
    for name in ("channel", "tensor"):
        print(f"lsq, scales per {name}: {ratios[name]:.3f}; whole steps {whole[name] / whole['float']:.3f}")
    assert all(ratios[name] <= LIMIT for name in ("channel", "tensor")), ratios
