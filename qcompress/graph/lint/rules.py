"""What TensorRT refuses, silently changes or runs slowly: the table of the linter's rules. No torch.

A rule may be stricter than TensorRT-RTX, which builds graphs that TensorRT's documents forbid. `evidence`
says where a rule comes from, and the tests hold the real parser and builder to it:

    parser     the ONNX parser refuses the graph
    builder    the parser takes it, the builder refuses it
    checker    onnx.checker refuses it, TensorRT-RTX takes it
    behaviour  TensorRT-RTX takes it and makes something else or something slow of it
    documents  TensorRT's documents forbid it, TensorRT-RTX takes it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from qcompress.graph.lint import activations, convolutions, soundness, weights
from qcompress.graph.lint.activations import Broken
from qcompress.graph.view import View
from qcompress.schema.targets import Target


@dataclass(frozen=True)
class Rule:
    """One thing that a graph must not do, or had better not."""

    id: str
    consequence: Literal["refused", "changed", "slow"]
    evidence: Literal["parser", "builder", "checker", "behaviour", "documents"]
    summary: str
    fix: str
    check: Callable[[View, Target], Iterator[Broken]]


RULES: tuple[Rule, ...] = (
    Rule(
        "graph-empty", "refused", "builder",
        "a graph has an output, and the file says which opset its operators are of",
        "export the model again",
        soundness.empty_graphs,
    ),
    Rule(
        "value-missing", "refused", "parser",
        "what a node reads is made by another one, or is an input or a constant",
        "export the model again; something has removed a node or a tensor and not its readers",
        soundness.missing_values,
    ),
    Rule(
        "value-twice", "refused", "parser",
        "every name of a graph is made once",
        "give the results of different nodes different names",
        soundness.repeated_values,
    ),
    Rule(
        "node-order", "refused", "parser",
        "nodes are sorted: what a node reads was made before, and nothing goes in circles",
        "sort the nodes; no loop can be written without Loop or Scan",
        soundness.unsorted_nodes,
    ),
    Rule(
        "tensor-data", "refused", "parser",
        "a stored tensor has as many values as its shape says",
        "copy the file and its data again, or export the model again",
        soundness.broken_tensors,
    ),
    Rule(
        "operator-unknown", "refused", "parser",
        "every operator exists in the opset of its graph",
        "export for an opset that has the operator",
        soundness.unknown_operators,
    ),
    Rule(
        "operator-operands", "refused", "parser",
        "every operator has the inputs and outputs that it needs",
        "export the model again",
        soundness.operands_out_of_number,
    ),
    Rule(
        "zero-point", "refused", "parser",
        "TensorRT quantizes symmetrically: every zero point is 0",
        "quantize symmetrically, to int8 in [-128, 127]",
        activations.zero_points,
    ),
    Rule(
        "zero-point-not-constant", "refused", "builder",
        "a zero point must be known when the engine is built",
        "store the zero point as an initializer, or leave it out",
        activations.moving_zero_points,
    ),
    Rule(
        "scale-not-constant", "refused", "documents",
        "a scale must be known when the engine is built",
        "make dynamic quantization static: calibrate, and store the scale as an initializer",
        activations.moving_scales,
    ),
    Rule(
        "scale-not-positive", "refused", "parser",
        "every scale is above 0; the parser of TensorRT-RTX 1.7 does not look at those of blocks",
        "give dead channels a small positive scale, and project learned scales to a floor; quantize 4-bit "
        "weights with nvidia-modelopt, where ONNX Runtime has made negative scales",
        activations.scales_not_positive,
    ),
    Rule(
        "scale-not-finite", "changed", "behaviour",
        "an infinite scale makes NaN of every value",
        "find the overflow: a scale beyond 65504 does not fit into fp16",
        activations.scales_not_finite,
    ),
    Rule(
        "scale-type", "refused", "parser",
        "a scale has the type of the float tensor it belongs to",
        "store the scale in the compute type of the graph",
        activations.scale_types,
    ),
    Rule(
        "scale-shape", "refused", "parser",
        "scales are one for the tensor, one for each index of the axis, or one for each block",
        "set `axis` and `block_size` to what the scales were made for",
        activations.scale_shapes,
    ),
    Rule(
        "uint8-activation", "changed", "behaviour",
        "TensorRT computes uint8 as int8: codes above 127 are clipped",
        "quantize to int8, also what is never negative",
        activations.unsigned_activations,
    ),
    Rule(
        "int32-bias", "refused", "parser",
        "TensorRT does not dequantize int32",
        "store the bias in float",
        activations.integer_biases,
    ),
    Rule(
        "integer-type", "refused", "parser",
        "of the integers TensorRT takes int8, and int4 for weights; ONNX Runtime takes int2 for weights too",
        "store the codes as int8 or int4; narrower codes fit into either",
        activations.other_integers,
    ),
    Rule(
        "activation-per-channel", "refused", "documents",
        "an activation has one scale for the whole tensor",
        "use one scale; move outlying channels into the weights (smoothquant, quadapter)",
        activations.per_channel_activations,
    ),
    Rule(
        "int4-activation", "refused", "documents",
        "int4 is a type of weights only",
        "quantize activations to int8",
        activations.int4_activations,
    ),
    Rule(
        "int4-opset", "refused", "checker",
        "int4 and blocks come with opset 21, int2 with opset 25",
        "export with that opset",
        weights.int4_opset,
    ),
    Rule(
        "int4-target", "refused", "builder",
        "the target has no int4",
        "store 4-bit codes as int8, or name a target from SM80 on",
        weights.int4_target,
    ),
    Rule(
        "block-remainder", "refused", "parser",
        "the axis divides into whole blocks; where the number of scales divides it, TensorRT takes blocks of "
        "another size than the graph says",
        "choose a block that divides the input features",
        weights.uneven_blocks,
    ),
    Rule(
        "block-size", "slow", "behaviour",
        "int4 kernels exist for blocks of 32, 64 and 128",
        "use blocks of 128 or 64",
        weights.odd_blocks,
    ),
    Rule(
        "int4-per-channel", "slow", "behaviour",
        "int4 without blocks is dequantized apart from the matmul",
        "use blocks of 128 or 64",
        weights.int4_channels,
    ),
    Rule(
        "int4-weight-int8-activation", "slow", "behaviour",
        "int4 weights are computed in float: quantizing the activation beside them costs time and accuracy",
        "keep the activation in float, or store 4-bit codes as int8 for an int8 matmul",
        weights.int4_products,
    ),
    Rule(
        "int4-blocks-int8-activation", "refused", "builder",
        "TensorRT-RTX 1.7 cannot multiply several int4 blocks with an int8 activation of rank 3",
        "keep the activation in float, or store 4-bit codes as int8 for an int8 matmul",
        weights.int4_block_products,
    ),
    Rule(
        "conv-int4", "refused", "builder",
        "a convolution's weight is int8: int4 is for matmuls alone",
        "store the codes as int8: `{bits: 4, container: int8}`",
        convolutions.int4_kernels,
    ),
    Rule(
        "conv-blocks", "refused", "parser",
        "a convolution's weight has a scale for each output channel, and no blocks",
        "drop `block`",
        convolutions.blocked_kernels,
    ),
    Rule(
        "conv-axis", "slow", "documents",
        "the scales of a convolution's weight are its output channels': no other axis can be scaled behind "
        "an integer sum",
        "quantize the weight of Conv along axis 0, of ConvTranspose along axis 1",
        convolutions.kernels_by_other_axes,
    ),
    Rule(
        "conv-float-input", "slow", "documents",
        "an int8 convolution needs an int8 input: TensorRT has weight-only kernels for matmuls alone",
        "quantize the input too, or keep the convolution float",
        convolutions.kernels_alone,
    ),
    Rule(
        "constant-reader", "refused", "builder",
        "a stored integer tensor is read by DequantizeLinear only",
        "put DequantizeLinear directly behind the tensor, and Gather or Transpose behind that; leave out a "
        "Clip of stored codes",
        activations.constant_readers,
    ),
    Rule(
        "weight-reader", "slow", "behaviour",
        "only matmuls, convolutions and Gather compute with an integer weight",
        "store this tensor in float",
        weights.weight_readers,
    ),
    Rule(
        "quantizer-alone", "refused", "parser",
        "what QuantizeLinear makes is read by DequantizeLinear: integer operators are not TensorRT's way",
        "write Q/DQ pairs in front of float operators",
        activations.lone_quantizers,
    ),
    Rule(
        "integer-operator", "refused", "parser",
        "TensorRT has no operators on codes, neither ONNX's nor ONNX Runtime's",
        "write Q/DQ pairs in front of float operators; ONNX Runtime's tools do with `QuantFormat.QDQ`",
        activations.integer_operators,
    ),
    Rule(
        "quantization-lost", "changed", "behaviour",
        "the file says that it is quantized, and its graph is float",
        "export again; an optimizer may have folded the DequantizeLinear nodes",
        activations.lost_quantization,
    ),
    Rule(
        "compute-type", "refused", "builder",
        "the target has no matmul of this float type",
        "export with `format.compute: fp16`, which every target computes in",
        activations.compute_types,
    ),
    Rule(
        "opset-new", "refused", "documents",
        "TensorRT 11 documents opsets up to 25",
        "export with opset 21",
        activations.new_opset,
    ),
    Rule(
        "opset-old", "slow", "documents",
        "before opset 21 there is neither int4 nor a scale for each block; older graphs run with int8 alone",
        "export with opset 21",
        activations.old_opset,
    ),
)  # fmt: skip
"""Every rule, in the order in which findings are shown."""
