"""The certificate: a bit-for-bit comparison of model.onnx with the folded model."""
