"""Weights onto grids: closed form and gradient, on rows, moments and codes."""
