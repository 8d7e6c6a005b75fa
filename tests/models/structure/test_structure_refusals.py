"""Sites that are refused, and those that are found beside them, on modules of a few lines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import zoo
from step_nets import Net, example, pictures
from torch import Tensor, nn

from qcompress.models.architecture import Site
from qcompress.models.structure import discover
from qcompress.models.structure.probe import _exponents, _LeakError


def sites_of(model: nn.Module, inputs: dict[str, Tensor], **options) -> dict[str, Site]:
    return {site.writer: site for site in discover(model, inputs, **options).sites}


def test_a_relu_passes_a_positive_factor_and_a_relu6_does_not() -> None:
    relu = sites_of(Net(lambda net, x: F.relu(x), convolutions=True), pictures())
    assert relu["first"] == Site("first", ("second",), 8, "value")
    assert sites_of(Net(lambda net, x: F.relu6(x), convolutions=True), pictures()) == {}


@pytest.mark.parametrize(
    "step",
    [
        F.gelu,
        F.silu,
        torch.tanh,
        F.hardswish,
        lambda x: x + 1,
        lambda x: x * x,
        F.softmax,
        lambda x: x.clamp(-50, 50),
        lambda x: x + x.flip(-1),
    ],
)
def test_other_steps_between_two_layers_leave_no_site(step: Callable[..., Tensor]) -> None:
    def between(net: Net, x: Tensor) -> Tensor:
        return step(x, -1) if step is F.softmax else step(x)

    assert sites_of(Net(between), example()) == {}


def test_a_permuted_channel_keeps_its_factor() -> None:
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    site = sites_of(Net(lambda net, x: x[..., order]), example())["first"]
    assert site.maps == (tuple(order),)


def test_a_dead_channel_is_left_out() -> None:
    model = Net(lambda net, x: F.relu(x))
    with torch.no_grad():
        model.first.bias[2] = -100
    site = sites_of(model, example())["first"]
    assert site.outputs == (0, 1, 3, 4, 5, 6, 7) and site.channels == 7
    assert site.maps == ((0, 1, -1, 2, 3, 4, 5, 6),)


def test_a_channel_that_is_dead_at_one_of_two_readers_is_left_out() -> None:
    """It reaches `third` as it is, and `second` through a ReLU that closed on these inputs only."""

    class Two(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(F.relu(x)) + self.third(x)

    model = Two(lambda net, x: x)
    with torch.no_grad():
        model.first.bias[5] = -10
    site = sites_of(model, example())["first"]
    assert site.readers == ("second", "third")
    assert site.outputs == (0, 1, 2, 3, 4, 6, 7)


def test_a_reader_beside_an_addition_is_not_the_only_one() -> None:
    assert sites_of(Net(lambda net, x: x + net.third(net.norm(x))), example()).keys() == {"norm"}


def test_an_output_beside_the_reader_is_a_leak() -> None:
    class Pair(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.first(x)
            return {"result": self.second(hidden), "hidden": hidden.sum()}

    assert sites_of(Pair(lambda net, x: x), example()) == {}


def test_a_factor_that_is_not_a_power_of_two_is_a_leak() -> None:
    clean = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    assert _exponents(clean * torch.tensor([0.25, 8.0]), clean).tolist() == [-2, 3]
    for scaled in (clean * 3, -clean, clean + 1, clean * torch.tensor([[2.0], [4.0]])):
        with pytest.raises(_LeakError):
            _exponents(scaled, clean)


def test_a_step_that_changes_some_tokens_leaves_no_site() -> None:
    assert sites_of(Net(lambda net, x: torch.cat([x[:, :1], x[:, 1:] + 1], 1)), example(1)) == {}


def test_a_layer_that_is_called_twice_is_in_no_site() -> None:
    model = Net(lambda net, x: net.third(net.norm(net.third(x))))
    structure = discover(model, example())
    assert structure.sites == () and [layer.name for layer in structure.layers if layer.calls > 1] == [
        "third"
    ]
    assert sites_of(Net(lambda net, x: net.third(x) + net.third(x)), example()) == {}


def test_a_table_that_another_layer_reads_is_in_no_site() -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.table, self.norm, self.head = (
                nn.Embedding(11, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 11, bias=False),
            )
            if tied:
                self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.table(ids))).log_softmax(-1)

    ids = {"ids": torch.arange(8).view(2, 4)}
    untied, tied = discover(Tied(False), ids), discover(Tied(True), ids)
    assert [site.readers for site in untied.sites] == [("head",)]
    assert tied.sites == ()
    assert (tied.layer("head").kind, tied.layer("head").tied_to) == ("head", "table")
    assert tied.parameters == 11 * 8 + 16 and tied.covered == 1.0


def test_norms_after_the_layers_of_a_block_are_no_writers() -> None:
    sample = zoo.build("olmo2")
    sites = discover(sample.model, sample.inputs, sample.again).sites
    norms = {site.writer.rpartition(".")[2] for site in sites if site.kind == "norm"}
    assert norms == {"norm"}  # the last one, which only the head reads


def test_an_untrained_parameter_does_not_hide_what_it_does() -> None:
    """An addend of zeros: a site with these values, and not one after training."""

    class Shifted(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x: x + net.shift)
            self.shift = nn.Parameter(torch.zeros(8))

    model = Shifted()
    assert sites_of(model, example()) == {}
    assert bool((model.shift == 0).all())


def test_a_site_that_further_inputs_contradict_is_dropped() -> None:
    def between(net: Net, x: Tensor) -> Tensor:
        return x if x.shape[1] < 7 else x + 1

    model = Net(between)
    assert sites_of(model, example()).keys() == {"first"}
    assert sites_of(model, example(), again=example(2, 6)).keys() == {"first"}
    assert sites_of(model, example(), again=example(2, 9)) == {}


def test_a_reader_that_the_second_inputs_call_contradicts_a_site() -> None:
    """No input calls both readers of the norm, and the first one does not exist for the second inputs."""

    class Routed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.second(x) if x.shape[1] < 7 else self.third(x)

    model = Routed(lambda net, x: x)
    structure = discover(model, example(), example(2, 9))
    assert [layer.name for layer in structure.layers] == ["second"]
    assert structure.floats == {"first": "never called as a module", "third": "never called as a module"}
    assert structure.sites == ()


def test_experts_that_no_input_calls_may_read_the_norm_as_well() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.router = nn.LayerNorm(8), nn.Linear(8, 8)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.experts[int(x.mean() > -100)](x) + self.router(x)

    structure = discover(Experts(), example(), example(2, 9))
    assert structure.sites == ()
    assert [layer.name for layer in structure.layers] == ["experts.1", "router"]


def test_blocks_of_one_class_that_compute_different_things_are_not_trusted() -> None:
    class Block(nn.Module):
        def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.first, self.second, self.step = nn.Linear(8, 8), nn.Linear(8, 8), step

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.step(self.first(x)))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            steps = (F.leaky_relu, F.leaky_relu, torch.tanh, F.leaky_relu)
            self.blocks = nn.ModuleList(Block(step) for step in steps)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    structure = discover(Stack(), example())
    assert structure.blocks == tuple(f"blocks.{index}" for index in range(4))
    assert [site.writer for site in structure.sites] == [f"blocks.{index}.first" for index in (0, 1, 3)]
