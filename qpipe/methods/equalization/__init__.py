"""Ways between layers along which channels can be rescaled, rescaling them, and how far activations reach."""
