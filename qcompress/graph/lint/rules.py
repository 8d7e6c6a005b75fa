"""Table of the linter's rules: graphs that TensorRT refuses, silently changes or runs slowly, and graphs that
ONNX Runtime runs slowly. No torch.

A rule may be stricter than TensorRT-RTX, which builds some graphs that TensorRT's documents forbid.
`evidence` is the source of a rule; the tests check it with the real parser and builder:

    parser     the ONNX parser refuses the graph
    builder    the parser accepts the graph, the builder refuses it
    checker    onnx.checker refuses the graph, TensorRT-RTX accepts it
    behaviour  TensorRT-RTX builds an engine that is slow or computes other results
    documents  TensorRT's documents forbid the graph, TensorRT-RTX accepts it
    runtime    ONNX Runtime 1.31 computes in float; checked with its optimized graph, for targets without an
               engine
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from qcompress.graph.lint import activations, convolutions, onnxruntime, soundness, weights
from qcompress.graph.lint.activations import Broken
from qcompress.graph.view import View
from qcompress.schema.targets import Target


@dataclass(frozen=True)
class Rule:
    """One rule of the linter; `check` yields its violations."""

    id: str
    consequence: Literal["refused", "changed", "slow"]
    evidence: Literal["parser", "builder", "checker", "behaviour", "documents", "runtime"]
    summary: str
    fix: str
    check: Callable[[View, Target], Iterator[Broken]]


RULES: tuple[Rule, ...] = (
    Rule(
        "graph-empty", "refused", "builder",
        "a graph has an output, and the file declares the opset of its operators",
        "export the model again",
        soundness.empty_graphs,
    ),
    Rule(
        "value-missing", "refused", "parser",
        "a node reads only graph inputs, constants and outputs of other nodes",
        soundness.STRUCTURE[soundness.missing_values],
        soundness.missing_values,
    ),
    Rule(
        "value-twice", "refused", "parser",
        "a graph produces every name once",
        soundness.STRUCTURE[soundness.repeated_values],
        soundness.repeated_values,
    ),
    Rule(
        "node-order", "refused", "parser",
        "nodes are sorted topologically, without cycles",
        soundness.STRUCTURE[soundness.unsorted_nodes],
        soundness.unsorted_nodes,
    ),
    Rule(
        "tensor-data", "refused", "parser",
        "the data of a stored tensor fit its shape",
        soundness.STRUCTURE[soundness.broken_tensors],
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
        "every operator has its required inputs and outputs",
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
        "a zero point is constant, so that the engine can be built",
        "store the zero point as an initializer, or leave it out",
        activations.moving_zero_points,
    ),
    Rule(
        "scale-not-constant", "refused", "documents",
        "a scale is constant, so that the engine can be built",
        "make dynamic quantization static: calibrate, and store the scale as an initializer",
        activations.moving_scales,
    ),
    Rule(
        "scale-not-positive", "refused", "parser",
        "every scale is above 0; the parser of TensorRT-RTX 1.7 does not check block scales",
        "give dead channels a small positive scale, and limit learned scales from below; if ONNX Runtime's "
        "4-bit quantizer wrote negative scales, quantize with nvidia-modelopt",
        activations.scales_not_positive,
    ),
    Rule(
        "scale-not-finite", "changed", "behaviour",
        "an infinite scale turns every value into NaN",
        "find the overflow: a scale beyond 65504 does not fit into fp16",
        activations.scales_not_finite,
    ),
    Rule(
        "scale-type", "refused", "parser",
        "a scale has the type of its float tensor",
        "store the scale in the compute type of the graph",
        activations.scale_types,
    ),
    Rule(
        "scale-shape", "refused", "parser",
        "there is one scale per tensor, per index of the axis, or per block",
        "set `axis` and `block_size` to those with which the scales were computed",
        activations.scale_shapes,
    ),
    Rule(
        "uint8-activation", "changed", "behaviour",
        "TensorRT computes uint8 as int8: codes above 127 are clipped",
        "quantize to int8, also activations that are never negative",
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
        "TensorRT supports int8, and int4 for weights; ONNX Runtime also supports int2 for weights",
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
        "int4 is for weights only",
        "quantize activations to int8",
        activations.int4_activations,
    ),
    Rule(
        "int4-opset", "refused", "checker",
        "int4 and blocks need opset 21, int2 needs opset 25",
        "export with that opset",
        weights.int4_opset,
    ),
    Rule(
        "int4-target", "refused", "builder",
        "the target does not support int4",
        "store 4-bit codes as int8, or choose a target with SM80 or newer",
        weights.int4_target,
    ),
    Rule(
        "block-remainder", "refused", "parser",
        "the block size divides the axis; otherwise TensorRT may derive another block size from the number "
        "of scales",
        "choose a block size that divides the input features",
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
        "int4 without blocks is dequantized in a separate kernel before the matmul",
        "use blocks of 128 or 64",
        weights.int4_channels,
    ),
    Rule(
        "int4-weight-int8-activation", "slow", "behaviour",
        "matmuls of int4 weights run in float: quantizing their activation costs time and accuracy",
        "keep the activation in float, or store 4-bit codes as int8 for an int8 matmul",
        weights.int4_products,
    ),
    Rule(
        "int4-blocks-int8-activation", "refused", "builder",
        "TensorRT-RTX 1.7 cannot multiply several int4 blocks by an int8 activation of rank 3",
        "keep the activation in float, or store 4-bit codes as int8 for an int8 matmul",
        weights.int4_block_products,
    ),
    Rule(
        "conv-int4", "refused", "builder",
        "a convolution's weight is int8: int4 is for matmuls only",
        "store the codes as int8: `{bits: 4, container: int8}`",
        convolutions.int4_kernels,
    ),
    Rule(
        "conv-blocks", "refused", "parser",
        "a convolution's weight has one scale per output channel, without blocks",
        "drop `block`",
        convolutions.blocked_kernels,
    ),
    Rule(
        "conv-axis", "slow", "documents",
        "the scales of a convolution's weight lie along its output channels: an integer sum cannot be scaled "
        "along another axis",
        "quantize the weight of Conv along axis 0, of ConvTranspose along axis 1",
        convolutions.kernels_by_other_axes,
    ),
    Rule(
        "conv-float-input", "slow", "documents",
        "an int8 convolution needs an int8 input: TensorRT has weight-only kernels for matmuls only",
        "quantize the input too, or keep the convolution float",
        convolutions.kernels_alone,
    ),
    Rule(
        "constant-reader", "refused", "builder",
        "a stored integer tensor is read by DequantizeLinear only",
        "put DequantizeLinear directly behind the tensor, then Gather or Transpose; remove a Clip of stored "
        "codes; a graph for target cpu: export again with this device as `build.target`",
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
        "only DequantizeLinear reads the output of QuantizeLinear: TensorRT has no integer operators",
        "write Q/DQ pairs in front of float operators",
        activations.lone_quantizers,
    ),
    Rule(
        "integer-operator", "refused", "parser",
        "TensorRT does not support the integer operators of ONNX and ONNX Runtime",
        "write Q/DQ pairs in front of float operators; in ONNX Runtime's tools set `QuantFormat.QDQ`",
        activations.integer_operators,
    ),
    Rule(
        "quantization-lost", "changed", "behaviour",
        "a file whose metadata names integer formats has Q/DQ nodes",
        "export again; an optimizer may have folded the DequantizeLinear nodes",
        activations.lost_quantization,
    ),
    Rule(
        "compute-type", "refused", "builder",
        "the target supports the float type of the matmuls",
        "export with `format.compute: fp16`, which every target supports",
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
        "before opset 21 there is neither int4 nor block scales; older graphs run with int8 only",
        "export with opset 21",
        activations.old_opset,
    ),
    Rule(
        "table-decoded", "slow", "runtime",
        "ONNX Runtime decodes the whole table in each run if DequantizeLinear lies in front of Gather",
        "look up rows of the int8 codes and of their scales with Gather, and put DequantizeLinear behind it; "
        "an int4 table needs GatherBlockQuantized",
        onnxruntime.decoded_tables,
    ),
    Rule(
        onnxruntime.SHARED, "slow", "runtime",
        "ONNX Runtime on x86 fuses an int8 Q/DQ pair into an integer matmul only if one node reads the pair",
        "join the weights of the layers that read the pair (query, key and value; gate and up) into one "
        "matmul; give any other reader a Q/DQ pair with a stored zero point of its own",
        onnxruntime.shared_pairs,
    ),
    Rule(
        onnxruntime.NO_ZERO_POINT, "slow", "runtime",
        "ONNX Runtime on x86 fuses an int8 activation only if its QuantizeLinear has a zero point",
        "store the zero point 0 as an int8 initializer",
        onnxruntime.pairs_without_zero_point,
    ),
    Rule(
        onnxruntime.BIAS, "slow", "runtime",
        "ONNX Runtime does not fuse Gemm with a float bias; MatMul of rank 2 and Add become such a Gemm",
        "keep a third axis in front of the matmul (Unsqueeze, and Squeeze behind it), or put QuantizeLinear "
        "directly behind the bias",
        onnxruntime.float_biases,
    ),
    Rule(
        "pair-one-sided", "slow", "runtime",
        "ONNX Runtime multiplies integers only if both operands are quantized",
        "quantize both operands or neither",
        onnxruntime.lone_operands,
    ),
)  # fmt: skip
"""All rules, in the order in which findings are shown."""
