"""Makes modelopt-*.onnx, graphs of nvidia-modelopt, for test_interchange.py and test_adopted.py.

Made with nvidia-modelopt 0.47.0, onnx 1.23.2, onnxruntime 1.31.1, onnx-graphsurgeon 0.6.1. Its ONNX
quantizer needs `nvidia-modelopt[onnx]`, which the extra `train` does not install.

    PYTHONPATH=tests:tests/targets python tests/data/make_modelopt.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from float_models import convolutions, matmuls, samples
from lines import Kind, exported
from modelopt.onnx.quantization import quantize
from tiny import make_checkpoint, token_ids, write_text

HERE = Path(__file__).parent


def make(name: str, model: onnx.ModelProto, mode: str, method: str, **options: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float.onnx"
        onnx.save_model(model, source)
        options |= {"calibration_data": {"x": samples(model)}, "calibration_eps": ["cpu"]}
        target = str(HERE / f"modelopt-{name}.onnx")
        quantize(str(source), mode, calibration_method=method, output_path=target, **options)


make("int8", matmuls(), "int8", "max", high_precision_dtype="fp16")
make("int8-stored", matmuls(), "int8", "max", high_precision_dtype="fp32", dq_only=True)
make("int8-conv", convolutions(), "int8", "max", high_precision_dtype="fp16", dq_only=True)
make("int4", matmuls(), "int4", "rtn_dq", high_precision_dtype="fp32", block_size=32)
make("int4-awq", matmuls(), "int4", "awq_lite", high_precision_dtype="fp32", block_size=32)


def make_gpt2() -> None:
    """The whole GPT-2 of the tests, int8 weights and activations."""
    ids = token_ids(8, 24).numpy()
    positions = np.broadcast_to(np.arange(24), ids.shape).copy()
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder) / "text.txt")
        graph = exported(Kind("float"), make_checkpoint(Path(folder) / "model", text), text)
        quantize(
            str(graph.file), "int8", calibration_method="max", calibration_data=feed, calibration_eps=["cpu"],
            high_precision_dtype="fp32", dq_only=True, op_types_to_quantize=["MatMul", "Gemm"],
            output_path=str(HERE / "models" / "modelopt-int8-gpt2.onnx"),
        )  # fmt: skip


make_gpt2()
