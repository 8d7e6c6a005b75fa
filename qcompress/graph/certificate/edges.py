"""The matmuls of a layer in the view of a graph, and the Q/DQ pairs that quantize their inputs. No torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from onnx import NodeProto

from qcompress.encodings.walk import (
    DEQUANTIZE,
    Pair,
    matmuls,
    operand,
    pair_of,
    readers_of,
    result,
    same,
    zero_is_zero,
)
from qcompress.graph.view import View
from qcompress.models.plan import LayerPlan, sharers


class Use(NamedTuple):
    """Position of a layer among the `count` layers that share its weight. Their matmuls have the same order
    in the graph as the layers in the plan.
    """

    place: int = 0
    count: int = 1


def uses_of(plan: tuple[LayerPlan, ...]) -> dict[str, Use]:
    """Map each layer with a matmul to its Use, by layer name."""
    groups = sharers(plan).values()
    return {name: Use(place, len(names)) for names in groups for place, name in enumerate(names)}


def own_matmuls(view: View, sources: list[str], use: Use) -> list[tuple[NodeProto, str]]:
    """Return the matmul of a layer among those that read its decoded weight (`sources`), with the name of the
    weight input. Returns all of them if their number differs from `use.count`, and for a layer that shares no
    weight: one for each of its calls.
    """
    pairs = [pair for source in sources for pair in matmuls(view, source)]
    pairs.sort(key=lambda pair: view.places[id(pair[0])])
    return pairs[use.place : use.place + 1] if len(pairs) == use.count else pairs


def input_pairs(view: View, sources: list[str], tensors: Any, item: LayerPlan, use: Use) -> tuple[int, bool]:
    """Count the Q/DQ pairs on the input of a layer's matmul, and compare their scales, zero points and bounds
    with the folded ones (True if equal). `sources`: values that hold the decoded weight.
    """
    if item.layer.kind == "embedding":
        return 0, True
    pairs, equal = 0, True
    for matmul, own in own_matmuls(view, sources, use):
        other = next((name for name in matmul.input[:2] if name != own), None)
        pair = pair_of(view, view.producers.get(other or ""))
        if pair is None:
            continue
        pairs += 1
        if item.activations:
            reference = tensors.get_tensor(f"{item.name}.input.scale")
            bounds = item.activations.bounds
            equal &= not differences(view, pair, reference, bounds, item.layer.nonnegative)
    return pairs, equal


def verdict(
    view: View, sources: list[str], tensors: Any, item: LayerPlan, use: Use, codes_equal: bool,
    scales_equal: bool, reasons: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Certificate entry of a layer and its input; `sources`: values that hold the decoded weight."""
    pairs, input_equal = input_pairs(view, sources, tensors, item, use)
    expected = item.layer.calls if item.activations else 0
    if pairs != expected:
        reasons.append(f"{pairs} Q/DQ pairs in front of the matmul, {expected} expected")
    if not input_equal:
        reasons.append("the input's scale, zero point or bounds differ")
    return {
        "name": item.name,
        "weight_codes_equal": codes_equal,
        "scales_equal": scales_equal and input_equal,
        "qdq_pairs": pairs,
        "expected_pairs": expected,
        "passed": not reasons,
        "reasons": reasons,
    }


def differences(
    view: View, pair: Pair, scale: np.ndarray, bounds: tuple[int, int], nonnegative: bool = False
) -> list[str]:
    """Describe how the Q/DQ pair of an activation differs from the folded scale and bounds. The codes of an
    activation that is never negative may be limited at 0, in place of the Relu in front of the pair. Codes of
    8 bits may be uint8 with zero point 128.
    """
    known = [bounds, (0, bounds[1])] if nonnegative else [bounds]
    reasons = (
        []
        if any(_bounds_fit(view, pair.clip, ends) for ends in known)
        else ["the bounds of its codes differ"]
    )
    for node in (pair.quantize, pair.dequantize):
        stored = view.initializer(operand(node, 1))
        if stored is None or not same(stored, scale.astype(stored.dtype)):
            reasons.append(f"{node.op_type}: the scale differs")
        if not (zero_is_zero(view, node) or (pair.clip is None and is_shifted(view, pair))):
            reasons.append(f"{node.op_type}: the zero point is not 0")
    return reasons


def zero_point(view: View, codes: str | None) -> int:
    """Zero point of an activation's codes; 0 without one."""
    decoders = readers_of(view, codes, DEQUANTIZE) if codes else []
    zero = view.initializer(operand(decoders[0], 2)) if decoders else None
    return 0 if zero is None else int(zero.item())


def padding(view: View, value: str, codes: str | None) -> tuple[int, ...]:
    """`pads` of the convolution that reads an activation, its codes decoded if it has some; empty without a
    convolution.
    """
    read = [result(node) for node in readers_of(view, codes, DEQUANTIZE)] if codes else [value]
    convs = [conv for name in read for conv in readers_of(view, name, "Conv")]
    pads = [tuple(item.ints) for conv in convs for item in conv.attribute if item.name == "pads"]
    return pads[0] if pads else ()


def is_shifted(view: View, pair: Pair) -> bool:
    """True if both nodes of a pair have the zero point 128 of type uint8."""
    zeros = [view.initializer(operand(node, 2)) for node in (pair.quantize, pair.dequantize)]
    return all(zero is not None and same(zero, np.array(128, np.uint8)) for zero in zeros)


def _bounds_fit(view: View, clip: NodeProto | None, bounds: tuple[int, int]) -> bool:
    """True if codes are limited to `bounds`; the int8 bounds need no Clip."""
    if clip is None:
        return bounds == (-128, 127)
    ends = [view.initializer(operand(clip, index)) for index in (1, 2)]
    known = all(end is not None and end.size == 1 for end in ends)
    return known and tuple(int(end.item()) for end in ends) == bounds
