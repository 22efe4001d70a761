"""From a picture to the network's input, with NumPy and Pillow only.

Pixels are identical to timm's evaluation transform (``crop_mode="center"``) before normalisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from cswap_deploy.records.model import Preprocessing as Recorded
    from cswap_deploy.runtime.bundle import Transform

    Preprocessing = Recorded | Transform

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_MODES = {1: "L", 3: "RGB"}


def resize_and_crop(image: Image.Image, pre: Preprocessing) -> NDArray[np.uint8]:
    """Bring a picture to the network's size: resize the shorter side, crop the centre.

    Greyscale, palette, CMYK and transparent pictures become RGB (or grey for one channel).

    Args:
        image: Any Pillow picture.
        pre: The network's preprocessing; ``resize_shorter`` in pixels.

    Returns:
        (H, W, C) uint8.

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
    """Divide by 255, subtract the mean, divide by the standard deviation.

    Args:
        images: (N, H, W, C) uint8, of the network's size.
        pre: The network's preprocessing; mean and std on the scale 0..1.

    Returns:
        (N, C, H, W) float32, contiguous.
    """
    planes = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255.0)
    shape = (1, -1, 1, 1)
    mean = np.asarray(pre.mean, dtype=np.float32).reshape(shape)
    std = np.asarray(pre.std, dtype=np.float32).reshape(shape)
    return np.ascontiguousarray((planes - mean) / std)


def filled_up(images: NDArray[Any], smallest: int) -> NDArray[Any]:
    """The batch as it is, or its last image repeated where an engine wants more of them.

    Args:
        images: (N, ...), N of 1 or more.
        smallest: What the engine's profile begins with.

    Returns:
        (max(N, smallest), ...); what the added images give is to be left out.
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
