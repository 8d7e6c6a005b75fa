"""Rules that a graph must keep for a TensorRT engine in the asked precision."""
