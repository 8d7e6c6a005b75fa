"""Sharpness-aware steppers on a net with batch norms: their statistics are those of the unperturbed pass."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_net import plain, saq, small, squat
from tiny_nets import make_net, pixels
from torch import Tensor, nn

from qcompress.errors import MachineError, ModelError
from qcompress.models.cifar_resnet import NET
from qcompress.models.plan import LayerPlan
from qcompress.models.prepare import quantize
from qcompress.pipeline.stages.train import _judge_norms
from qcompress.quant.batchnorm import statistics
from qcompress.schema.formats import ActivationFormat, WeightFormat
from qcompress.schema.quantizers import Lsq
from qcompress.system.distributed import Processes
from qcompress.training.methods.protocols import Group, Moment


def updated(stepper) -> tuple[dict[str, Tensor], list[Tensor], int]:
    """Statistics and weights of a ResNet for CIFAR after one update, and its passes."""
    weights, activations = WeightFormat(bits=4, container="int8"), ActivationFormat()
    layers = NET.outline({"depth": 8}).layers[1:]
    assert len(layers) == 6
    plan = tuple(LayerPlan(layer, weights, activations, Lsq(), Lsq()) for layer in layers)
    prepared = quantize(make_net("cifar"), "cifar-resnet", plan)
    for name, quantizer in prepared.weight_quantizers():
        quantizer.init(prepared.layers[name].coded_weight().detach())
    for _, quantizer in prepared.input_quantizers():
        quantizer.start.fill_(0.02)
    net = prepared.model.train().requires_grad_(False)
    trained = [prepared.layers[layer.name].weight.requires_grad_() for layer in layers]
    group = Group("weight", tuple(trained), 0.1, 0.0, kinds=tuple("other" for _ in trained))
    passes: list[int] = []
    x, labels = pixels(8), torch.arange(8) % 6

    def closure() -> Tensor:
        passes.append(1)
        return F.cross_entropy(net(x).logits, labels)

    taps = [prepared.layers[layer.name] for layer in layers]
    stepper.attach(net)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    stepper.step(closure, optimizer, [group], taps, small().accelerator, Moment(0, 0, 0, 0))
    return dict(statistics(net)), [weight.detach() for weight in trained], len(passes)


@pytest.mark.parametrize("make", [saq, squat], ids=["saq", "squat"])
def test_statistics_are_those_of_one_unperturbed_pass(make: Callable) -> None:
    ours, moved, passes = updated(make(rho=0.5))
    theirs, wanted, one = updated(plain())
    assert one == 1 and passes > 1
    start = dict(statistics(make_net("cifar")))
    assert ours.keys() == theirs.keys() == start.keys() and len(ours) == 3 * 7
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and not torch.equal(tensor, start[name]), name
    assert all(not torch.equal(a, b) for a, b in zip(moved, wanted, strict=True))  # the gradient is another


def test_several_processes_are_refused_and_statistics_of_one_batch_are_told() -> None:
    """`N processes make the updates of one`, which batch norms of a share each would not."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.99))
    told: list[str] = []
    reporter = SimpleNamespace(say=told.append)
    with pytest.raises(MachineError, match="the model has 1 batch norms: each process would have"):
        _judge_norms(net, Processes(rank=1, size=2), reporter)
    _judge_norms(net, Processes(), reporter)
    assert len(told) == 1 and "forget 99 % of their statistics" in told[0]
    _judge_norms(nn.Sequential(nn.BatchNorm2d(4)), Processes(), reporter)
    _judge_norms(nn.Linear(2, 2), Processes(rank=1, size=2), reporter)
    assert len(told) == 1


def with_norms(**filled: float) -> nn.Sequential:
    """Two convolutions with initial batch norms; `filled` are values of the second one's tensors."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    for name, value in filled.items():
        getattr(net[3], name).data.fill_(value)
    return net


@pytest.mark.parametrize("filled", [{"bias": 0.3}, {"weight": 1.0005}, {"running_var": 0.999}])
def test_batch_norms_that_were_folded_are_not_trained(filled: dict[str, float]) -> None:
    with pytest.raises(ModelError, match="all 2 batch norms of the checkpoint have mean 0 and a constant"):
        _judge_norms(with_norms(**filled), Processes(), SimpleNamespace(say=pytest.fail))


@pytest.mark.parametrize(
    "net",
    [
        with_norms(),
        with_norms(bias=0.3, running_mean=0.1),
        with_norms(weight=0.0),
        nn.Sequential(nn.BatchNorm2d(4, affine=False)),
        nn.InstanceNorm2d(4, affine=True),
    ],
    ids=["initial", "mean", "zero", "plain", "without-statistics"],
)
def test_other_batch_norms_are_trained(net: nn.Module) -> None:
    _judge_norms(net, Processes(), SimpleNamespace(say=pytest.fail))
