"""Which values get a quantizer, by target, scheme and filters, and the grids they get."""
