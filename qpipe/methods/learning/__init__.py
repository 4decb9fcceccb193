"""Weights, biases and step sizes learned by gradient: a part of the network at a time."""
