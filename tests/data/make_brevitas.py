"""Makes brevitas-*.onnx, QCDQ graphs of brevitas, for tests/targets/test_interchange.py.

Made with brevitas 0.13.4, torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxoptimizer 0.4.2. brevitas is no
dependency; this script needs nothing of qcompress:

    python tests/data/make_brevitas.py
"""

from __future__ import annotations

from pathlib import Path

import brevitas.nn as qnn
import onnx
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Int32Bias, Uint8ActPerTensorFloat
from torch import nn

HERE = Path(__file__).parent
WEIGHT = {"weight_quant": Int8WeightPerChannelFloat, "bias": True}


def linears(bits: int = 8, bias: type | None = None) -> nn.Sequential:
    """Linear, ReLU, linear: int8 activations, weights of `bits` bits."""
    options = {**WEIGHT, "weight_bit_width": bits, "bias_quant": bias}
    parts = {"act_quant": Int8ActPerTensorFloat, "return_quant_tensor": bias is not None}
    return nn.Sequential(
        qnn.QuantIdentity(**parts), qnn.QuantLinear(32, 48, **options),
        nn.ReLU(), qnn.QuantIdentity(**parts), qnn.QuantLinear(48, 24, **options),
    )  # fmt: skip


def convolution() -> nn.Sequential:
    return nn.Sequential(
        qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat),
        qnn.QuantConv2d(4, 16, 3, padding=1, **WEIGHT),
        qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat),
        nn.Flatten(),
        qnn.QuantLinear(256, 10, **WEIGHT),
    )


def make(name: str, model: nn.Module, *shape: int, **options: object) -> None:
    file = HERE / f"brevitas-{name}.onnx"
    x = torch.randn(shape)
    for _ in range(3):
        model(x)  # observes ranges
    export_onnx_qcdq(model.eval(), args=x, export_path=str(file), **options)
    exported = onnx.load(file)
    graph = exported.graph
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer, graph):
        del part.metadata_props[:]  # where in this script it comes from
    onnx.save_model(exported, file)


OLD = {"dynamo": False, "opset_version": 17, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
NEW = {"dynamo": True, "opset_version": 21, "external_data": False}

torch.manual_seed(0)
make("linear", linears(), 2, 32, **OLD)
make("linear-bias", linears(bias=Int32Bias), 2, 32, **OLD)
make("linear-4bit", linears(4), 2, 32, **OLD)
make("linear-4bit-rounded", linears(4), 2, 32, **NEW)
make("conv", convolution(), 1, 4, 4, 4, **OLD)
make("conv-rounded", convolution(), 1, 4, 4, 4, **NEW)
