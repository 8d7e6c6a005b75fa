"""The linter: rules for graphs that TensorRT builds in the requested precision."""
