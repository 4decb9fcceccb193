"""Small networks of many families, random but seeded, each with example inputs: what users bring, in the large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests import networks

Example = Tensor | tuple[Tensor, ...]
Built = tuple[nn.Module, Example]
"""A module in eval mode, and two samples for it: a tensor, or one for each of its inputs."""
TOKENS = 90


class Wrapped(nn.Module):
    """A model of transformers as a function of one tensor."""

    def __init__(self, model: nn.Module, takes: str, gives: str) -> None:
        super().__init__()
        self.model, self.takes, self.gives = model, takes, gives
        config: Any = model.config
        self.more = {"use_cache": False} if gives == "logits" and hasattr(config, "use_cache") else {}

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self.model(**{self.takes: x}, **self.more), self.gives)
        return result


class Recurrent(nn.Module):
    """Two recurrent layers and a linear one on the last step."""

    def __init__(self, kind: str, bidirectional: bool) -> None:
        super().__init__()
        self.layers = getattr(nn, kind)(8, 16, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(32 if bidirectional else 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x)[0][:, -1])
        return y


def audio() -> nn.Module:
    """A network over raw samples of sound."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 80, 4), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(4),
        nn.Conv1d(16, 32, 3), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(4),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def volume() -> nn.Module:
    """A network over volumes: grouped and transposed convolutions in three dimensions."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1, groups=2), nn.BatchNorm3d(16), nn.ReLU(),
        nn.ConvTranspose3d(16, 8, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def _pictures(model: str, **config: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        size = config.get("image_size", 64)
        made = getattr(transformers, f"{model}ForImageClassification")
        settings = getattr(transformers, f"{model}Config")(**config)
        return Wrapped(made(settings), "pixel_values", "logits"), torch.randn(2, 3, size, size)

    return build


def _text(model: str, config: str, gives: str = "logits", **settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(vocab_size=100, **settings))
        return Wrapped(made, "input_ids", gives), torch.randint(0, TOKENS, (2, 16))

    return build


def _decoder(family: str, **settings: Any) -> Callable[[], Built]:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return _text(f"{family}ForCausalLM", f"{family}Config", **sizes, **settings)


def _whisper() -> Built:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=32,
    )
    return Wrapped(WhisperEncoder(config), "input_features", "last_hidden_state"), torch.randn(2, 16, 64)


ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
FOUR_STAGES: dict[str, Any] = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
ZOO: dict[str, Callable[[], Built]] = {
    "resnet": _pictures(
        "ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck"
    ),
    "mobilenet_v2": _pictures("MobileNetV2", image_size=64, depth_multiplier=0.35, finegrained_output=False),
    "convnext": _pictures("ConvNext", **FOUR_STAGES),
    "regnet": _pictures("RegNet", embedding_size=16, groups_width=8, **FOUR_STAGES),
    "swin": _pictures(
        "Swin", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "vit": _pictures("ViT", image_size=32, patch_size=8, **ENCODER),
    "deit": _pictures("DeiT", image_size=32, patch_size=8, **ENCODER),
    "bert": _text("BertForSequenceClassification", "BertConfig", **ENCODER),
    "t5": _text(
        "T5EncoderModel", "T5Config", "last_hidden_state", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    ),
    "whisper": _whisper,
    "llama": _decoder("Llama"),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=8),
    "gemma": _decoder("Gemma", head_dim=8),
    "gemma2": _decoder("Gemma2", head_dim=8, sliding_window=8),
    "lstm": lambda: (Recurrent("LSTM", bidirectional=True), torch.randn(2, 12, 8)),
    "gru": lambda: (Recurrent("GRU", bidirectional=False), torch.randn(2, 12, 8)),
    "audio": lambda: (audio(), torch.randn(2, 1, 1600)),
    "volume": lambda: (volume(), torch.randn(2, 1, 8, 8, 8)),
    "gpt2": lambda: (networks.GPT2(), torch.randint(0, TOKENS, (2, 16))),
    "swiglu": lambda: (nn.Sequential(*(networks.Gated(16, swish=True) for _ in range(2))), torch.randn(2, 6, 16)),
    "glu": lambda: (nn.Sequential(*(networks.Gated(16, swish=False) for _ in range(2))), torch.randn(2, 6, 16)),
    "shufflenet": lambda: (networks.shufflenet(), torch.randn(2, 3, 64, 64)),
    "yolo": lambda: (networks.Detector(), torch.randn(2, 3, 64, 64)),
    "bidirectional_gru": lambda: (networks.StatefulGRU(), torch.randn(2, 12, 8)),
    "efficientnet": lambda: (networks.efficientnet(), torch.randn(2, 3, 32, 32)),
    "mamba": lambda: (nn.Sequential(networks.Mamba(), networks.Mamba()), torch.randn(2, 8, 16)),
    "detr": lambda: (networks.DETR(), torch.randn(2, 3, 32, 32)),
    "clip": lambda: (networks.CLIP(), (torch.randn(2, 3, 32, 32), torch.randint(0, TOKENS, (2, 16)))),
    "conformer": lambda: (networks.Conformer(), torch.randn(2, 32, 8)),
    "attention_unet": lambda: (networks.AttentionUNet(), torch.randn(2, 3, 32, 32)),
}  # fmt: skip
"""By name: who builds the network and two samples."""


def built(name: str) -> Built:
    """The network in eval mode, and two samples; the same every time."""
    torch.manual_seed(0)
    module, example = ZOO[name]()
    return module.eval(), example


def inputs(example: Example) -> tuple[Tensor, ...]:
    """One tensor for each input of the network."""
    return example if isinstance(example, tuple) else (example,)


def samples(example: Tensor, count: int, seed: int) -> Tensor:
    """`count` more of the kind of `example`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *example.shape[1:])
    if example.dtype == torch.int64:
        return torch.randint(0, TOKENS, shape, generator=generator)
    return torch.randn(shape, generator=generator)
