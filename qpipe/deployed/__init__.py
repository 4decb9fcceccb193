"""What ships, as its user has it: measured in onnxruntime, in processes of its own."""
