"""Child process that inlines the functions of an ONNX file and writes the result.

The inliner is native code that a file of unknown origin may crash; a separate process protects the caller.
`python -m qcompress.graph.inline FROM TO MIB`; no torch.
"""

from __future__ import annotations

import sys

import onnx
import onnx.inliner

from qcompress.system.memory import limit_memory


def main(arguments: list[str]) -> None:
    """Inline FROM into TO with at most MIB of memory."""
    source, result, mib = arguments
    limit_memory(int(mib))
    model = onnx.load(source, format="protobuf", load_external_data=False)
    onnx.save(onnx.inliner.inline_local_functions(model), result)


if __name__ == "__main__":
    main(sys.argv[1:])
