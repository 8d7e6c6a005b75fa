"""Decomposition of a captured graph without a second trace: equal values, and the graphs that it leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qcompress.pipeline.single_trace import decompose, single_trace

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export raises them itself


class Function(nn.Module):
    """A function of one tensor as a module in evaluation mode."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def captured(function: Callable[[Tensor], Tensor]) -> ExportedProgram:
    """The graph of a function of a tensor [batch, 3, 4]."""
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    return torch.export.export(
        Function(function), (torch.ones(5, 3, 4),), dynamic_shapes=shapes, strict=False
    )


def operators(program: ExportedProgram) -> list[str]:
    """Names of the graph's operators."""
    return [str(node.target) for node in program.graph_module.graph.nodes if node.op == "call_function"]


def read_after_update(x: Tensor) -> Tensor:
    product = x * 2
    return product.add_(1) * product


REPLACED = {
    "conversion": (lambda x: x.to(torch.float64).to(torch.int32), "aten.to.dtype"),
    "conversion to the type": (lambda x: x.to(torch.float32) + 1, "aten.to.dtype"),
    "dropout": (lambda x: nn.functional.dropout(x, 0.5, training=False) * 2, "aten.dropout.default"),
    "reshape": (lambda x: x.transpose(1, 2).reshape(x.shape[0], -1), "aten.reshape.default"),
    "view of a contiguous copy": (
        lambda x: x.transpose(1, 2).contiguous().view(x.shape[0], 12),
        "aten.contiguous.default",
    ),
    "reshape of a contiguous tensor": (lambda x: (x * 2).reshape(x.shape[0], -1), "aten.reshape.default"),
    "flatten": (lambda x: (x * 2).flatten(1), "aten.flatten.using_ints"),
    "mask": (lambda x: (x > 0) & (x < 1), "aten.__and__.Tensor"),
    "pooling": (lambda x: nn.functional.adaptive_avg_pool2d(x, (1, 1)), "aten.adaptive_avg_pool2d.default"),
    "read after an update": (read_after_update, "aten.add_.Tensor"),
    "updates in place": (lambda x: (x * 3).add_(1).clamp_(-2, 2), "aten.add_.Tensor"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_an_operator_is_replaced_and_values_are_equal(name: str) -> None:
    function, replaced = REPLACED[name]
    program = captured(function)
    assert replaced in operators(program)
    assert decompose(program, {})
    assert replaced not in operators(program)
    x = torch.linspace(-3, 3, 7 * 12).reshape(7, 3, 4)
    assert torch.equal(program.module(check_guards=False)(x.clone()), function(x.clone()))


def read_twice(x: Tensor) -> Tensor:
    product = x * 2
    other = product * 3
    return product.add_(1) * other


def update_of_view(x: Tensor) -> Tensor:
    product = x * 2
    product[:, 0].add_(1)
    return product


@pytest.mark.parametrize("function", [read_twice, update_of_view, lambda x: x.add_(1)])
def test_an_update_of_a_tensor_that_is_read_elsewhere_is_left_to_the_second_trace(
    function: Callable[[Tensor], Tensor],
) -> None:
    program = captured(function)
    before = operators(program)
    assert not decompose(program, {})
    assert operators(program) == before


def test_an_operator_of_the_table_is_left_to_the_second_trace() -> None:
    program = captured(lambda x: nn.functional.silu(x.to(torch.float64)))
    before = operators(program)
    assert not decompose(program, {torch.ops.aten.silu.default: print})
    assert operators(program) == before and "aten.to.dtype" in before
    with single_trace():
        assert "aten.silu.default" not in operators(program.run_decompositions())


def test_the_method_of_the_program_is_restored() -> None:
    original = ExportedProgram.run_decompositions
    with pytest.raises(ZeroDivisionError), single_trace():
        assert ExportedProgram.run_decompositions is not original
        raise ZeroDivisionError
    assert ExportedProgram.run_decompositions is original
