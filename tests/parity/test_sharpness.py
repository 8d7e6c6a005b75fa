"""Measured sharpness against quadratics worked by hand, torch's own Hessian, and stock transformers."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_net import rounded_by_hand, small
from tiny import Line, make_recipe
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from qcompress.models import load_tokenizer
from qcompress.parity.inputs import Artifacts
from qcompress.parity.sharpness import Part, measure_sharpness, trained_sharpness
from qcompress.pipeline.stages.verify import verify
from qcompress.quant.affine import Grid
from qcompress.quant.layers import QuantizedLinear
from qcompress.quant.quantizers import FrozenWeight
from qcompress.report.ladder import order_metrics
from qcompress.schema.method_options import Sharpness
from qcompress.schema.recipe import Verify
from qcompress.system.artifacts import read_json
from qcompress.system.reporter import Reporter
from qcompress.tasks import causal_lm
from qcompress.verdict.judge import judge

PRECISE = {"iterations": 2000, "tolerance": 1e-5}


def frozen(weight: Tensor) -> QuantizedLinear:
    """A layer whose integers are weight / 0.5."""
    quantizer = FrozenWeight(torch.full((weight.shape[0],), 0.5), Grid(0), (-127, 127))
    return QuantizedLinear(nn.Parameter(weight, requires_grad=False), None, 0, quantizer, None)


def quadratic(curvatures: list[float], center: float = 0.0) -> tuple[Callable[[], Tensor], QuantizedLinear]:
    """sum of c_i (q_i - center)^2 / 2, at q = 1.5 (the weight 1.6 rounded): Hessian diag(c)."""
    layer = frozen(torch.full((len(curvatures), 1), 1.6))
    c = torch.tensor(curvatures)[:, None]
    return lambda: (c * (layer.quantized_weight() - center).square()).sum() / 2, layer


@pytest.mark.parametrize(
    ("curvatures", "largest"),
    [([1.0, 3.0, 2.0], 3.0), ([-5.0, 3.0, 2.0], 3.0), ([-5.0, -1.0, -2.0], -1.0), ([0.25], 0.25)],
    ids=str,
)
def test_the_eigenvalue_of_a_quadratic_is_its_largest_curvature(
    curvatures: list[float], largest: float
) -> None:
    """Also where another one has the larger magnitude: positive and largest is not the same."""
    loss, layer = quadratic(curvatures)
    found = measure_sharpness([Part(loss)], [layer], Sharpness(**PRECISE), seed=0)
    assert found["eigenvalue"] == pytest.approx(largest, rel=1e-4)
    assert found["residual"] <= 1e-5 and 1 <= found["iterations"] < 200
    assert found["loss"] == pytest.approx(sum(curvatures) * 1.5**2 / 2)


def test_a_flat_loss_has_sharpness_zero() -> None:
    loss, layer = quadratic([0.0, 0.0])
    found = measure_sharpness([Part(loss)], [layer], Sharpness(), seed=0)
    assert found["loss_rise"] == found["eigenvalue"] == found["residual"] == 0.0
    layer = frozen(torch.ones(2, 1))
    linear = measure_sharpness([Part(lambda: layer.quantized_weight().sum())], [layer], Sharpness(), seed=0)
    assert linear["eigenvalue"] == 0.0


def test_the_loss_of_a_quadratic_rises_by_the_mean_curvature_on_every_direction() -> None:
    """Around the minimum, with equal curvatures c: c * rho^2 / 2 whatever the direction."""
    loss, layer = quadratic([4.0] * 6, center=1.5)
    found = measure_sharpness([Part(loss)], [layer], Sharpness(rho=0.3, directions=5), seed=1)
    assert found["loss_rise"] == pytest.approx(4.0 * 0.3**2 / 2, rel=1e-5)
    # unequal ones: on average the mean curvature; 2000 directions in 2 dimensions
    loss, layer = quadratic([1.0, 7.0], center=1.5)
    found = measure_sharpness([Part(loss)], [layer], Sharpness(rho=0.3, directions=2000), seed=1)
    assert found["loss_rise"] == pytest.approx(4.0 * 0.3**2 / 2, rel=0.05)


def test_the_same_seed_gives_the_same_numbers_and_another_other_directions() -> None:
    loss, layer = quadratic([1.0, 7.0, 2.0])
    measured = [measure_sharpness([Part(loss)], [layer], Sharpness(), seed=seed) for seed in (3, 3, 4)]
    assert measured[0] == measured[1] and measured[0]["loss_rise"] != measured[2]["loss_rise"]


def test_a_search_that_ran_out_of_iterations_says_so() -> None:
    loss, layer = quadratic([1.0, 1.01, 0.99, -0.5])
    found = measure_sharpness([Part(loss)], [layer], Sharpness(iterations=3, tolerance=1e-6), seed=0)
    assert found["iterations"] == 3 and found["residual"] > 1e-6


def test_parts_count_by_their_share() -> None:
    (one, layer), other = quadratic([1.0, 2.0]), 10.0
    parts = [Part(one, 0.75), Part(lambda: other * one(), 0.25)]
    found = measure_sharpness(parts, [layer], Sharpness(**PRECISE), seed=0)
    assert found["eigenvalue"] == pytest.approx(2.0 * (0.75 + 2.5), rel=1e-4)


@pytest.mark.parametrize("activations", [False, True])
def test_it_is_the_hessian_that_torch_finds_with_respect_to_the_rounded_weights(activations: bool) -> None:
    """Oracle: the same network of stock functions of one flat vector. Where activations round, straight
    through: each rounding adds the constant that it adds at this point.
    """
    made = small(activations=activations, seed=2)
    net = made.net.eval().requires_grad_(False)
    ids = torch.arange(9)
    start = [rounded_by_hand(layer) for layer in made.linears]
    sizes = [weight.numel() for weight in start]
    roundings: list[Tensor] = []

    def rounded(x: Tensor, place: int) -> Tensor:
        if not activations:
            return x
        if len(roundings) <= place:
            codes = (x / 0.02).round()
            assert codes.abs().max() < 127
            roundings.append((codes * 0.02 - x).detach())
        return x + roundings[place]

    def loss(flat: Tensor) -> Tensor:
        w = [part.view_as(like) for part, like in zip(flat.split(sizes), start, strict=True)]
        x = F.linear(rounded(rounded_by_hand(net.table)[ids], 0), w[0], net.first.bias)
        x = torch.tanh(F.layer_norm(x, (12,), net.norm.weight, net.norm.bias))
        x = torch.tanh(F.linear(rounded(x, 1), w[1], net.second.bias))
        return F.cross_entropy(F.linear(rounded(x, 2), w[2], net.third.bias), ids % 5)

    if activations:
        for layer in made.linears:
            layer.input_quantizer.start.fill_(0.02)
        net.table.weight.mul_(0.5)  # within the range of 127 steps
    flat = torch.cat([weight.flatten() for weight in start])
    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    found = measure_sharpness(
        [Part(lambda: F.cross_entropy(net(ids), ids % 5))], made.linears, Sharpness(**PRECISE), seed=0
    )
    assert found["loss"] == pytest.approx(loss(flat).item(), rel=1e-5)
    assert found["eigenvalue"] == pytest.approx(float(expected.max()), rel=1e-3)
    assert float(expected.max()) > 0.1 and all(layer.tap is None for layer in made.linears)


# As a metric of a run -----------------------------------------------------------------------------


def measured(made: Line, batch_size: int = 3, **options: Any) -> dict[str, float]:
    recipe = made.recipe.model_copy(update={"verify": Verify(sharpness=options, batch_size=batch_size)})
    return trained_sharpness(
        recipe, made.text.parent, made.float_model, made.trained, torch.device("cpu"), Reporter(silent=True)
    )


def test_a_float_run_is_measured_at_its_float_weights(line: Callable[..., Line]) -> None:
    """Oracle: stock transformers, its weights moved by hand, Hessian products by finite differences."""
    made = line(method="float", format="float", steps=0).train()
    found = measured(made, samples=7, rho=0.5, directions=3, iterations=300, tolerance=1e-3)
    assert set(found) == {
        f"sharpness.{name}" for name in ("loss_rise", "eigenvalue", "iterations", "residual")
    }
    model = GPT2LMHeadModel.from_pretrained(made.source, attn_implementation="eager").eval()
    data = made.recipe.data.evaluate["test"]
    ids = causal_lm.examples(data, made.text.parent, load_tokenizer(made.source), made.recipe.task).ids[:7]
    names = [f"{item.name}.weight" for item in made.plan if item.layer.kind == "linear"]
    weights = [model.get_parameter(name) for name in names]
    assert len(weights) == 8 and len(ids) == 7

    def loss(moves: list[Tensor] | None = None) -> Tensor:
        moved = {name: weight + move for name, weight, move in zip(names, weights, moves or [], strict=False)}
        logits = torch.func.functional_call(model, moved, (ids,)).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    random = torch.Generator().manual_seed(made.recipe.seed)
    rises = []
    with torch.no_grad():
        for _ in range(3):
            draws = [torch.randn(weight.shape, generator=random) for weight in weights]
            norm = math.sqrt(sum(float(draw.square().sum()) for draw in draws))
            moves = [0.5 * draw / norm for draw in draws]
            rises += [float(loss(moves) - loss()), float(loss([-move for move in moves]) - loss())]
    assert found["sharpness.loss_rise"] == pytest.approx(statistics.mean(rises), rel=1e-3, abs=2e-6)
    offsets = [torch.zeros_like(weight, requires_grad=True) for weight in weights]
    gradients = torch.autograd.grad(loss(offsets), offsets, create_graph=True)
    # a random vector's Rayleigh quotient is below the largest eigenvalue; the gradient's is close to it
    unit = [
        g.detach() / math.sqrt(sum(float(h.detach().square().sum()) for h in gradients)) for g in gradients
    ]
    image = torch.autograd.grad(sum((g * u).sum() for g, u in zip(gradients, unit, strict=True)), offsets)
    quotient = float(sum((h * u).sum() for h, u in zip(image, unit, strict=True)))
    assert 0 < quotient <= found["sharpness.eigenvalue"] * 1.001
    assert found["sharpness.residual"] <= 1e-3


@pytest.mark.parametrize("method", ["lsq", "quadapter"])
def test_any_quantized_run_can_report_it(line: Callable[..., Line], method: str) -> None:
    found = measured(line(method=method, steps=2).train(), samples=4, directions=2, tolerance=0.1)
    assert len(found) == 4 and all(math.isfinite(value) for value in found.values())
    assert found["sharpness.eigenvalue"] > 0


def test_it_stands_in_the_trained_row_and_harms_neither_gate_nor_ladder(
    line: Callable[..., Line], tmp_path: Path
) -> None:
    made = line(method="lsq", steps=2, verify={"sharpness": {"samples": 4, "directions": 2}}).train()
    missing = {"folded": "not run", "onnx": "not run"}
    artifacts = Artifacts(made.float_model, made.trained, None, None, None, missing)
    verify(made.recipe, made.text.parent, artifacts,
           tmp_path, Reporter(silent=True))  # fmt: skip
    report = read_json(tmp_path / "parity.json")
    metrics = {row["stage"]: set(row.get("metrics", ())) for row in report["rows"]}
    own = {name for name in metrics["trained"] if name.startswith("sharpness.")}
    assert len(own) == 4 and metrics["trained"] - own == metrics["float"]
    verdict = judge(report, made.recipe.gate, ["float", "trained"], "fp32")
    assert verdict["verdict"] == "accept", verdict["reasons"]
    assert order_metrics(report["rows"], report["sets"], {}) == ["test.perplexity"]


def test_it_is_not_measured_unless_asked_for(text_file: Path) -> None:
    assert make_recipe(text_file).verify.sharpness is None
    assert make_recipe(text_file, verify={"sharpness": {}}).verify.sharpness == Sharpness()


# A small study ------------------------------------------------------------------------------------

STUDY = {
    "lsq": {"method": "lsq"},
    "saq": {"method": "saq", "stepper": {"rho": 0.2}},
    "squat": {"method": "squat", "stepper": {"rho": 0.2}},
}


@pytest.mark.slow
def test_saq_and_squat_end_flatter_than_lsq(line: Callable[..., Line]) -> None:
    """Three seeds, 300 updates each, 4-bit weights: means over the seeds, on the evaluation text. Directions
    have about a tenth of the weights' norm: in 98,304 dimensions a shorter one meets hardly any curvature.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for name, axes in STUDY.items():
        for seed in range(3):
            train = {"lr": {"weight": 2e-3, "other": 2e-3}, "batch_size": 8}
            made = line(**axes, seed=seed, steps=300, format="w4a8", train=train).train()
            values = measured(made, 16, samples=16, rho=4.0, directions=20, iterations=60, tolerance=0.1)
            found.setdefault(name, []).append(values)
    mean = {
        name: {
            key: statistics.mean(row[f"sharpness.{key}"] for row in rows)
            for key in ("loss_rise", "eigenvalue")
        }
        for name, rows in found.items()
    }
    print(json.dumps({"mean": mean, "all": found}, indent=1))
    for name in ("saq", "squat"):
        assert mean[name]["loss_rise"] < mean["lsq"]["loss_rise"], mean
        assert mean[name]["eigenvalue"] < mean["lsq"]["eigenvalue"], mean
