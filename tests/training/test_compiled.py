"""`train.compile`: the compiled model has the numbers, the names and the files of the uncompiled one.

Inductor takes a minute for a model of two blocks; tests that are not slow trace the model without it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors import safe_open
from small_net import TOKENS, Net, same
from tiny import Line
from torch import Tensor, nn

import qcompress.pipeline.stages.train
from qcompress.errors import MachineError
from qcompress.schema.recipe import Train
from qcompress.training import compiled as compilation
from qcompress.training.checkpoint import Checkpoints

COMPILE = Train(compile=True)


class Wrapped(nn.Module):
    """A module that renames the parameters of the one that it wraps, as torch.compile's does."""

    def __init__(self, module: nn.Module, passes: list[type]) -> None:
        super().__init__()
        self._orig_mod, self.passes = module, passes

    def forward(self, *arguments: object, **keywords: object) -> object:
        self.passes.append(type(self._orig_mod))
        return self._orig_mod(*arguments, **keywords)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Replaces the compiler; lists the type of the module at each call of a compiled module."""
    calls: list[type] = []
    monkeypatch.setattr(compilation, "require_compiler", lambda train, device: None)
    monkeypatch.setattr(qcompress.pipeline.stages.train, "require_compiler", lambda train, device: None)
    monkeypatch.setattr(torch, "compile", lambda module, **options: Wrapped(module, calls))
    return calls


def gradients(run: Callable[[Tensor], Tensor], net: nn.Module) -> list[Tensor]:
    torch.manual_seed(3)  # of the dropout
    loss = run(torch.arange(6) % TOKENS).square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.filterwarnings("ignore")  # the tracer provokes warnings of torch, and suppresses them
def test_a_traced_model_has_the_loss_and_the_gradients_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "COMPILER", {"backend": "eager"})
    torch.manual_seed(0)
    net = Net(4, activations=True, dropout=0.2, batch_norm=False).train()
    names = list(net.state_dict())
    run = compilation.compiled(net, COMPILE)
    assert run is not net and compilation.compiled(net, Train()) is net
    for ours, expected in zip(gradients(run, net), gradients(net, net), strict=True):
        assert torch.equal(ours, expected)
    assert list(net.state_dict()) == names


@pytest.mark.parametrize("method", ["lsq", "quadapter"])
def test_updates_run_compiled_and_files_keep_their_names(
    line: Callable[..., Line], method: str, passes: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss of a phase is computed by the compiled model, or by the compiled block; nothing else is."""
    files: list[set[str]] = []
    save = Checkpoints.save

    def watched(checkpoints: Checkpoints, *arguments: object) -> None:
        save(checkpoints, *arguments)
        with safe_open(checkpoints.file, framework="pt") as stream:
            files.append(set(stream.keys()))

    monkeypatch.setattr(Checkpoints, "save", watched)
    plain = line(name="plain", method=method, steps=2).train()
    assert passes == []
    of_plain, files[:] = list(files), []
    made = line(name="compiled", method=method, steps=2, train={"compile": True}).train()
    kinds = [kind.__name__ for kind in passes]
    blocks = len(made.architecture.blocks) if method == "quadapter" else 0
    assert kinds == ["GPT2Block"] * 2 * blocks + ["GPT2LMHeadModel"] * 2
    assert files == of_plain and files[-1]
    assert same(made.tensors(), plain.tensors())


def test_a_missing_compiler_is_an_error_before_anything_is_read(
    line: Callable[..., Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(function: object, **options: object) -> Callable[..., object]:
        def run(*arguments: object) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore of it")

        return run

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(qcompress.pipeline.stages.train, "_read", lambda *arguments, **options: 1 / 0)
    with pytest.raises(MachineError) as error:
        line(method="lsq", steps=1, train={"compile": True}).train()
    assert error.value.exit_code == 6
    assert error.value.message == (
        "train.compile is true, and torch.compile does not work on the device cpu: "
        "InvalidCxxCompiler: No working C++ compiler found"
    )
    assert error.value.fix == "install a C++ compiler such as g++, or write `train: {compile: false}`"


def test_inductor_draws_the_numbers_of_the_uncompiled_model() -> None:
    assert compilation.COMPILER == {"backend": "inductor", "options": {"fallback_random": True}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("lsq", {"format": "w4a8"}),
        ("lsq", {"format": {"preset": "w8a8", "attention": "int8"}}),
        ("quadapter", {"format": "w4a8"}),
        ("quant-noise", {"format": "w4a8"}),
    ],
    ids=["lsq", "attention", "quadapter", "quant-noise"],
)
def test_a_compiled_run_ends_near_an_uncompiled_one(
    line: Callable[..., Line], backend: str, method: str, sections: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit without inductor; inductor sums in another order, and Adam's first steps turn the last bit
    of a gradient near 0 into a step of either sign: each parameter is near within the steps taken.
    """
    steps, rates = 4, {"weight": 2e-5, "other": 2e-5, "scale": 1e-3, "adapter": 1e-3}
    plain = line(name="plain", method=method, steps=steps, **sections).train()
    if backend != "inductor":
        monkeypatch.setattr(compilation, "COMPILER", {"backend": backend})
    made = line(name="compiled", method=method, steps=steps, **sections, train={"compile": True}).train()
    expected, tensors = plain.tensors(), made.tensors()
    if backend != "inductor":
        assert same(tensors, expected)
        return
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        rate = rates["scale" if name.endswith("scale") else "weight"]
        reach = 2 * steps * rate * max(1.0, float(expected[name].abs().max()))
        assert (tensor - expected[name]).abs().max() <= reach, name
