"""Labelled images in a folder or in arrays, decoded one at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cswap_deploy.data.labels import PLAIN, UNLABELLED, Classes, ClassMapping
from cswap_deploy.data.sets import Labels, Pixels
from cswap_deploy.errors import UsageError
from cswap_deploy.records.model import ModelSpec, Preprocessing
from cswap_deploy.runtime.preprocess import (
    PICTURE_SUFFIXES,
    UNREADABLE,
    is_picture,
    resize_and_crop,
)

DATA_FIX = "pass --data DIR (class folders), --data FILE.npz or --data hf:NAME[:split]"
_ARRAYS_FIX = (
    "save numpy arrays 'images' (N, H, W, C) uint8 and 'labels' (N,) with numpy.savez; labels are "
    "not needed with --task features, dense, detect or any"
)
_FOLDER_FIX = (
    "put the images of each class in a folder named by its index, synset or name; --task features "
    "where the outputs are no classes"
)


@dataclass(frozen=True, slots=True)
class Source:
    """Labelled images that are decoded one at a time."""

    name: str
    """As the user wrote it."""
    labels: Labels
    """(N,) class indices of the model."""
    mapping: ClassMapping
    """Names of the data, where the labels came from names."""
    read: Callable[[int], Pixels | str]
    """(H, W, C) of the network's size, or why the image does not decode."""
    describe: Callable[[int], str] = "image {}".format
    """Name of an image for messages."""
    targets: NDArray[Any] | None = None
    """(N, ...) labels as they are, where the task has no classes."""
    broken: tuple[str, ...] = ()
    """Images that did not decode while the source was opened; not among ``labels``."""


def decode(file: Path | IO[bytes], pre: Preprocessing) -> Pixels | str:
    """Bring one picture to the network's size, or say in Pillow's words why it does not decode."""
    try:
        with Image.open(file) as image:
            return resize_and_crop(image, pre)
    except UnidentifiedImageError:
        return "no image format that Pillow knows"
    except UNREADABLE as err:
        vague = isinstance(err, ValueError | TypeError | IndexError)
        return f"{type(err).__name__}: {err}" if vague else str(err)


def open_folder(root: Path, classes: Classes) -> Source:
    """List a folder of class folders; nothing is decoded yet.

    For a task without classes all pictures count, at any depth, and folders say nothing.

    Raises:
        UsageError: There are no class folders with images, or a name cannot be mapped.
    """
    if classes.model.task != "classify":
        return _open_pictures(root, classes.model)
    by_name: dict[str, list[Path]] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if files := sorted(path for path in folder.rglob("*") if is_picture(path)):
            by_name[folder.name] = files
    if not by_name:
        loose = sum(p.suffix.lower() in PICTURE_SUFFIXES for p in root.iterdir() if p.is_file())
        what = f"{loose} images without class folders" if loose else "no class folders with images"
        raise UsageError(f"{root} holds {what}", fix=_FOLDER_FIX)
    preprocessing = classes.model.preprocessing
    _check_channels(classes.model)
    mapping = classes.map_names(list(by_name), where=str(root))
    files = [file for found in by_name.values() for file in found]
    labels = [mapping.indices[name] for name, found in by_name.items() for _ in found]
    return Source(
        str(root), np.array(labels, dtype=np.int64), mapping,
        read=lambda i: decode(files[i], preprocessing),
        describe=lambda i: files[i].relative_to(root).as_posix(),
    )  # fmt: skip


def _open_pictures(root: Path, model: ModelSpec) -> Source:
    """All pictures of a folder, without labels."""
    files = sorted(path for path in root.rglob("*") if is_picture(path))
    if not files:
        raise UsageError(f"{root} holds no images", fix="put the images there, in any folders")
    _check_channels(model)
    return Source(
        str(root), np.zeros(len(files), dtype=np.int64), UNLABELLED,
        read=lambda i: decode(files[i], model.preprocessing),
        describe=lambda i: files[i].relative_to(root).as_posix(),
    )  # fmt: skip


def _check_channels(model: ModelSpec) -> None:
    channels = model.preprocessing.input_size[0]
    if channels not in (1, 3):
        raise UsageError(
            f"{model.name} takes {channels} channels, which image files do not have",
            fix="pass the images as an .npz file with an array 'images' (N, H, W, C) uint8",
        )


def open_npz(path: Path, classes: Classes, *, name: str | None = None) -> Source:
    """Read ``images`` (N, H, W, C) or (N, H, W) uint8 and ``labels`` (N,) from an ``.npz`` file.

    Labels are class indices of the model, or keys of the class map. Nothing is unpickled. Images
    of the network's size are taken as they are. For a task without classes labels may be absent, or
    anything with one row an image.

    Raises:
        UsageError: The file is no such archive, or its arrays do not fit each other or the model.
    """
    classify = classes.model.task == "classify"
    needed = ("images", "labels") if classify else ("images",)
    try:
        with np.load(path, allow_pickle=False) as archive:
            absent = [key for key in needed if key not in archive.files]
            if absent:
                raise UsageError(
                    f"{path} has no array {' and no array '.join(map(repr, absent))}; it has "
                    f"{', '.join(archive.files) or 'nothing'}",
                    fix=_ARRAYS_FIX,
                )
            images = archive["images"]
            labels = archive["labels"] if "labels" in archive.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as err:
        raise UsageError(f"cannot read {path}: {err}", fix=_ARRAYS_FIX) from err
    preprocessing = classes.model.preprocessing
    images = _checked_images(images, path, preprocessing)
    if not classify:
        if labels is not None and labels.shape[:1] != (len(images),):
            raise UsageError(
                f"{path}: images {images.shape} and labels {labels.shape} do not match"
            )
        return Source(
            name or str(path), np.zeros(len(images), dtype=np.int64), UNLABELLED,
            read=lambda i: _resized(images[i], preprocessing), targets=labels,
        )  # fmt: skip
    assert labels is not None
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),):
        raise UsageError(
            f"{path}: images {images.shape} and labels {labels.shape} do not match",
            fix="pass (N,) class indices, or --task binary for (N, K) labels of yes or no",
        )
    indices, mapping = _class_indices(labels, classes, where=str(path))
    return Source(
        name or str(path), indices, mapping, read=lambda i: _resized(images[i], preprocessing)
    )


def _resized(image: Pixels, preprocessing: Preprocessing) -> Pixels:
    channels, height, width = preprocessing.input_size
    if image.shape == (height, width, channels):
        return image
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    return resize_and_crop(Image.fromarray(np.ascontiguousarray(pixels)), preprocessing)


def _class_indices(
    labels: NDArray[Any], classes: Classes, *, where: str
) -> tuple[Labels, ClassMapping]:
    """The model's class indices, from indices or names."""
    mapping = PLAIN
    if classes.class_map is not None or labels.dtype.kind == "U":
        keys = [str(v) for v in labels.tolist()]
        mapping = classes.map_names(sorted(set(keys)), where=where)
        labels = np.array([mapping.indices[k] for k in keys])
    elif labels.dtype.kind not in "iu":
        raise UsageError(
            f"{where}: labels are {labels.dtype}, integers are wanted", fix=_ARRAYS_FIX
        )
    indices: Labels = labels.astype(np.int64)
    classes.check(indices, where=where)
    return indices, mapping


def _checked_images(images: Pixels, path: Path, preprocessing: Preprocessing) -> Pixels:
    """(N, H, W, C) that the network's preprocessing can take."""
    if images.dtype != np.uint8:
        raise UsageError(
            f"{path}: images are {images.dtype}, uint8 pixels (0..255) are wanted",
            fix="save them before normalisation, for example (255 * x).round().astype('uint8')",
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise UsageError(f"{path}: images have shape {images.shape}, (N, H, W, C) is wanted")
    channels, height, width = preprocessing.input_size
    fits = images.shape[1:] == (height, width, channels)
    if not fits and (images.shape[3] not in (1, 3, 4) or channels not in (1, 3)):
        hint = "; the channels come last" if images.shape[1] in (1, 3, 4) else ""
        raise UsageError(
            f"{path}: images have shape {images.shape}, (N, H, W, C) with 1, 3 or 4 channels "
            f"is wanted, or (N, {height}, {width}, {channels}) exactly{hint}"
        )
    return images
