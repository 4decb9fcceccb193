"""The names of the metrics that `qpipe.numerics.metrics` computes.

Light on purpose, as `scheme` is: a stage's signature names them, and then numpy must not be loaded.
"""

from __future__ import annotations

from typing import Literal

Comparison = Literal["sqnr_db", "cosine", "mse"]
"""Of a model's outputs with those of the float model."""
Metric = Literal["top1", "top5", Comparison]
"""All of them; top1 and top5 compare outputs with labels."""
