"""Size limit of an engine with quantized weights. No torch.

TensorRT stores a tensor once per node that uses it, so a table shared by an embedding and a head counts
twice. It adds kernels and tables: about 10 MB for a transformer, 27 MB for a detector of 83 convolutions. An
engine above the limit is searched for float copies of the weights (`plan_content.py`). It is refused if the
copies exceed the limit; otherwise a warning gives its size. The check is effective from about 50 MB of
weights on; small engines pass.
"""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto

from qcompress.engine.plan_content import float_copies
from qcompress.errors import ExportError
from qcompress.graph.qdq import code_type, result
from qcompress.graph.tensors import bytes_as, type_word
from qcompress.graph.view import DEQUANTIZE, QUANTIZE, View, operand, read
from qcompress.graph.weights import stored_weights

PERCENT = 110
"""Limit in percent of the predicted bytes."""

CONSTANT = 12 * 2**20
"""Bytes added to the limit for kernels and tables."""

LEAN_RUNTIME = 64 * 2**20
"""Bytes added to the limit for the lean runtime in a version-compatible plan; an estimate, not measured."""

WIDE = "INT32"
"""Type in which an engine stores codebook indices, for every type in the file: the input type of Gather."""


def predicted_bytes(file: Path | View) -> int:
    """Predict the bytes that an engine stores: the file's tensors, each once per node that uses it."""
    view = file if isinstance(file, View) else read(file)
    wide = {weight.name for weight in stored_weights(view) if weight.indices}
    return sum(
        bytes_as(tensor, WIDE if name in wide else _engine_type(view, name, tensor)) * _uses(view, name)
        for name, tensor in view.constants.items()
    )


def _engine_type(view: View, name: str, tensor: TensorProto) -> str:
    """Element type in the engine; a float tensor that only QuantizeLinear reads is stored as codes."""
    kinds = {
        code_type(view, node) if node.op_type == QUANTIZE and operand(node, 0) == name else ""
        for node in view.readers.get(name, [])
    }
    return kinds.pop() if len(kinds) == 1 and kinds != {""} else type_word(tensor.data_type)


def _uses(view: View, name: str) -> int:
    """Number of nodes that compute with a tensor, directly or behind its Q/DQ nodes; at least 1."""
    names, users = {name}, view.readers.get(name, [])
    for op in (QUANTIZE, DEQUANTIZE):
        coders = {
            id(node): result(node) for node in users if node.op_type == op and operand(node, 0) in names
        }
        names |= set(coders.values())
        users = [
            user
            for node in users
            for user in (view.readers.get(result(node), [node]) if id(node) in coders else [node])
        ]
    return max(len(users), 1)


def limit_bytes(predicted: int, *, lean_runtime: bool = False) -> int:
    """Size limit above which an engine is searched for float weights; `lean_runtime`: the plan is
    version-compatible and contains a runtime.
    """
    return predicted * PERCENT // 100 + CONSTANT + (LEAN_RUNTIME if lean_runtime else 0)


def check_plan(plan: Path, predicted: int, view: View, *, lean_runtime: bool = False) -> tuple[int, str]:
    """Return the bytes of an engine of the graph `view`, and a warning if they are above the limit, else "".

    Raises ExportError if the engine contains float copies of quantized weights that alone exceed the limit.
    """
    size, limit = plan.stat().st_size, limit_bytes(predicted, lean_runtime=lean_runtime)
    if size <= limit:
        return size, ""
    copies = float_copies(plan, view)
    text = f"{plan.name} has {size:,} bytes where the integer weights predict {predicted:,} (limit {limit:,})"
    floats = f"{len(copies)} quantized weights lie in it as floats, {sum(copies.values()):,} bytes more"
    if predicted + sum(copies.values()) > limit:
        largest = max(copies, key=copies.__getitem__)
        raise ExportError(
            f"{text}: the engine holds float weights; {floats}, {largest} the largest",
            fix="run `qcompress lint` on the model; find weights whose DequantizeLinear feeds no matmul",
        )
    if copies:
        return size, f"{text}; {floats}; the rest is not weights"
    return size, f"{text}; no float copy of a quantized weight is in it: kernels and tables take the rest"
