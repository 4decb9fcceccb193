"""Image files as arrays: found in a folder with their classes, resized, cropped, normalized.

    x = (pixel * scale - mean) / std, per channel, float32

`crop`: the shorter side is resized to size / ratio and the middle of `size` is cut out; `stretch`: the image
is resized to `size` as it is. Bilinear. Needs Pillow.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qpipe.errors import InputError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Preprocessing:
    """How a file becomes an array: `size` is (height, width), `ratio` the part of the shorter side a crop keeps."""

    size: tuple[int, int] | None = None
    fit: Literal["crop", "stretch"] = "crop"
    ratio: float = 1.0
    mode: Literal["RGB", "BGR", "L"] = "RGB"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"

    def __post_init__(self) -> None:
        channels = 1 if self.mode == "L" else 3
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, channels):
                raise InputError(
                    f"{name} has {len(numbers)} numbers; {self.mode} images take one, or {channels}."
                )
        if not all(self.std):
            raise InputError(f"std must not hold a zero, got {list(self.std)}.")


def find_images(folder: Path, labels: Path | None) -> tuple[list[Path], NDArray[np.int64] | None]:
    """Image files in the order of their paths (of the CSV, where given), and their classes (N,), or None.

    Classes come from the CSV `filename,label`, or from one sub-folder per class, numbered in the order of their
    names. Errors: InputError for a missing folder, no image, an image listed but missing or beside the class folders.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder of images {folder}.")
    if labels is not None:
        rows = read_labels(labels)
        files, names = [folder / name for name, _ in rows], [label for _, label in rows]
        if missing := [file for file in files if not file.is_file()]:
            raise InputError(
                f"{labels} lists {len(missing)} images that do not exist, the first is {missing[0]}."
            )
    else:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        names = [file.relative_to(folder).parts[0] for file in files if file.parent != folder]
        if names and len(names) < len(files):
            raise InputError(
                f"{folder} holds images beside its class folders. Move them, or give labels as a CSV."
            )
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(SUFFIXES)}).")
    return files, class_numbers(names) if names else None


def read_labels(path: Path) -> list[tuple[str, str]]:
    """(filename, label) of each row of the CSV; a first row `filename,label` is its heading."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The labels {path} cannot be read: {error}") from error
    if rows and [cell.lower() for cell in rows[0]] == ["filename", "label"]:
        rows = rows[1:]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or not all(row):
            raise InputError(f"{path}: entry {number} is {','.join(row)!r}; each has to be 'filename,label'.")
    return [(row[0], row[1]) for row in rows]


def class_numbers(names: list[str]) -> NDArray[np.int64]:
    """(N,): the labels themselves where all are whole numbers, else their places among the sorted names."""
    if all(name.isdecimal() for name in names):
        return np.array([int(name) for name in names], np.int64)
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)


def read_image(file: Path, how: Preprocessing) -> NDArray[np.float32]:
    """One image, (channels, height, width) or (height, width, channels). Errors: InputError for a broken file."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if how.mode == "L" else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{file} cannot be read as an image: {error}") from error
    if how.size is not None:
        image = _fitted(image, how.size, how)
    pixels: NDArray[Any] = np.asarray(image, np.float64).reshape(image.height, image.width, -1)
    pixels = pixels[:, :, ::-1] if how.mode == "BGR" else pixels
    array = ((pixels * how.scale - np.array(how.mean)) / np.array(how.std)).astype(np.float32)
    return np.ascontiguousarray(array.transpose(2, 0, 1)) if how.layout == "NCHW" else array


def _fitted(image: Image.Image, size: tuple[int, int], how: Preprocessing) -> Image.Image:
    height, width = size
    if how.fit == "stretch":
        return image.resize((width, height), Image.Resampling.BILINEAR)
    factor = max(height / image.height, width / image.width) / how.ratio
    target = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image.resize(target, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def stack_images(
    files: list[Path], how: Preprocessing, progress: Callable[[int, int, str], None]
) -> NDArray[np.float32]:
    """All images in one array, (N, C, H, W) or (N, H, W, C). Errors: InputError where their sizes differ."""
    first = read_image(files[0], how)
    stacked = np.empty((len(files), *first.shape), np.float32)
    for index, file in enumerate(files):
        image = read_image(file, how)
        if image.shape != first.shape:
            raise InputError(
                f"{file} has shape {image.shape}, {files[0].name} {first.shape}. Set `size: [height, width]`."
            )
        stacked[index] = image
        progress(index + 1, len(files), file.name)
    return stacked
