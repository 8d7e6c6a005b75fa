"""Content of sizes.json: stored bits, information bits, bytes and kernels of each layer. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompress.encodings import encoding_of
from qcompress.graph.kernels import kernels
from qcompress.graph.tensors import stored_bytes
from qcompress.graph.view import read
from qcompress.models.plan import LayerPlan


def measure_sizes(
    file: Path, plan: tuple[LayerPlan, ...], raised: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Measure the bytes of each quantized layer (all that its encoding stores), of all initializers and of
    the file, and ask ONNX Runtime for the kernels of the layers. `raised`: per-layer counts of the scales
    that fold raised for int32 biases, from folded.json.
    """
    view = read(file, separated=True)
    stored = {
        name: stored_bytes(view.constants[name]) for name in view.constants.keys() - view.producers.keys()
    }
    layers = []
    for item in plan:
        if item.weights is None or item.layer.tied_to:
            continue
        parts = encoding_of(item.weights).initializers
        size = sum(stored.get(f"{item.name}.weight.{part}", 0) for part in parts)
        layers.append(
            {
                "name": item.name,
                "weights": item.layer.weights,
                "stored_bits": item.weights.stored_bits,
                "information_bits": item.weights.information_bits,
                "bytes": size,
                "raised_scales": raised.get(item.name, {}).get("scales", 0),
            }
        )
    data = file.with_name(file.name + ".data")
    total = sum(stored.values())
    floats = sum(item.layer.weights * 4 for item in plan if not item.layer.tied_to)
    return {
        "layers": layers,
        "initializer_bytes": total,
        "quantized_bytes": sum(layer["bytes"] for layer in layers),
        "file_bytes": file.stat().st_size + (data.stat().st_size if data.is_file() else 0),
        "float_layer_bytes": floats,
        "raised_scales": sum(counts["scales"] for counts in raised.values()),
        "kernels": kernels(file, plan),
    }
