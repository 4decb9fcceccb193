"""What a pipeline may say: the catalog of stages, the spec, the graph."""
