"""Four architectures with random weights, small but of the real blocks, and their ONNX files."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Array = np.ndarray[Any, np.dtype[np.float32]]


class Logits(nn.Module):
    """A model of transformers as a function from pixels to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=pixels).logits
        return logits


def resnet18() -> nn.Module:
    """ResNet-18 at a quarter of its width: basic blocks, strided shortcuts, BatchNorm, max pooling."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=10,
    )
    return Logits(ResNetForImageClassification(config))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 at 0.35 of its width: inverted residuals, depthwise convolutions, ReLU6."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(image_size=64, depth_multiplier=0.35, finegrained_output=False, num_labels=10)
    return Logits(MobileNetV2ForImageClassification(config))


def vit() -> nn.Module:
    """A ViT of three layers: patches by a convolution, a class token, attention, LayerNorm, GELU."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return Logits(ViTForImageClassification(config))


class Double(nn.Module):
    """Two times convolution, BatchNorm, ReLU."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


class UNet(nn.Module):
    """Two levels down by max pooling and up by ConvTranspose, with skip connections."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList([Double(3, width), Double(width, 2 * width)])
        self.middle = Double(2 * width, 4 * width)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(2 * width, width, 2, 2), nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)]
        )
        self.merge = nn.ModuleList([Double(2 * width, width), Double(4 * width, 2 * width)])
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for down in self.down:
            x = down(x)
            kept.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for up, merge, skip in zip(self.up[::-1], self.merge[::-1], kept[::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        y: torch.Tensor = self.head(x)
        return y


NETS = {"resnet18": (resnet18, 64), "mobilenet_v2": (mobilenet_v2, 64), "unet": (UNet, 32), "vit": (vit, 32)}
"""By name: who builds it, and the height and width of its images."""


def built(name: str) -> nn.Module:
    """The network in eval mode. BatchNorm has factors and shifts of its own, and the statistics of a batch."""
    torch.manual_seed(0)
    build, size = NETS[name]
    module = build()
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    with torch.no_grad():
        module.train()(torch.from_numpy(images(32, size, seed=7)))
    return module.eval()


def images(count: int, size: int, seed: int) -> Array:
    """Smooth waves with noise, about zero, in (count, 3, size, size)."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(0, 2 * np.pi, size)
    waves = rng.integers(0, 5, (count, 3, 2, 1, 1)), rng.uniform(0, 2 * np.pi, (count, 3, 1, 1))
    smooth = np.sin(waves[0][:, :, 0] * grid[:, None] + waves[0][:, :, 1] * grid + waves[1])
    return (smooth + 0.3 * rng.standard_normal((count, 3, size, size))).astype(np.float32)


def export(name: str, path: Path, *, dynamo: bool, dynamic: bool) -> Path:
    """The network as `torch.onnx.export` writes it with its default options, at `path`."""
    module, example = built(name), torch.from_numpy(images(2 if dynamic else 1, NETS[name][1], seed=3))
    options: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["out"]}
    if dynamic and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    elif dynamic:
        options["dynamic_axes"] = {"pixels": {0: "batch"}, "out": {0: "batch"}}
    with _quiet():
        torch.onnx.export(module, (example,), str(path), dynamo=dynamo, **options)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print and warn of their own future."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
