"""From a picture to the network's input, with NumPy and Pillow only.

Pixels are identical to timm's evaluation transform (``crop_mode="center"``) before normalisation.
Where Pillow would clip what a picture holds, here is the rule instead:

- 16-bit (and 12-bit) greys become 8-bit by their high byte (their upper eight bits);
- floating-point greys from 0 to 1 are multiplied by 255 and rounded; others are refused;
- 32-bit integers are refused: nothing says which of their values is white.

Transparency is dropped, and of several frames the first is taken. A picture is not turned by its
EXIF orientation, as in timm and torchvision, unless the preprocessing says so (TIFF files are
always turned: Pillow does that itself).
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
"""What is opened, whatever a file is called. Pillow knows more, and runs Ghostscript for some."""
PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".pgm",
     ".ppm", ".pnm", ".pbm"}
)  # fmt: skip
UNREADABLE = (
    OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
    ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError,
    RuntimeError,
)  # fmt: skip
"""What Pillow and its decoders raise on damaged files: anything but a lack of memory."""
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation -> what brings the picture upright."""
_SYSTEM = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"}
_SLACK = 1e-3
"""How far floats may be outside 0..1; resampling overshoots a little."""
MOST_PIXELS = 2**27
"""Of a picture that is resized and not yet cropped: 512 MiB."""


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

    @property
    def exif_rotate(self) -> bool:
        """Whether a picture is turned by its EXIF orientation first."""


def open_picture(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Open a picture by its content, one of :data:`FORMATS`; its pixels are not read yet.

    Raises:
        OSError: The file cannot be read, is empty or of another format.
        DecompressionBombError: It says that it has more than Pillow's 179 million pixels.
    """
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as err:
        empty = isinstance(file, str | os.PathLike) and os.stat(file).st_size == 0
        known = ", ".join(FORMATS)
        words = "the file is empty" if empty else f"cannot identify image file: none of {known}"
        raise UnidentifiedImageError(words) from err


def is_hidden(name: str) -> bool:
    """Whether it is a file or folder that systems, not people, put beside pictures."""
    return name.startswith(".") or name.lower() in _SYSTEM


def find_pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures in a folder at any depth, and the other files there; both sorted.

    A picture is known by its suffix, or by its content where it has none. Links are followed;
    hidden files and folders are passed over. What is no file, such as a broken link, is no picture.

    Raises:
        OSError: A folder cannot be listed.
    """
    pictures: list[Path] = []
    others: list[Path] = []
    walked = set()
    for here, folders, names in os.walk(folder, onerror=_raised, followlinks=True):
        state = os.stat(here)
        if (place := (state.st_dev, state.st_ino)) in walked:  # a link that leads back
            folders.clear()
            continue
        walked.add(place)
        folders[:] = [name for name in folders if not is_hidden(name)]
        for path in (Path(here, name) for name in names if not is_hidden(name)):
            (pictures if _is_picture(path) else others).append(path)
    return sorted(pictures), sorted(others)


def oddities(image: Image.Image, pre: Preprocessing) -> tuple[str, ...]:
    """What a user may want to know of how a picture is taken, as ends of "3 of 512 pictures …".

    Raises:
        OSError: The picture does not decode.
    """
    several = _several_frames(image)
    image.load()
    found = []
    if _orientation(image) != 1:
        stored = "are taken as stored, as timm and torchvision do; build with --exif-rotate to turn"
        how = "were turned by it" if pre.exif_rotate else f"{stored} them"
        found.append(f"carry an EXIF orientation other than 1 and {how}")
    if several:
        found.append("have several frames, of which the first is taken")
    if image.mode == "F":
        found.append("are floating-point: 0 becomes black, 1 white")
    elif _deep_grey(image):
        found.append("have 16-bit (or 12-bit) greys, of which the upper eight bits are taken")
    elif _is_transparent(image):
        found.append("are transparent in places, where the colours that are stored show")
    return tuple(found)


def resize_and_crop(image: Image.Image, pre: Preprocessing) -> NDArray[np.uint8]:
    """Bring a picture to the network's size, (H, W, C): resize the shorter side, crop the centre.

    Greyscale, palette, CMYK and transparent pictures become RGB (or grey for one channel); the
    module says how deeper ones are scaled.

    Raises:
        OSError: The picture does not decode.
        ValueError: The network wants neither one nor three channels, or the picture's values have
            no known scale, or it is far too long and thin.

    Source:
        ``transforms_imagenet_eval`` in timm, ``Resize`` and ``CenterCrop`` in torchvision.
    """
    channels, height, width = pre.input_size
    if channels not in _MODES:
        raise ValueError(f"a picture has 1 or 3 channels, the network wants {channels}")
    image.load()
    if pre.exif_rotate and (turned := _TURNED.get(_orientation(image))) is not None:
        image = image.transpose(turned)
    image = _convert(image, _MODES[channels])
    size = _resized(image.size, pre)
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are too long and thin: {size[0]} x {size[1]} "
            f"before the crop, and {MOST_PIXELS:,} pixels are the most"
        )
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
    if image.mode == "F" or _deep_grey(image):
        return Image.fromarray(_eight_bits(image)).convert(mode)
    if image.mode == "I":
        raise ValueError(
            "32-bit integer pixels have no known scale; save it with 8 or 16 bits, or as floats "
            "from 0 to 1"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _deep_grey(image: Image.Image) -> bool:
    """Greys of 12 or 16 bits; Pillow opens some of them as 32-bit integers."""
    wide = image.mode == "I" and getattr(image, "format", None) in ("PPM", "PNG")
    return image.mode.startswith("I;16") or wide


def _eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W) greys of a deep picture, by the rules of this module."""
    grey = np.asarray(image)
    if image.mode != "F":
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # TIFF's BitsPerSample
        upper: NDArray[np.uint8] = (grey.astype(np.uint16) >> (bits - 8)).astype(np.uint8)
        return upper
    low, high = float(grey.min()), float(grey.max())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # so written for what is not a number
        raise ValueError(
            f"floating-point pixels from {low:g} to {high:g}; 0 (black) to 1 (white) is wanted"
        )
    scaled: NDArray[np.uint8] = np.rint(grey.clip(0, 1) * 255).astype(np.uint8)
    return scaled


def _is_transparent(image: Image.Image) -> bool:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode not in ("RGBA", "LA", "PA"):
        return False
    opaque, _ = image.getchannel("A").getextrema()
    return bool(opaque != 255)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 is upright, and what a picture without one has.

    Ask after the pixels are read: Pillow turns TIFF files itself, and then says 1.
    """
    try:
        said = image.getexif().get(_ORIENTATION, 1)
    except UNREADABLE:  # damaged EXIF in a sound picture
        return 1
    return said if said in _TURNED else 1


def _several_frames(image: Image.Image) -> bool:
    """Whether it is an animation or a document; a photo with a depth map beside it is neither."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except UNREADABLE:
        return False


def _is_picture(path: Path) -> bool:
    if not path.is_file() or path.suffix:
        return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
    try:
        with open_picture(path):
            return True
    except UNREADABLE:
        return False


def _raised(err: OSError) -> None:
    raise err
