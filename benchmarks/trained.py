"""Small networks that are trained here, on what every machine has: a ResNet and a ViT on the built-in images; on the
text of Python's standard library a byte-level decoder as Llama has it (RMS norm, rotary positions, SwiGLU), and one
that embeds a window near the one that follows it (`encoder`).

    OMP_NUM_THREADS=1 python -m benchmarks.trained --folder FOLDER          writes FOLDER/NAME/model.onnx, once

About twelve minutes on one core. Another version of Python has other text, and so another decoder and encoder: their
figures are comparable within one run only.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from qpipe.demo.data import load
from qpipe.model import Model

Array = npt.NDArray[Any]
LENGTH = 128
"""Bytes that the decoder sees at once."""
_HELD_OUT = 12
"""Every twelfth file of the library is read to judge, the one before it to calibrate."""


class Unit(nn.Module):
    """A basic block of ResNet: two convolutions with BatchNorm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norms[0](self.first(x)))
        return functional.relu(self.shortcut(x) + self.norms[1](self.second(y)))


def resnet() -> nn.Module:
    """Four basic blocks, 76,000 parameters."""
    units = [Unit(16, 16, 1), Unit(16, 32, 2), Unit(32, 32, 1), Unit(32, 48, 2)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


class Layer(nn.Module):
    """A transformer's layer, norm first: attention, then two linear layers with GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        parts = self.qkv(self.norms[0](x)).reshape(b, n, 3 * self.heads, c // self.heads).transpose(1, 2)
        q, k, v = parts.chunk(3, dim=1)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(c // self.heads)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


class ViT(nn.Module):
    """Two strided convolutions to 64 tokens, three layers of width 64, the mean of the tokens: 120,000 parameters."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, width, 3, 2, 1)]
        self.patches = nn.Sequential(*stem)
        self.places = nn.Parameter(0.02 * torch.randn(64, width))
        self.layers = nn.Sequential(*(Layer(width, 4) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        y: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return y


class Gated(nn.Module):
    """A decoder's layer: rotary attention and SwiGLU, each behind an RMS norm, no biases."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(width)) for _ in range(2)])
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        b, n, c = x.shape
        y = rms(x, self.scales[0])
        q, k, v = (f(y).reshape(b, n, self.heads, c // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = turned(q, cos, sin) @ turned(k, cos, sin).transpose(-2, -1) / math.sqrt(c // self.heads) + mask
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))
        y = rms(x, self.scales[1])
        z: Tensor = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return z


def rms(x: Tensor, scale: Tensor) -> Tensor:
    """x over its root mean square, times `scale`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * scale


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Decoder(nn.Module):
    """Bytes to the logits of the next byte: four layers of width 128, 855,000 parameters."""

    def __init__(self, width: int = 128, hidden: int = 344) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Gated(width, 4, hidden) for _ in range(4))
        self.scale, self.head = nn.Parameter(torch.ones(width)), nn.Linear(width, 256, bias=False)
        angles = torch.outer(torch.arange(LENGTH), 10000.0 ** -(torch.arange(0, 32, 2) / 32)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -1e4).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, self.mask)
        y: Tensor = self.head(rms(x, self.scale))
        return y


class Encoder(nn.Module):
    """Bytes to a vector of length 1 for the whole window: two layers of width 64, the mean of the tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.layers = nn.Sequential(*(Layer(width, 4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.layers(self.embedding(ids) + self.places)
        return functional.normalize(self.head(self.norm(tokens).mean(1)), dim=-1)


class Pairs(nn.Module):
    """How alike the first window of each pair (batch, 2, LENGTH) is to the second one of all: (batch, batch) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, pairs: Tensor) -> Tensor:
        y: Tensor = 20.0 * self.encoder(pairs[:, 0]) @ self.encoder(pairs[:, 1]).T
        return y


def library(split: str) -> bytes:
    """The Python sources of the standard library: `training`, `calibration` or `evaluation`, no file in two of them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    place = {"calibration": _HELD_OUT - 2, "evaluation": _HELD_OUT - 1}.get(split)
    chosen = [
        path
        for i, path in enumerate(files)
        if (i % _HELD_OUT == place if place is not None else i % _HELD_OUT < _HELD_OUT - 2)
    ]
    return b"\n".join(path.read_bytes() for path in chosen)


def windows(split: str, count: int, seed: int = 0) -> tuple[Array, Array]:
    """`count` windows of a split and the bytes that follow each: int64 (count, LENGTH) both."""
    text = np.frombuffer(library(split), np.uint8).astype(np.int64)
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, count)
    rows = text[starts[:, None] + np.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


def pictures(epochs: int, batch: int) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Batches of the built-in images, flipped at random, with the share that is done."""
    arrays = load("training")
    images, labels = torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["labels"])
    draw = torch.Generator().manual_seed(0)
    steps = epochs * (len(images) // batch)
    for step in range(steps):
        index = torch.randint(len(images), (batch,), generator=draw)
        flipped = [d for d in (2, 3) if torch.rand((), generator=draw) < 0.5]
        yield step / steps, images[index].flip(flipped), labels[index]


def text(steps: int, batch: int) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Batches of windows, with the share that is done."""
    rows, following = (torch.from_numpy(each) for each in windows("training", steps * batch, seed=1))
    for step in range(steps):
        part = slice(step * batch, (step + 1) * batch)
        yield step / steps, rows[part], following[part]


def neighbours(steps: int, batch: int) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Batches of windows, each with the one that follows it, with the share that is done."""
    ids = np.frombuffer(library("training"), np.uint8).astype(np.int64)
    rng = np.random.default_rng(2)
    for step in range(steps):
        starts = rng.integers(0, len(ids) - 2 * LENGTH, batch)
        rows = ids[starts[:, None] + np.arange(2 * LENGTH)].reshape(batch, 2, LENGTH)
        yield step / steps, torch.from_numpy(rows), torch.arange(batch)


def train(net: nn.Module, batches: Iterator[tuple[float, Tensor, Tensor]], rate: float) -> nn.Module:
    """`net` after AdamW with a short warm-up and a cosine, in eval mode."""
    adam = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01, betas=(0.9, 0.98))
    begun = time.monotonic()
    for step, (done, x, y) in enumerate(batches):
        for group in adam.param_groups:
            group["lr"] = rate * min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * done)))
        loss = functional.cross_entropy(net(x).flatten(0, -2), y.flatten())
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        if step % 100 == 0:
            print(f"  {done:5.0%} {loss.item():.3f} {time.monotonic() - begun:.0f} s", flush=True)
    return net.eval()


BUILDERS: dict[str, Callable[[], tuple[nn.Module, Iterator[tuple[float, Tensor, Tensor]], float]]] = {
    "resnet": lambda: (resnet(), pictures(4, 64), 3e-3),
    "vit": lambda: (ViT(), pictures(8, 64), 1.5e-3),
    "decoder": lambda: (Decoder(), text(1500, 16), 2e-3),
    "encoder": lambda: (Pairs(), neighbours(250, 64), 2e-3),
}
"""By name: the network, what it is trained on, and the learning rate."""


def trained(name: str, folder: Path) -> Model:
    """The network `name` as it lies in `folder`, trained and exported there where it does not."""
    path = folder / name / "model.onnx"
    if not path.exists():
        torch.manual_seed(0)
        print(f"training {name}", flush=True)
        net = train(*BUILDERS[name]())
        reads_text = name in ("decoder", "encoder")
        example = torch.zeros(2, LENGTH, dtype=torch.int64) if reads_text else torch.zeros(2, 3, 32, 32)
        Model.from_torch(net.encoder if isinstance(net, Pairs) else net, (example,)).save(path.parent)
    return Model.load(path)


def main() -> None:
    """Reads the command line; trains what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("names", nargs="*", default=list(BUILDERS))
    arguments = parser.parse_args()
    for name in arguments.names:
        print(name, trained(name, arguments.folder))


if __name__ == "__main__":
    main()
