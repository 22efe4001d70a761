"""Where labelled images come from: a folder, arrays in memory or in a file."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from cswap_deploy.data.labels import Mapping, check_range, map_names, read_class_map
from cswap_deploy.data.sets import Labels, Pixels
from cswap_deploy.errors import UsageError
from cswap_deploy.records.model import ModelSpec, Preprocessing
from cswap_deploy.runtime.preprocess import resize_and_crop

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
)
_FOLDER_FIX = "put the images of each class in a folder named by its index, synset or name"


class UnreadableError(Exception):
    """An image that does not decode; the message says why."""


class Source(Protocol):
    """Labelled images that are decoded one at a time."""

    @property
    def name(self) -> str:
        """As the user named it."""

    @property
    def labels(self) -> Labels:
        """(N,) class indices of the model."""

    @property
    def mapping(self) -> Mapping:
        """How the labels came about."""

    @property
    def broken(self) -> tuple[str, ...]:
        """Images that were already found not to decode, and are not among ``labels``."""

    def describe(self, index: int) -> str:
        """What to call image ``index`` in messages."""

    def read(self, index: int) -> Pixels:
        """(H, W, C) uint8 of the network's size.

        Raises:
            UnreadableError: The image does not decode.
        """


def decode(file: Path | IO[bytes], pre: Preprocessing) -> Pixels:
    """Decode one picture and bring it to the network's size.

    Raises:
        UnreadableError: With Pillow's words; a truncated file counts.
    """
    try:
        with Image.open(file) as image:
            return resize_and_crop(image, pre)
    except UnidentifiedImageError as err:
        raise UnreadableError("no image format that Pillow knows") from err
    except (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as err:
        raise UnreadableError(str(err)) from err
    except (ValueError, TypeError, IndexError) as err:  # what Pillow's decoders raise on bad data
        raise UnreadableError(f"{type(err).__name__}: {err}") from err


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Class folders of image files."""

    name: str
    root: Path
    files: tuple[Path, ...]
    labels: Labels
    mapping: Mapping
    preprocessing: Preprocessing
    broken: tuple[str, ...] = ()

    def describe(self, index: int) -> str:
        """The file, relative to the folder."""
        return self.files[index].relative_to(self.root).as_posix()

    def read(self, index: int) -> Pixels:
        """Decode one file."""
        return decode(self.files[index], self.preprocessing)


@dataclass(frozen=True, slots=True)
class ArraySource:
    """Images in memory; those of the network's size already are taken as they are."""

    name: str
    images: Sequence[Pixels] | Pixels
    labels: Labels
    mapping: Mapping
    preprocessing: Preprocessing
    broken: tuple[str, ...] = ()

    def describe(self, index: int) -> str:
        """Its position."""
        return f"image {index}"

    def read(self, index: int) -> Pixels:
        """(H, W, C) of the network's size."""
        image = self.images[index]
        channels, height, width = self.preprocessing.input_size
        if image.shape == (height, width, channels):
            return image
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        return resize_and_crop(Image.fromarray(np.ascontiguousarray(pixels)), self.preprocessing)


def open_folder(root: Path, *, model: ModelSpec, class_map: Path | None) -> FolderSource:
    """List a folder of class folders; nothing is decoded yet.

    Raises:
        UsageError: There are no class folders with images, or a name cannot be mapped.
    """
    by_name: dict[str, list[Path]] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = [
            p
            for p in folder.rglob("*")
            if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
        ]
        if files:
            by_name[folder.name] = sorted(files)
    if not by_name:
        loose = sum(p.suffix.lower() in IMAGE_SUFFIXES for p in root.iterdir() if p.is_file())
        what = f"{loose} images without class folders" if loose else "no class folders with images"
        raise UsageError(f"{root} holds {what}", fix=_FOLDER_FIX)
    if model.preprocessing.input_size[0] not in (1, 3):
        raise UsageError(
            f"{model.name} takes {model.preprocessing.input_size[0]} channels, which image files "
            "do not have",
            fix="pass the images as an .npz file with an array 'images' (N, H, W, C) uint8",
        )
    given = read_class_map(class_map, model) if class_map is not None else None
    mapping = map_names(list(by_name), model=model, class_map=given, where=str(root))
    files = [f for name in by_name for f in by_name[name]]
    labels = [mapping.indices[name] for name in by_name for _ in by_name[name]]
    return FolderSource(
        name=str(root),
        root=root,
        files=tuple(files),
        labels=np.array(labels, dtype=np.int64),
        mapping=mapping,
        preprocessing=model.preprocessing,
    )


def open_npz(
    path: Path, *, model: ModelSpec, class_map: Path | None, name: str | None = None
) -> ArraySource:
    """Read ``images`` (N, H, W, C) or (N, H, W) uint8 and ``labels`` (N,) from an ``.npz`` file.

    Labels are class indices of the model, or keys of the class map. Nothing is unpickled.

    Raises:
        UsageError: The file is no such archive, or its arrays do not fit each other or the model.
    """
    fix = "save numpy arrays 'images' (N, H, W, C) uint8 and 'labels' (N,) with numpy.savez"
    try:
        with np.load(path, allow_pickle=False) as archive:
            absent = [key for key in ("images", "labels") if key not in archive.files]
            if absent:
                raise UsageError(
                    f"{path} has no array {' and no array '.join(map(repr, absent))}; it has "
                    f"{', '.join(archive.files) or 'nothing'}",
                    fix=fix,
                )
            images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as err:
        raise UsageError(f"cannot read {path}: {err}", fix=fix) from err
    images = _checked_images(images, path=path, model=model)
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),):
        raise UsageError(f"{path}: images {images.shape} and labels {labels.shape} do not match")
    mapping = Mapping({}, "labels are class indices")
    if class_map is not None:
        given = read_class_map(class_map, model)
        keys = [str(v) for v in labels.tolist()]
        mapping = map_names(sorted(set(keys)), model=model, class_map=given, where=str(path))
        labels = np.array([mapping.indices[k] for k in keys], dtype=np.int64)
    elif labels.dtype.kind == "U":
        keys = labels.tolist()
        mapping = map_names(sorted(set(keys)), model=model, class_map=None, where=str(path))
        labels = np.array([mapping.indices[k] for k in keys], dtype=np.int64)
    elif labels.dtype.kind not in "iu":
        raise UsageError(f"{path}: labels are {labels.dtype}, integers are wanted", fix=fix)
    labels = labels.astype(np.int64)
    check_range(labels, model, where=str(path))
    return ArraySource(
        name=name or str(path),
        images=images,
        labels=labels,
        mapping=mapping,
        preprocessing=model.preprocessing,
    )


def _checked_images(images: Pixels, *, path: Path, model: ModelSpec) -> Pixels:
    """(N, H, W, C) that the model's preprocessing can take."""
    if images.dtype != np.uint8:
        raise UsageError(
            f"{path}: images are {images.dtype}, uint8 pixels (0..255) are wanted",
            fix="save them before normalisation, for example (255 * x).round().astype('uint8')",
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise UsageError(f"{path}: images have shape {images.shape}, (N, H, W, C) is wanted")
    channels, height, width = model.preprocessing.input_size
    fits = images.shape[1:] == (height, width, channels)
    if not fits and (images.shape[3] not in (1, 3, 4) or channels not in (1, 3)):
        hint = "; the channels come last" if images.shape[1] in (1, 3, 4) else ""
        raise UsageError(
            f"{path}: images have shape {images.shape}, (N, H, W, C) with 1, 3 or 4 channels "
            f"is wanted, or (N, {height}, {width}, {channels}) exactly{hint}"
        )
    return images
