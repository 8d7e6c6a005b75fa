"""Child process that runs an ONNX file once in ONNX Runtime.

A graph of unknown origin may crash the process that runs it; a separate process protects the caller. `python
-m qcompress.graph.trial FILE INPUTS MIB OUTPUT`, where INPUTS is a JSON object: for each input its type and
its axes, names (batch, sequence) or sizes. Writes one JSON object: shape and type of OUTPUT for 2 rows of 5
tokens, and the disabled optimizers. No torch.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from qcompress.system.memory import limit_memory

ROWS, TOKENS = 2, 5

PROPAGATION = "QDQPropagationTransformer"
"""Optimizer of ONNX Runtime 1.31. From opset 21 on it writes invalid nodes if Reshape or Transpose reads
int8, as in graphs that onnxruntime's quantizer writes for Gemm.
"""


def main(arguments: list[str]) -> None:
    """Run FILE on INPUTS with at most MIB of memory, and print the JSON object."""
    import onnxruntime

    from qcompress.graph.ort_errors import Fail

    file, inputs, mib, output = arguments
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
    (logits,) = session.run([output], feed)
    shown = {"shape": list(logits.shape), "type": str(logits.dtype), "disabled_optimizers": without}
    print(json.dumps(shown))


if __name__ == "__main__":
    main(sys.argv[1:])
