"""Files, both ways: ONNX, encodings, state dicts."""
