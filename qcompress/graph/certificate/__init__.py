"""What model.onnx holds, compared bit for bit with what was folded."""
