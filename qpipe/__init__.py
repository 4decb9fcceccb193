"""qpipe: post-training quantization as reproducible, cached pipelines."""
