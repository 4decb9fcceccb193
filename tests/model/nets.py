"""Small networks with random weights, in torch and as ONNX text."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnx.parser
import torch
from torch import nn

from qpipe.model import Model


class InvertedResidual(nn.Module):
    """1x1, depthwise 3x3, 1x1, as in MobileNetV2."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.residual = stride == 1 and channels == out
        self.conv = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return x + y if self.residual else y


class Mobile(nn.Module):
    """A MobileNetV2 of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            InvertedResidual(8, 8, 1),
            InvertedResidual(8, 16, 2),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.classifier(self.features(x).mean([2, 3]))
        return y


class UNet(nn.Module):
    """One level down and up: ConvTranspose, skip connection, bilinear resize, SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.middle = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.SiLU())
        self.resize = nn.Upsample(scale_factor=2, mode="bilinear")
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down(x)
        b = self.up(self.middle(self.pool(a)))
        y: torch.Tensor = self.head(self.resize(self.merge(torch.cat([b, a], 1))))
        return y


class Oddities(nn.Module):
    """weight_norm, a BatchNorm without parameters, PRelu per channel, equal parameters, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3))
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.slope = nn.PReLU(8)
        self.first = nn.LayerNorm(8)
        self.second = nn.LayerNorm(8)
        self.table = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        y = self.slope(self.norm(self.conv(x))).transpose(1, 2)
        z: torch.Tensor = self.head(self.first(y) + self.second(self.table(ids)))
        return z


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` in eval mode, the statistics of its BatchNorms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.eval()


@functools.cache
def exported(net: type[nn.Module]) -> tuple[nn.Module, Model]:
    """One network of a class that takes images of 32x32, and the model that its import makes; made once, so nobody may
    change either."""
    torch.manual_seed(0)
    module = randomized(net())
    return module, Model.from_torch(module, torch.zeros(1, 3, 32, 32))


def parsed(text: str, opset: int = 21, **tensors: Any) -> onnx.ModelProto:
    """ONNX text (`name (inputs) => (outputs) { … }`) with `tensors` as initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}')
    for name, array in tensors.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


def normal(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def error_of_import(proto: onnx.ModelProto, model: Model | None = None) -> float:
    """The largest relative error of the imported model in onnxruntime against its source there."""
    import onnxruntime

    from qpipe.methods.comparison.compare import relative_error
    from qpipe.methods.comparison.inputs import random_inputs

    model = model if model is not None else Model.from_proto(proto)
    inputs = random_inputs(model)
    source = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = source.run(None, inputs)
    found = model.session(quantized=False).run(None, inputs)
    return max(map(relative_error, wanted, found))


def op_types(model: Model) -> list[str]:
    """The operators of the graph, in order."""
    return [node.op_type for node in model.graph]
