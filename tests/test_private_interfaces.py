"""Names that other packages keep to themselves: the few that are used, each in one module.

A private name may change with any version. Each entry says why nothing public serves, and the version with
which it was checked; the module that uses it is the only one.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch
from torch import nn

import qcompress
from qcompress.quant.batchnorm import BATCH_NORMS

PACKAGE = Path(qcompress.__file__).parent

ALLOWED = {
    "models/attention.py: model.config._attn_implementation": "transformers 5.23 has no public reader",
    "quant/layers.py: tensor._version": "torch 2.13 has no public count of changes in place",
    "system/accelerate_state.py: kind._shared_state": "accelerate 1.15 has no public way to save its state",
    "graph/ort_errors.py: onnxruntime.capi.onnxruntime_pybind11_state": "ONNX Runtime 1.31 exports none",
    **dict.fromkeys(
        [
            f"pipeline/single_trace.py: {name}"
            for name in ("torch.ops", "torch.ops.aten", "ATEN._to_copy", "ATEN._unsafe_view")
        ],
        "torch 2.13 has no public names of the operators in a graph of torch.export",
    ),
}
"""Module and expression -> reason."""

DOCUMENTED = {"_exit", "_replace", "_fields"}
"""Public in spite of their names: of os, of named tuples, of ast's nodes."""

PRIVATE = re.compile(r"(^|\.)_(?!_)\w")
FOREIGN = re.compile(r"^(torch\.(_|ops)|onnxruntime\.capi|.*\._(?!_))")


def private_names(source: str) -> set[str]:
    """Private imports, and expressions with a private name that the module does not define."""
    tree = ast.parse(source)
    own = DOCUMENTED | {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    own |= {node.attr for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}  # fmt: skip
    own |= {node.target.id for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}  # fmt: skip
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.module.startswith(("qcompress", "__future__")):
            names |= {node.module} if FOREIGN.match(node.module) else set()
            names |= {f"{node.module}.{alias.name}" for alias in node.names if PRIVATE.match(alias.name)}
            names |= {f"{node.module}.{alias.name}" for alias in node.names if "pybind11_state" in alias.name}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if FOREIGN.match(alias.name)}
        if isinstance(node, ast.Attribute):
            spelled = ast.unparse(node)
            if (
                PRIVATE.match(node.attr)
                and node.attr not in own
                and not spelled.startswith(("self.", "cls."))
            ):
                names.add(spelled)
            if spelled.startswith("torch.ops"):
                names.add(spelled)
    return names


def test_private_names_of_other_packages_are_used_in_one_place_each() -> None:
    used = {
        f"{file.relative_to(PACKAGE).as_posix()}: {name}"
        for file in PACKAGE.rglob("*.py")
        for name in private_names(file.read_text(encoding="utf-8"))
    }
    assert used == set(ALLOWED)


def test_the_reader_finds_what_was_used_before() -> None:
    assert private_names(
        "from accelerate.state import AcceleratorState\n"
        "from torch.nn.modules.batchnorm import _BatchNorm\n"
        "from onnxruntime.capi import onnxruntime_pybind11_state as native\n"
        "import torch._inductor\n"
        "AcceleratorState._reset_state()\n"
        "nn.modules.batchnorm._NormBase\n"
        "torch.ops.aten.hardtanh_backward(x)\n"
        "wordpiece._tokenizer\n"
        "self._own, cls._own, item.__dict__\n"
    ) >= {
        "torch.nn.modules.batchnorm._BatchNorm", "onnxruntime.capi", "torch._inductor",
        "AcceleratorState._reset_state", "nn.modules.batchnorm._NormBase",
        "torch.ops.aten.hardtanh_backward", "wordpiece._tokenizer",
    }  # fmt: skip
    assert private_names("self._own, item.__dict__, item.name") == set()


def test_batch_norms_are_all_public_classes_of_torch_that_keep_statistics() -> None:
    """Lazy ones become one of these when they see their first input."""
    public = {
        kind
        for kind in vars(nn).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and "running_mean" in norm_buffers(kind)
    }
    assert {kind for kind in public if "Lazy" not in kind.__name__} == set(BATCH_NORMS)


def norm_buffers(kind: type[nn.Module]) -> set[str]:
    """Names of a norm's buffers; empty for other modules."""
    if "Norm" not in kind.__name__ or kind.__name__ in ("GroupNorm", "LocalResponseNorm"):
        return set()
    return {name for name, _ in kind(4, track_running_stats=True).named_buffers()} if takes(kind) else set()


def takes(kind: type[nn.Module]) -> bool:
    """True for a constructor with `track_running_stats`."""
    return "track_running_stats" in kind.__init__.__code__.co_varnames


def test_a_change_in_place_is_counted_by_torch() -> None:
    """`QuantizedWeight` keeps a rounded weight while no version changes; `forget` serves fused optimizers."""
    tensor = nn.Parameter(torch.zeros(3))
    before = tensor._version
    with torch.no_grad():
        tensor.add_(1)
        assert tensor._version == before + 1, torch.__version__
        tensor.copy_(torch.ones(3))
    assert tensor._version == before + 2, torch.__version__
