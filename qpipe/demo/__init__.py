"""The built-in model and data: what `model=demo` and `data=demo` mean.

`data.load(split)` draws ten classes of small shapes in colour (numpy only, seeded); `mobilenet.onnx` is a float
MobileNetV2-like network for them, made by `python -m qpipe.demo.train`, whose channels differ so much in range
that plain W8A8 per tensor loses most of its accuracy. `train.py` says how it came about and gives the figures.
"""

from __future__ import annotations

from pathlib import Path

MODEL_PATH = Path(__file__).with_name("mobilenet.onnx")
"""The float network: input `image` (batch, 3, 32, 32) float32 in 0..1, output `logits` (batch, 10)."""
