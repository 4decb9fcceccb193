"""Ten classes of shapes, drawn in colour on cluttered ground: 3x32x32 images from a seed, with numpy alone.

Every image is one shape (`CLASSES`) at a random place, size, angle and colour, over a ground with a colour gradient and
two thin strokes, crossed by a third stroke, under noise. Small, pale or covered shapes are hard to tell apart, so a
good network ends near 98 %, not at 100 %.

The same bytes come out on every platform: draws are plain uniform doubles of PCG64, and all the rest is +, -, *, /,
sqrt, min and max, each of which IEEE 754 rounds in one way only (no sine, no exp, no matrix product, no sum whose
order is open). Images are whole numbers of 1/255.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Plane = NDArray[np.float64]

SIZE = 32
CLASSES = ("disc", "ring", "square", "frame", "triangle", "cross", "star", "crescent", "bars", "half_disc")
SPLITS = {"training": (1, 16000), "calibration": (2, 1000), "evaluation": (3, 2000)}
"""Split -> (its own seed, number of images)."""
_CHUNK = 500  # images drawn at once: about 50 MB of memory, whatever the size of the split


def load(split: str) -> dict[str, NDArray[Any]]:
    """Return `image` (N, 3, 32, 32) float32 in 0..1 and `labels` (N,) int64 of a split.

    `split` is `training`, `calibration` or `evaluation`; each is drawn from its own seed, so they share no image.
    Raises ValueError for any other name.
    """
    if split not in SPLITS:
        raise ValueError(f"The demo data have no split '{split}'. Splits: {', '.join(SPLITS)}.")
    seed, count = SPLITS[split]
    chunks = [draw(seed, start, min(_CHUNK, count - start)) for start in range(0, count, _CHUNK)]
    codes = np.concatenate([codes for codes, _ in chunks])
    labels = np.concatenate([labels for _, labels in chunks])
    return {"image": codes.astype(np.float32) / np.float32(255), "labels": labels}


def draw(seed: int, start: int, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return `count` images (count, 3, 32, 32) uint8 and their labels (count,), from the stream named (seed, start)."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, start])))
    labels = np.floor(rng.random(count) * len(CLASSES)).astype(np.int64)
    image = _ground(rng, count)
    for _ in range(2):
        image = _paint(image, _stroke(rng, count), _colour(rng, count))
    image = _paint(image, _shape(rng, labels), _contrasting_colour(rng, image))
    image = _paint(image, _stroke(rng, count), _colour(rng, count))
    # The sum of three uniform draws is close enough to a normal one, and needs no logarithm.
    noise = rng.random(image.shape) + rng.random(image.shape) + rng.random(image.shape) - 1.5
    image = image + noise * _between(rng, count, 0.04, 0.2)[:, None]
    return np.floor(np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8), labels


def _between(rng: np.random.Generator, count: int, low: float, high: float) -> Plane:
    """Uniform draws, (count, 1, 1)."""
    return low + (high - low) * rng.random((count, 1, 1))


def _direction(rng: np.random.Generator, count: int) -> tuple[Plane, Plane]:
    """Unit vectors (cos, sin), each (count, 1, 1): the rational points of the circle, with a random sign."""
    t = _between(rng, count, -1.0, 1.0)
    sign = np.where(rng.random((count, 1, 1)) < 0.5, -1.0, 1.0)
    return sign * (1 - t * t) / (1 + t * t), sign * 2 * t / (1 + t * t)


def _grid() -> tuple[Plane, Plane]:
    """Pixel coordinates x (1, 1, 32) and y (1, 32, 1), from the centre of the image."""
    axis = np.arange(SIZE, dtype=np.float64) - (SIZE - 1) / 2
    return axis[None, None, :], axis[None, :, None]


def _colour(rng: np.random.Generator, count: int) -> Plane:
    """Colours, (count, 3, 1, 1) in 0..1."""
    return rng.random((count, 3, 1, 1))


def _contrasting_colour(rng: np.random.Generator, image: Plane) -> Plane:
    """Colours (count, 3, 1, 1) at least 0.4 away, in one channel, from the middle of `image`'s ground."""
    count = len(image)
    colour = _colour(rng, count)
    channel = np.floor(rng.random(count) * 3).astype(np.int64)
    rows = np.arange(count)
    ground = (image[rows, channel, 0, 0] + image[rows, channel, -1, -1]) / 2
    away = 0.4 + 0.2 * rng.random(count)
    colour[rows, channel, 0, 0] = np.where(ground < 0.5, ground + away, ground - away)
    return colour


def _ground(rng: np.random.Generator, count: int) -> Plane:
    """A colour that slides into another along a random direction, (count, 3, 32, 32)."""
    x, y = _grid()
    cos, sin = _direction(rng, count)
    slide = ((x * cos + y * sin) / (SIZE * 1.5) + 0.5)[:, None]
    first = _colour(rng, count)
    second = 0.6 * first + 0.4 * _colour(rng, count)
    return first + (second - first) * slide


def _stroke(rng: np.random.Generator, count: int) -> Plane:
    """Coverage (count, 32, 32) of a straight stroke, 0.6 to 1.6 pixels wide, 6 to 20 long."""
    x, y = _grid()
    cos, sin = _direction(rng, count)
    x = x - _between(rng, count, -14.0, 14.0)
    y = y - _between(rng, count, -14.0, 14.0)
    along, across = x * cos + y * sin, y * cos - x * sin
    distance = np.maximum(
        np.abs(along) - _between(rng, count, 3.0, 10.0), np.abs(across) - _between(rng, count, 0.3, 0.8)
    )
    return np.clip(0.5 - distance, 0.0, 1.0)


def _shape(rng: np.random.Generator, labels: NDArray[np.int64]) -> Plane:
    """Coverage (count, 32, 32) of each image's shape, 6 to 11 pixels in radius, a little squeezed, at any angle."""
    count = len(labels)
    x, y = _grid()
    cos, sin = _direction(rng, count)
    radius = _between(rng, count, 6.0, 11.0)
    room = SIZE / 2 - radius
    x = x - room * _between(rng, count, -1.0, 1.0)
    y = y - room * _between(rng, count, -1.0, 1.0)
    squeeze = _between(rng, count, 0.8, 1.0)
    u = (x * cos + y * sin) / radius
    v = (y * cos - x * sin) / (radius * squeeze)
    distance = np.empty((count, SIZE, SIZE))
    for label, name in enumerate(CLASSES):
        rows = labels == label
        distance[rows] = _SHAPES[name](u[rows], v[rows])
    return np.clip(0.5 - distance * radius, 0.0, 1.0)


def _paint(image: Plane, coverage: Plane, colour: Plane) -> Plane:
    """`colour` over `image` where `coverage` is 1, mixed where it lies between."""
    return image + (colour - image) * coverage[:, None]


def _norm(u: Plane, v: Plane) -> Plane:
    return np.sqrt(u * u + v * v)


def _box(u: Plane, v: Plane, width: float, height: float) -> Plane:
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def _bars(u: Plane, v: Plane) -> Plane:
    return np.minimum(_box(u - 0.6, v, 0.25, 0.85), _box(u + 0.6, v, 0.25, 0.85))


def _star(u: Plane, v: Plane) -> Plane:
    a, b = np.abs(u), np.abs(v)
    return (a + b + 2.0 * np.minimum(a, b) - 1.0) * 0.4


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.maximum(-v, 0.8660254 * np.abs(u) + 0.5 * v) - 0.5


# Each gives the signed distance (negative inside) of the shape with radius 1, near enough for a soft edge.
_SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": lambda u, v: _norm(u, v) - 0.9,
    "ring": lambda u, v: np.abs(_norm(u, v) - 0.72) - 0.22,
    "square": lambda u, v: _box(u, v, 0.75, 0.75),
    "frame": lambda u, v: np.abs(_box(u, v, 0.6, 0.6)) - 0.2,
    "triangle": _triangle,
    "cross": lambda u, v: np.minimum(_box(u, v, 0.26, 0.95), _box(u, v, 0.95, 0.26)),
    "star": _star,
    "crescent": lambda u, v: np.maximum(_norm(u, v) - 0.95, 0.75 - _norm(u - 0.55, v)),
    "bars": _bars,
    "half_disc": lambda u, v: np.maximum(_norm(u, v) - 0.95, -0.1 - u),
}
