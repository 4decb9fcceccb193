"""A network as a torch module with fake-quantize, and how it is run over samples."""
