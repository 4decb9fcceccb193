"""Mixed precision: groups, their costs and sensitivities, and the mix that is chosen."""
