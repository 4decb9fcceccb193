"""Layers rounded one by one, each on what the layers before make of the data."""
