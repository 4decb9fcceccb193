"""Quantized ONNX, read and written: QDQ pairs, operator form, biases, guards."""
