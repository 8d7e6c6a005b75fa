"""ONNX graphs: view, Q/DQ pairs, sizes, lint, certificate, and external graphs. No torch."""
