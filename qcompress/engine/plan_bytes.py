"""How many bytes an engine of quantized weights may have. No torch.

TensorRT stores a tensor once for each node that uses it, so a table shared by an embedding and a head counts
twice, and adds kernels and tables: some 10 MB for a transformer, 27 MB for a detector of 83 convolutions. An
engine beyond the limit is searched for float copies of the weights (`plan_content.py`). It is refused where
they break the limit, and told of where the size has another cause. Small engines pass: the check says
something from some 50 MB of weights on.
"""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto

from qcompress.engine.plan_content import float_copies
from qcompress.errors import ExportError
from qcompress.graph.codebooks import lookups
from qcompress.graph.qdq import code_type
from qcompress.graph.tensors import bytes_as, type_word
from qcompress.graph.view import DEQUANTIZE, QUANTIZE, View, operand, read, result

PERCENT = 110
CONSTANT = 12 * 2**20
LEAN_RUNTIME = 64 * 2**20
"""Room for what a version-compatible plan carries; nowhere measured yet."""

WIDE = "INT32"
"""How an engine stores indices into a codebook, whatever the file does: as its Gather takes them."""


def predicted_bytes(file: Path | View) -> int:
    """Bytes of a file's tensors, each as often as nodes use it: what its engine stores."""
    view = file if isinstance(file, View) else read(file)
    wide = {book.indices for book in lookups(view).values()}
    return sum(
        bytes_as(tensor, WIDE if name in wide else _engine_type(view, name, tensor)) * _uses(view, name)
        for name, tensor in view.constants.items()
    )


def _engine_type(view: View, name: str, tensor: TensorProto) -> str:
    """The builder rounds a float weight that nothing but QuantizeLinear reads, and stores its codes."""
    kinds = {
        code_type(view, node) if node.op_type == QUANTIZE and operand(node, 0) == name else ""
        for node in view.readers.get(name, [])
    }
    return kinds.pop() if len(kinds) == 1 and kinds != {""} else type_word(tensor.data_type)


def _uses(view: View, name: str) -> int:
    """Nodes that compute with a tensor; one behind its Q/DQ nodes counts for itself."""
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
    """Largest engine for so many predicted bytes that is not searched for float weights; a version-compatible
    one carries a runtime.
    """
    return predicted * PERCENT // 100 + CONSTANT + (LEAN_RUNTIME if lean_runtime else 0)


def check_plan(plan: Path, predicted: int, view: View, *, lean_runtime: bool = False) -> tuple[int, str]:
    """Bytes of an engine of the graph `view`, and a warning where they are beyond the limit, or no text.

    Raises ExportError where float copies of the quantized weights lie in the engine and are alone enough to
    break the limit.
    """
    size, limit = plan.stat().st_size, limit_bytes(predicted, lean_runtime=lean_runtime)
    if size <= limit:
        return size, ""
    copies = float_copies(plan, view)
    said = f"{plan.name} has {size:,} bytes where the integer weights predict {predicted:,} (limit {limit:,})"
    held = f"{len(copies)} quantized weights lie in it as floats, {sum(copies.values()):,} bytes more"
    if predicted + sum(copies.values()) > limit:
        largest = max(copies, key=copies.__getitem__)
        raise ExportError(
            f"{said}: the engine holds float weights; {held}, {largest} the largest",
            fix="run `qcompress lint` on the model; look for weights whose DequantizeLinear feeds no matmul",
        )
    if copies:
        return size, f"{said}; {held}; the rest is not weights"
    return size, f"{said}; no float copy of a quantized weight is in it: kernels and tables take the rest"
