"""Network, the value: a graph in canonical form, its tensors and encodings; what always holds of it, and its bytes."""
