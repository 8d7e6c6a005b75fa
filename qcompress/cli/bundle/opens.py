"""Child process that opens an ONNX file in ONNX Runtime, as Triton's backend would.

`python -m qcompress.cli.bundle.opens FILE LEVEL`, LEVEL being `optimization.graph.level` of config.pbtxt.
Writes one JSON object: the version of ONNX Runtime, and why it does not take the file ("" if it does).
"""

from __future__ import annotations

import json
import sys


def main(arguments: list[str]) -> None:
    """Open the file and print the result as JSON."""
    import onnxruntime

    from qcompress.graph.ort_errors import ORT_ERRORS

    file, level = arguments
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = {
        "-1": levels.ORT_ENABLE_BASIC,
        "1": levels.ORT_ENABLE_EXTENDED,
        "2": levels.ORT_DISABLE_ALL,
    }.get(level, levels.ORT_ENABLE_ALL)
    why = ""
    try:
        onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        why = " ".join(str(error).split())
    print(json.dumps({"version": onnxruntime.__version__, "why": why}))


if __name__ == "__main__":
    main(sys.argv[1:])
