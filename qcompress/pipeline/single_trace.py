"""Decomposition of an exported program without a second trace.

`torch.onnx.export` captures a model with `torch.export` and then traces the captured graph again: for
operators without an ONNX function, and to replace updates in place. The second trace takes half of the
exporter's time, and the graph of a folded model needs little of it: conversions of types, dropout outside of
training, reshapes, and updates of tensors that nothing else reads. `decompose` rewrites these nodes of the
captured graph, and leaves a graph with any other operator to decompose to the second trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

ATEN = torch.ops.aten

CONVERSIONS = {"aten.to.dtype", "aten.to.device", "aten.to.dtype_layout"}
"""Conversions to the type of the node."""

CONTIGUOUS = "aten.contiguous.default"
"""A copy in the order that a view needs."""

UNCHANGED = {CONTIGUOUS, "aten.dropout.default"}
"""Operators that return the values of their first argument in evaluation mode."""

NEW = {
    f"aten.{name}"
    for name in ("add.Tensor", "addmm.default", "conv2d.default", "div.Tensor", "linear.default",
                 "matmul.default", "mul.Tensor", "sub.Tensor")
}  # fmt: skip
"""Operators whose result shares its memory with no other tensor."""

IN_PLACE = {
    "aten.add_.Tensor": ATEN.add.Tensor,
    "aten.clamp_.default": ATEN.clamp.default,
    "aten.div_.Tensor": ATEN.div.Tensor,
    "aten.mul_.Tensor": ATEN.mul.Tensor,
    "aten.relu_.default": ATEN.relu.default,
    "aten.round_.default": ATEN.round.default,
    "aten.sub_.Tensor": ATEN.sub.Tensor,
}
"""Updates in place, and the operators that return the updated tensor."""

EQUAL = {"aten.__and__.Tensor": ATEN.bitwise_and.Tensor, "aten.__or__.Tensor": ATEN.bitwise_or.Tensor}
"""Operators that compute what another one computes."""

FLATTEN = "aten.flatten.using_ints"
"""An operator that has an ONNX function and that the second trace replaces all the same."""

Rewrite = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Operator, arguments and keyword arguments of a node."""


@contextmanager
def single_trace() -> Iterator[None]:
    """Context in which `torch.onnx.export` decomposes a program with `decompose` where that is possible."""
    traced = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, decomp_table: Any = None, **options: Any) -> ExportedProgram:
        if decomp_table is not None and decompose(program, decomp_table):
            return program
        return traced(program, decomp_table, **options)

    ExportedProgram.run_decompositions = run
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = traced


def decompose(program: ExportedProgram, table: Mapping[Any, Callable[..., Any]]) -> bool:
    """Replace the operators of `table` and updates in place in the graph of `program`. Returns False and
    leaves the graph unchanged if it has an operator that only a trace decomposes.
    """
    module = program.graph_module
    rewrites: list[tuple[Node, Rewrite]] = []
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        rewrite = _rewrite(node) if node.op == "call_function" else None
        if rewrite is not None:
            rewrites.append((node, rewrite))
        elif not _is_kept(node, table):
            return False
    for node, (target, arguments, options) in rewrites:
        if target == ATEN._unsafe_view.default:  # of a copy in the order that a view needs
            arguments = (_copy(node), *arguments[1:])
        node.target, node.args, node.kwargs = target, arguments, options
    module.graph.eliminate_dead_code()
    module.recompile()
    return True


def _is_kept(node: Node, table: Mapping[Any, Callable[..., Any]]) -> bool:
    """True for an operator that needs no decomposition, and for arithmetic of sizes."""
    if node.op != "call_function" or node.target in table or str(node.target) == FLATTEN:
        return False
    library, _, name = str(node.target).partition(".")
    if library in ("aten", "onnx_symbolic"):
        return not name.partition(".")[0].endswith("_")  # an update in place
    return getattr(node.target, "__module__", "") in ("_operator", "math", "torch")


def _rewrite(node: Node) -> Rewrite | None:
    """Replacement of a node's operator; None for an operator that has none."""
    name = str(node.target)
    if name in CONVERSIONS:
        source, kind = node.args[0], node.meta["val"].dtype
        if source.meta["val"].dtype == kind:
            return ATEN.alias.default, (source,), {}
        return ATEN._to_copy.default, (source,), {"dtype": kind}
    if name == CONTIGUOUS and not node.args[0].meta["val"].is_contiguous():
        return ATEN.clone.default, node.args[:1], {"memory_format": torch.contiguous_format}
    if name in UNCHANGED and not (name == "aten.dropout.default" and node.args[2]):
        return ATEN.alias.default, node.args[:1], {}
    if name == "aten.reshape.default":
        return ATEN._unsafe_view.default, (node.args[0], _sizes(node)), {}
    if name == FLATTEN and node.args[0].meta["val"].is_contiguous():
        sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        return (ATEN.view.default, (node.args[0], sizes), {}) if sizes.count(-1) < 2 else None
    if name == "aten.adaptive_avg_pool2d.default" and list(node.args[1]) == [1, 1]:
        return ATEN.mean.dim, (node.args[0], [-1, -2], True), {}
    if name in IN_PLACE and _is_new(node.args[0], node):
        return IN_PLACE[name], node.args, node.kwargs
    if name in EQUAL:
        return EQUAL[name], node.args, node.kwargs
    return None


def _sizes(node: Node) -> list[Any]:
    """Shape argument of a reshape; of a tensor that is copied, with a number for -1 where the size is one."""
    if node.args[0].meta["val"].is_contiguous():
        return node.args[1]
    sizes = zip(node.args[1], node.meta["val"].shape, strict=True)
    return [size if wanted == -1 and isinstance(size, int) else wanted for wanted, size in sizes]


def _copy(reader: Node) -> Node:
    """Insert a contiguous copy of the first argument in front of `reader`."""
    source = reader.args[0]
    with reader.graph.inserting_before(reader):
        copy = reader.graph.call_function(
            ATEN.clone.default, (source,), {"memory_format": torch.contiguous_format}
        )
    copy.meta = {**reader.meta, "val": source.meta["val"]}
    return copy


def _is_new(value: Any, reader: Node) -> bool:
    """True if `reader` alone reads `value`, a tensor that shares its memory with no other one."""
    if not isinstance(value, Node) or list(value.users) != [reader]:
        return False
    name = str(value.target)
    return name in NEW or (name in IN_PLACE and _is_new(value.args[0], value))
