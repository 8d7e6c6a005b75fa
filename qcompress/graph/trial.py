"""A child process that runs an ONNX file once in ONNX Runtime.

A graph of unknown origin may end the process that first runs it: this one, and not the caller's.
`python -m qcompress.graph.trial FILE INPUTS MIB`, where INPUTS is a JSON object: for each input its type
and its axes, names (batch, sequence) or sizes. Writes one JSON object: shape and type of `logits` for 2 rows
of 5 tokens. No torch.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from qcompress.system.memory import limit_memory

ROWS, TOKENS = 2, 5

PROPAGATION = "QDQPropagationTransformer"
"""Of ONNX Runtime 1.31. From opset 21 on it makes invalid nodes of int8 that a Reshape or a Transpose reads:
what onnxruntime's own quantizer writes for a Gemm, for one.
"""


def main(arguments: list[str]) -> None:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    file, inputs, mib = arguments
    limit_memory(int(mib))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    provider, without = ["CPUExecutionProvider"], []
    try:
        session = onnxruntime.InferenceSession(file, options, providers=provider)
    except Fail as error:
        if "output_dtype" not in str(error):
            raise
        without = [PROPAGATION]
        session = onnxruntime.InferenceSession(file, options, providers=provider, disabled_optimizers=without)
    sizes = {"batch": ROWS, "sequence": TOKENS}
    feed = {
        name: np.ones([sizes.get(axis, axis) for axis in axes], element)
        for name, (element, axes) in json.loads(inputs).items()
    }
    (logits,) = session.run(["logits"], feed)
    shown = {"shape": list(logits.shape), "type": str(logits.dtype), "disabled_optimizers": without}
    print(json.dumps(shown))


if __name__ == "__main__":
    main(sys.argv[1:])
