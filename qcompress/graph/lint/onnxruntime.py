"""Linter checks for ONNX Runtime on a processor: Q/DQ pairs and stored codes that no integer kernel takes. No
torch.

Each statement was measured with ONNX Runtime 1.31 on x86-64 (`tests/graph/test_onnxruntime_rules.py`). There
it computes with uint8 activations, and converts an int8 Q/DQ pair only if the pair has one reader and a zero
point; on Arm processors it does not convert. TensorRT has none of these limits, so the rules apply to targets
without an engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from onnx import NodeProto, TensorProto

from qcompress.encodings.walk import (
    DEQUANTIZE,
    MOVES,
    QUANTIZE,
    Pair,
    attribute,
    is_a,
    operand,
    pair_of,
    result,
    same,
)
from qcompress.graph.lint.activations import MATMULS, Broken
from qcompress.graph.qdq import code_type, dequantizer_of, layer_name, node_name
from qcompress.graph.view import View
from qcompress.graph.weights import stored_weights
from qcompress.schema.targets import Target

BIAS, NO_ZERO_POINT, SHARED = "gemm-float-bias", "pair-no-zero-point", "pair-shared"
"""Rules whose reasons `obstacles` gives."""

BYTES = ("INT8", "UINT8")
"""Types of codes that integer kernels multiply."""


class Product(NamedTuple):
    """A matmul or convolution with a stored quantized weight."""

    node: NodeProto
    weight: NodeProto
    """DequantizeLinear of the weight."""
    activation: str
    """The other operand."""


def product_of(view: View, node: NodeProto) -> Product | None:
    """Weight and activation of a matmul or convolution; None without a stored quantized weight."""
    for index in (1, 0):
        weight = dequantizer_of(view, operand(node, index))
        if weight is not None and operand(weight, 0) in view.fixed:
            return Product(node, weight, operand(node, 1 - index))
    return None


def products(view: View) -> Iterator[Product]:
    """Matmuls and convolutions with a stored quantized weight, in the order of the nodes."""
    for node in view.named(*MATMULS):
        if (product := product_of(view, node)) is not None:
            yield product


# Why ONNX Runtime fuses no integer kernel ---------------------------------------------------------


def obstacles(view: View, product: Product) -> dict[str, str]:
    """Reasons why ONNX Runtime does not multiply the codes of a product, by rule or by a word for a reason
    without a rule. Empty if it multiplies them.
    """
    node, source = product.node, dequantizer_of(view, product.activation)
    if source is None or operand(source, 0) in view.fixed:
        return {"float input": _float_input(view, product)}
    pair, gemm = pair_of(view, source), gemm_of(view, node)
    reasons: dict[str, str] = {}
    if view.types.get(result(source)) != TensorProto.FLOAT:
        reasons["compute"] = f"the pair decodes to {view.label(result(source))}, and kernels take fp32 scales"
    for item, word in ((product.weight, "weight"), (source, "input")):
        if code_type(view, item) not in BYTES:
            kind = code_type(view, item).lower() or "unknown"
            reasons[word] = f"{kind} codes of the {word}, and kernels multiply codes of 8 bits"
    if pair is not None and pair.clip is not None:
        reasons["clip"] = "Clip between QuantizeLinear and DequantizeLinear"
    quantized = is_quantized(view, gemm.end)
    if node.op_type in ("Conv", "ConvTranspose") and not quantized:
        reasons["conv"] = f"no QuantizeLinear directly behind the convolution{_behind(view, result(node))}"
    if gemm.bias and not (quantized and not attribute(node, "transB", 0)):
        how = "" if node.op_type == "Gemm" else ": MatMul and Add of rank 2 become Gemm"
        reasons[BIAS] = f"Gemm with a float bias is not fused{how}"
    if pair is not None and code_type(view, source) == "INT8":
        # Gemm without a bias multiplies int8 inputs as they are, with the zero point of DequantizeLinear
        plain = node.op_type == "Gemm" and not gemm.bias and not quantized
        if not operand(pair.quantize, 2) and not (plain and operand(source, 2)):
            reasons[NO_ZERO_POINT] = "QuantizeLinear of the input has no zero point"
        readers = pair_readers(view, pair)
        if len(readers) > 1 and not plain:
            reasons[SHARED] = f"{len(readers)} nodes read one Q/DQ pair"
    return reasons


def _float_input(view: View, product: Product) -> str:
    """Describe a product with a float input, and why it is not MatMulNBits."""
    text, node = "the input is not quantized", product.node
    if node.op_type not in ("MatMul", "Gemm"):
        return text
    if is_quantized(view, gemm_of(view, node).end) or is_quantized(view, result(node)):
        return f"{text}, and QuantizeLinear directly behind the product keeps it from MatMulNBits"
    if len(view.readers.get(result(product.weight), ())) > 1:
        return f"{text}, and more than one node reads the decoded weight"
    return text


class Gemm(NamedTuple):
    """A product as ONNX Runtime fuses it with its bias."""

    bias: bool
    """True if it computes as Gemm with a float bias."""
    end: str
    """Output of the product and its bias."""


def gemm_of(view: View, node: NodeProto) -> Gemm:
    """Bias and output of a product. ONNX Runtime makes Gemm of a MatMul of rank 2 and the Add of a bias with
    one value per column, if nothing else reads the product.
    """
    if node.op_type == "Gemm":
        bias = operand(node, 2)
        return Gemm(bool(bias) and dequantizer_of(view, bias) is None, result(node))
    readers = view.readers.get(result(node), [])
    alone = len(readers) == 1 and result(node) not in view.outputs
    if node.op_type == "MatMul" and alone and is_a(readers[0], "Add") and _rank(view, node) == 2:
        others = [name for name in readers[0].input if name != result(node) and view.is_float(name)]
        shape = view.shape(others[0]) if others and others[0] in view.constants else None
        if shape and shape[-1] > 1 and math.prod(shape) == shape[-1]:
            return Gemm(True, result(readers[0]))
    return Gemm(False, result(node))


def _rank(view: View, node: NodeProto) -> int | None:
    """Rank of a matmul's activation, from the first known shape around it; None if unknown."""
    source = dequantizer_of(view, operand(node, 0))
    pair = pair_of(view, source)
    names = [result(node), operand(node, 0)]
    if pair is not None and result(pair.dequantize) == operand(node, 0):
        names += [operand(pair.dequantize, 0), operand(pair.quantize, 0)]
    return next((len(shape) for name in names if (shape := view.shape(name)) is not None), None)


def is_quantized(view: View, name: str) -> bool:
    """True if one QuantizeLinear reads a value and nothing else does."""
    readers = view.readers.get(name, [])
    return len(readers) == 1 and is_a(readers[0], QUANTIZE) and name not in view.outputs


def _behind(view: View, name: str) -> str:
    """Operators that read a value, for a message."""
    ops = dict.fromkeys(node.op_type for node in view.readers.get(name, []))
    return f" (it is read by {' and '.join(ops)})" if ops else ""


def pair_readers(view: View, pair: Pair) -> list[str]:
    """Nodes that read the decoded values of a pair, and graph outputs. Q/DQ nodes of one tensor with equal
    scales and one stored zero point are one pair: ONNX Runtime merges them.
    """
    readers: list[str] = []
    for node in view.readers.get(operand(pair.quantize, 0), []):
        if is_a(node, QUANTIZE) and _has_scale_of(view, node, pair.quantize):
            for user in view.readers.get(result(node), []):
                names = list(user.output) if is_a(user, DEQUANTIZE) else [result(node)]
                view.steps.take(len(names))
                for name in names:
                    nodes = view.readers.get(name, []) if is_a(user, DEQUANTIZE) else [user]
                    view.steps.take(len(nodes))
                    readers += [f"{reader.op_type} {node_name(reader)}" for reader in nodes]
                    readers += [f"the output {name}"] if name in view.outputs else []
    return list(dict.fromkeys(readers))


def _has_scale_of(view: View, node: NodeProto, other: NodeProto) -> bool:
    """True if two QuantizeLinear nodes have equal scales and the same zero point. ONNX Runtime stores equal
    floats once, but not equal integers.
    """
    if operand(node, 2) != operand(other, 2):
        return False
    scales = [view.values(operand(item, 1)) for item in (node, other)]
    equal = all(scale is not None and scale.size == 1 for scale in scales) and same(*scales)
    return equal or operand(node, 1) == operand(other, 1)


# Rules --------------------------------------------------------------------------------------------


def decoded_tables(view: View, target: Target) -> Iterator[Broken]:
    weights = () if target.backend is not None else stored_weights(view)
    for weight in weights:
        data = {operand(reader, 0) for reader in weight.readers() if is_a(reader, "Gather")}
        if weight.integers and any(dequantizer_of(view, name) is weight.node for name in data):
            size = math.prod(weight.shape) * (view.bits(result(weight.node)) or 32) // 8
            yield Broken(weight.name, f"{size:,} bytes decoded in each run")


def _reported(view: View, product: Product) -> set[str]:
    """Rules that a product breaks; none if it would be computed in float for another reason as well."""
    reasons = obstacles(view, product).keys()
    return set(reasons) if reasons <= {BIAS, NO_ZERO_POINT, SHARED} else set()


def shared_pairs(view: View, target: Target) -> Iterator[Broken]:
    """One violation per pair."""
    known: set[str] = set()
    for product in () if target.backend is not None else products(view):
        if SHARED in _reported(view, product):
            pair = pair_of(view, dequantizer_of(view, product.activation))
            readers = pair_readers(view, pair)
            if readers[0] not in known:
                known.add(readers[0])
                yield Broken(node_name(pair.quantize), f"read by {', '.join(readers)}")


def pairs_without_zero_point(view: View, target: Target) -> Iterator[Broken]:
    for product in () if target.backend is not None else products(view):
        if NO_ZERO_POINT in _reported(view, product):
            pair = pair_of(view, dequantizer_of(view, product.activation))
            reader = f"{product.node.op_type} {node_name(product.node)}"
            yield Broken(node_name(pair.quantize), f"int8 without a zero point, read by {reader}")


def float_biases(view: View, target: Target) -> Iterator[Broken]:
    for product in () if target.backend is not None else products(view):
        if BIAS in _reported(view, product):
            how = "" if product.node.op_type == "Gemm" else " of rank 2, Add"
            text = f"{product.node.op_type}{how} with a float bias at {node_name(product.node)}"
            yield Broken(layer_name(view, product.weight), text)


def lone_operands(view: View, target: Target) -> Iterator[Broken]:
    """Products of an integer and a float operand that ONNX Runtime computes in float."""
    for node in () if target.backend is not None else view.named(*MATMULS):
        product, source = product_of(view, node), dequantizer_of(view, operand(node, 0))
        name, kind = operand(node, 1), f"{node.op_type} {node_name(node)}"
        if product is not None:
            alone = dequantizer_of(view, product.activation) is None and node.op_type in ("MatMul", "Gemm")
            if alone and is_quantized(view, gemm_of(view, node).end):
                text = f"integer weight, float input, QuantizeLinear directly behind {kind}"
                yield Broken(layer_name(view, product.weight), text)
            continue
        # ONNX Runtime quantizes the weight of Conv and Gemm itself if QuantizeLinear follows
        fused = node.op_type != "MatMul" and is_quantized(view, result(node))
        if pair_of(view, source) is not None and not fused and _is_stored(view, name) and view.is_float(name):
            yield Broken(view.root(name), f"float weight, {code_type(view, source).lower()} input of {kind}")


def _is_stored(view: View, name: str) -> bool:
    """True for a stored tensor, or one that a Transpose or Reshape moves."""
    maker = view.producers.get(name)
    return name in view.constants or (is_a(maker, *MOVES) and operand(maker, 0) in view.constants)
