"""ONNX operators on torch tensors: `registry` is the table, the other files fill it, `table` has it full."""
