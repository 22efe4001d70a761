"""From a picture to the network's input, with NumPy and Pillow only.

Pixels are identical to timm's evaluation transform (``crop_mode="center"``) before normalisation.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
)
UNREADABLE = (
    OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError, ValueError,
    TypeError, IndexError,
)  # fmt: skip
"""What Pillow and its decoders raise on damaged files."""
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_MODES = {1: "L", 3: "RGB"}


class Preprocessing(Protocol):
    """How a network wants its pictures; the values are explained at ``records.model``."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, on the scale 0..1."""

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, on the same scale."""

    @property
    def resize_shorter(self) -> int:
        """Length of the shorter side before the crop (pixels)."""

    @property
    def interpolation(self) -> str:
        """``nearest``, ``bilinear`` or ``bicubic``."""


def is_picture(path: Path) -> bool:
    """By its suffix; hidden files, which some systems put beside pictures, are none."""
    known = path.suffix.lower() in PICTURE_SUFFIXES
    return known and not path.name.startswith(".") and path.is_file()


def resize_and_crop(image: Image.Image, pre: Preprocessing) -> NDArray[np.uint8]:
    """Bring a picture to the network's size, (H, W, C): resize the shorter side, crop the centre.

    Greyscale, palette, CMYK and transparent pictures become RGB (or grey for one channel).

    Raises:
        OSError: The picture does not decode.
        ValueError: The network wants neither one nor three channels.

    Source:
        ``transforms_imagenet_eval`` in timm, ``Resize`` and ``CenterCrop`` in torchvision.
    """
    channels, height, width = pre.input_size
    if channels not in _MODES:
        raise ValueError(f"a picture has 1 or 3 channels, the network wants {channels}")
    image = _convert(image, _MODES[channels])
    size = _resized(image.size, pre)
    if image.size != size:
        image = image.resize(size, _FILTERS[pre.interpolation])
    left, top = _margin(image.width, width), _margin(image.height, height)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)
    return pixels.reshape(height, width, channels)


def normalise(images: NDArray[np.uint8], pre: Preprocessing) -> NDArray[np.float32]:
    """(N, H, W, C) uint8 pixels / 255, less the mean, over the standard deviation: (N, C, H, W)."""
    planes = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255.0)
    shape = (1, -1, 1, 1)
    mean = np.asarray(pre.mean, dtype=np.float32).reshape(shape)
    std = np.asarray(pre.std, dtype=np.float32).reshape(shape)
    return np.ascontiguousarray((planes - mean) / std)


def filled_up(images: NDArray[Any], smallest: int) -> NDArray[Any]:
    """Repeat the last image until a batch, N > 0, is as large as an engine's smallest.

    The caller drops the outputs of the added images.
    """
    lacking = smallest - len(images)
    return np.concatenate([images, np.repeat(images[-1:], lacking, 0)]) if lacking > 0 else images


def _margin(have: int, want: int) -> int:
    """Pixels to cut on the left or top; below zero, black pixels to add. As torchvision."""
    return round((have - want) / 2.0) if have >= want else -((want - have) // 2)


def _resized(size: tuple[int, int], pre: Preprocessing) -> tuple[int, int]:
    """(width, height) before the crop."""
    width, height = size
    _, target_height, target_width = pre.input_size
    if target_height == target_width:
        short, long = sorted(size)
        if short == pre.resize_shorter:
            return size
        longer = int(pre.resize_shorter * long / short)
        wide = width > height
        return (longer, pre.resize_shorter) if wide else (pre.resize_shorter, longer)
    # A target that is not square is covered by the resized picture, with the same margin.
    margin = pre.resize_shorter / min(target_height, target_width)
    scale = min(height / int(target_height * margin), width / int(target_width * margin))
    return round(width / scale), round(height / scale)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit greys at 255
        grey = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert(mode)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
