"""A child process that asks the real TensorRT-RTX: does it parse this graph, does it build it?

`python ask_tensorrt.py SM FILE...` prints one JSON object for each file: {"file", "parsed", "bytes" of the
engine or null, "messages"}. Shares no code with qcompress.engine.build_engine.
"""

from __future__ import annotations

import json
import sys

import tensorrt_rtx as trt


class Logger(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity.value <= trt.ILogger.Severity.WARNING.value:
            self.messages.append(msg)


def ask(builder: trt.Builder, logger: Logger, sm: str, file: str) -> dict[str, object]:
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(file):
        words = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        return {"parsed": False, "bytes": None, "messages": words}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = [[size if dim == -1 else dim for dim in tensor.shape] for size in (1, 2, 4)]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return {"parsed": True, "bytes": plan and plan.nbytes, "messages": logger.messages}


def main() -> None:
    logger = Logger()
    builder = trt.Builder(logger)
    for file in sys.argv[2:]:
        logger.messages = []
        print(json.dumps({"file": file, **ask(builder, logger, sys.argv[1], file)}), flush=True)


main()
