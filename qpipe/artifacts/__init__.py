"""The kinds of value that travel between stages, and how each is saved and named."""
