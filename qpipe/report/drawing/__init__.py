"""A pipeline as a picture and as text."""
