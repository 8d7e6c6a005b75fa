"""Makes modelopt-*.onnx, graphs of nvidia-modelopt, for tests/targets/test_interchange.py.

Made with nvidia-modelopt 0.47.0, onnx 1.23.2, onnxruntime 1.31.1, onnx-graphsurgeon 0.6.1. Its ONNX
quantizer needs `nvidia-modelopt[onnx]`, which the extra `train` does not install.

    PYTHONPATH=tests:tests/targets python tests/data/make_modelopt.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from float_models import convolutions, matmuls, samples
from modelopt.onnx.quantization import quantize

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
