"""What a graph is made of: layers with weights, blocks, channels, shared weights, composites."""
