"""Ways between layers along which channels can be rescaled, and how far activations reach."""
