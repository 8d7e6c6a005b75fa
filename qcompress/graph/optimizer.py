"""The exporter's graph optimizer, with what the model stores kept apart.

`torch.onnx.export(optimize=True)` ends with a pass that stores equal tensors of at most 1,024 elements once,
and one that merges equal nodes. Two small layers with equal weights become one there: one name, one decoder,
even one matmul. These are its passes in its order, but for tensors that the folded model stores by name:
codes, scales of weights, tables, biases and norms keep an initializer each. Constants of the exporter and
scales of activations are still shared, and with them the Q/DQ pair in front of several readers.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import onnx_fusions

ROUNDS = 2
"""How often constants are folded and patterns rewritten, as in `onnxscript.optimizer.optimize_ir`."""


def optimize(model: ir.Model, is_stored: Callable[[str], bool]) -> None:
    """Optimize in place; initializers whose name `is_stored` stay apart."""
    common.InlinePass()(model)
    for _ in range(ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    _share_constants(model, is_stored)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)
    onnx_fusions.fuse(model)


def _share_constants(model: ir.Model, is_stored: Callable[[str], bool]) -> None:
    """Store equal tensors once, in the order of the initializers, but for those that are stored by name."""
    initializers = model.graph.initializers
    order = list(initializers)
    apart = {name: initializers.pop(name) for name in order if is_stored(name)}
    common.DeduplicateInitializersPass()(model)
    shared = dict(initializers)
    initializers.clear()
    initializers.update({name: (apart | shared)[name] for name in order if name in apart or name in shared})
