"""The built-in network: MobileNetV2's inverted residuals at 32x32, 0.2 million parameters, BatchNorm and ReLU6 kept."""

from __future__ import annotations

from torch import Tensor, nn

STAGES = ((1, 16, 1, 1), (4, 24, 2, 1), (4, 40, 3, 2), (4, 64, 3, 2))
"""(expansion, channels, repeats, stride of the first) of the inverted residuals; after them 1x1 to `HEAD` channels."""
STEM = 24
HEAD = 256


def unit(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Conv without bias, BatchNorm, ReLU6."""
    conv = nn.Conv2d(
        channels_in, channels_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU6())


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection; the input is added where shape allows.

    Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, arXiv 1801.04381.
    """

    def __init__(self, channels_in: int, channels_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.expand = unit(channels_in, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = unit(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(
            nn.Conv2d(hidden, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out)
        )
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels_out, H / stride, W / stride)."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """Stem at stride 2, the inverted residuals of `STAGES`, a 1x1 head, global average, a linear classifier."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = STEM
        for expansion, width, repeats, stride in STAGES:
            for index in range(repeats):
                blocks.append(InvertedResidual(channels, width, expansion, stride if index == 0 else 1))
                channels = width
        self.stem = unit(3, STEM, 3, stride=2)
        self.blocks = nn.Sequential(*blocks)
        self.head = unit(channels, HEAD, 1)
        self.classifier = nn.Linear(HEAD, classes)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, 32, 32) in 0..1 -> logits (N, classes)."""
        x = self.head(self.blocks(self.stem(image))).mean((2, 3))
        logits: Tensor = self.classifier(x)
        return logits


def build() -> MobileNet:
    """Return the network with PyTorch's own initialization, in training mode."""
    return MobileNet()
