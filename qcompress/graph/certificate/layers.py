"""The certificate of layers: weights in the ONNX file against the folded model, bit for bit. No torch.

Checks for each quantized layer the codes, the scales, axis and block of the DequantizeLinear node, and the
number of Q/DQ pairs in front of the matmul, by following the graph's edges and not by node names. Parity
cannot detect a weight that the exporter decoded to floats; the certificate does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from safetensors import safe_open

from qcompress.encodings import encoding_of
from qcompress.graph.certificate.edges import FLOATS, Graph, Use, input_pair, own_matmuls, uses_of, verdict
from qcompress.models.plan import LayerPlan


def certify(file: Path, folded: Path, plan: tuple[LayerPlan, ...]) -> dict[str, Any]:
    """Compare an ONNX file with folded.safetensors in `folded`. `complete` is True only if every layer passed
    and the file has no float copy of a quantized weight.
    """
    graph, uses = Graph.read(file), uses_of(plan)
    with safe_open(folded / "folded.safetensors", framework="np") as tensors:
        layers = [_certify(graph, tensors, item, uses.get(item.name, Use())) for item in plan if item.weights]
        copies = _float_copies(graph, plan)
    expected = sum(1 for item in plan if item.weights)
    complete = len(layers) == expected and all(layer["passed"] for layer in layers) and not copies
    return {"layers": layers, "float_copies": copies, "expected": expected, "complete": complete}


def _certify(graph: Graph, tensors: Any, item: LayerPlan, use: Use) -> dict[str, Any]:
    """Certify one layer: its weight through the encoding, and the Q/DQ pair of its input."""
    weight = encoding_of(item.weights).certify(graph, tensors, item)
    equal = weight.codes_equal, weight.scales_equal
    return verdict(graph, weight.sources, tensors, item, use, *equal, weight.reasons)


def matmul_inputs(graph: Graph, plan: tuple[LayerPlan, ...]) -> dict[str, tuple[str, str | None]]:
    """Map each layer to the names of its matmul's float input and of that input's codes (None: not
    quantized).

    The order is that of the graph's nodes, which is topological. Layers whose weight is not read by a matmul
    are left out.
    """
    uses = uses_of(plan)
    inputs: dict[str, tuple[str, str | None]] = {}
    places: dict[str, int] = {}
    for item in plan:
        if item.layer.kind == "embedding":
            continue
        owner = item.layer.tied_to or item.name
        rounded = item.weights is not None
        sources = encoding_of(item.weights).sources(graph, owner) if rounded else [f"{owner}.weight"]
        for matmul, own in own_matmuls(graph, sources, uses[item.name]):
            value = next(name for name in matmul.input[:2] if name != own)
            pair = input_pair(graph, value)
            inputs[item.name] = (pair.quantize.input[0], pair.dequantize.input[0]) if pair else (value, None)
            places[item.name] = graph.order[matmul.output[0]]
    return {name: inputs[name] for name in sorted(inputs, key=places.__getitem__)}


def with_outputs(file: Path, names: list[str]) -> bytes:
    """Serialize the graph with `names` as further outputs of inferred types. External data is not loaded."""
    model = onnx.load(str(file), load_external_data=False)
    known = {info.name for info in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return model.SerializeToString()


def _float_copies(graph: Graph, plan: tuple[LayerPlan, ...]) -> list[str]:
    """Float initializers with the shape of a quantized weight: decoded copies or unquantized weights."""
    shapes = {item.layer.shape for item in plan if item.weights}
    kept = {item.layer.shape for item in plan if not item.weights}
    shapes = {*shapes, *(shape[::-1] for shape in shapes)} - kept - {shape[::-1] for shape in kept}
    return sorted(
        name
        for name, tensor in graph.initializers.items()
        if tensor.data_type in FLOATS and tuple(tensor.dims) in shapes and not _is_scale(graph, name)
    )


def _is_scale(graph: Graph, name: str) -> bool:
    """True if only Q/DQ nodes read a tensor, as a scale; block scales [in // block, out] may have a weight's
    shape.
    """
    readers = graph.readers.get(name, [])
    return bool(readers) and all(
        node.op_type in ("QuantizeLinear", "DequantizeLinear") and list(node.input).index(name) == 1
        for node in readers
    )
