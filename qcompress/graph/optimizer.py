"""The exporter's graph optimizer, without merging the stored tensors of the model.

`torch.onnx.export(optimize=True)` ends with a pass that merges equal tensors of at most 1,024 elements, and a
pass that merges equal nodes. These would merge two small layers with equal weights: their names, decoders and
even matmuls. This module runs the passes in the exporter's order, but tensors that the folded model stores by
name (codes, weight scales, tables, biases, norms) keep separate initializers. Constants and activation scales
are still merged, and so is the Q/DQ pair in front of several readers.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import onnx_fusions

ROUNDS = 2
"""Number of rounds of constant folding and rewriting, as in `onnxscript.optimizer.optimize_ir`."""


def optimize(model: ir.Model, is_stored: Callable[[str], bool]) -> None:
    """Optimize a model in place; initializers for which `is_stored(name)` is True are not merged."""
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
    """Merge equal initializers except stored ones; the order of the initializers is kept."""
    initializers = model.graph.initializers
    order = list(initializers)
    apart = {name: initializers.pop(name) for name in order if is_stored(name)}
    common.DeduplicateInitializersPass()(model)
    shared = dict(initializers)
    initializers.clear()
    initializers.update({name: (apart | shared)[name] for name in order if name in apart or name in shared})
