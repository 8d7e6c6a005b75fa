"""An ONNX graph: one view of it, Q/DQ pairs, sizes, lint, certificate, graphs made elsewhere. No torch."""
