"""A child process that writes an ONNX file anew, with its functions in the places of their calls.

The inliner is native code, and a file of unknown origin may end its process: this one, and not the caller's.
`python -m qcompress.graph.inline FROM TO MIB`; no torch.
"""

from __future__ import annotations

import sys

import onnx
import onnx.inliner

from qcompress.system.memory import limit_memory


def main(arguments: list[str]) -> None:
    source, result, mib = arguments
    limit_memory(int(mib))
    model = onnx.load(source, format="protobuf", load_external_data=False)
    onnx.save(onnx.inliner.inline_local_functions(model), result)


if __name__ == "__main__":
    main(sys.argv[1:])
