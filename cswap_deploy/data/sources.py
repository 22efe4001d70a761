"""Labelled images in a folder or in arrays, decoded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cswap_deploy.data.archives import read_arrays
from cswap_deploy.data.labels import PLAIN, UNLABELLED, Classes, ClassMapping, composed, some
from cswap_deploy.data.sets import Labels, Pixels
from cswap_deploy.errors import UsageError
from cswap_deploy.records.model import ModelSpec, Preprocessing
from cswap_deploy.runtime.preprocess import (
    PICTURE_SUFFIXES,
    UNREADABLE,
    find_pictures,
    is_hidden,
    oddities,
    open_picture,
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

_MANY_PIXELS = 2**25
_LARGE = Lock()


@dataclass(frozen=True, slots=True)
class Decoded:
    """One image of the network's size."""

    pixels: Pixels
    """(H, W, C)."""
    oddities: tuple[str, ...] = ()
    """See :func:`~cswap_deploy.runtime.preprocess.oddities`."""


@dataclass(frozen=True, slots=True)
class Source:
    """Labelled images that are decoded one at a time."""

    name: str
    """As the user wrote it."""
    labels: Labels
    """(N,) class indices of the model."""
    mapping: ClassMapping
    """Names of the data, where the labels came from names."""
    read: Callable[[int], Decoded | str]
    """The image, or why it does not decode."""
    describe: Callable[[int], str] = "image {}".format
    """Name of an image for messages."""
    targets: NDArray[Any] | None = None
    """(N, ...) labels as they are, where the task has no classes."""
    broken: tuple[str, ...] = ()
    """Images that did not decode while the source was opened; not among ``labels``."""
    notes: tuple[str, ...] = ()
    """What the user should know of it; see ``records.model.DataSpec``."""
    labelled: bool = True
    """Whether classes were read; else ``labels`` are zeros."""


def decode(file: Path | IO[bytes], pre: Preprocessing) -> Decoded | str:
    """Bring one picture to the network's size, or say in Pillow's words why it does not decode."""
    try:
        with open_picture(file) as image, _one_at_a_time(image):
            odd = oddities(image, pre)
            return Decoded(resize_and_crop(image, pre), odd)
    except UNREADABLE as err:
        return _words(err)


def _words(err: BaseException) -> str:
    plain = isinstance(err, OSError | ValueError | SyntaxError | EOFError)
    return str(err) if plain else f"{type(err).__name__}: {err}"


def _one_at_a_time(image: Image.Image) -> AbstractContextManager[object]:
    """A large picture takes a GiB while it is decoded; several threads decode."""
    return _LARGE if image.width * image.height > _MANY_PIXELS else nullcontext()


def open_plain(path: Path, model: ModelSpec) -> Source:
    """Images without classes: all pictures of a folder, at any depth, or those of an ``.npz`` file.

    Raises:
        UsageError: It is neither, or has no images that fit.
    """
    if path.is_dir():
        return _open_pictures(path, model)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _plain_npz(path, model)
    what = "is neither a folder nor an .npz file" if path.is_file() else "does not exist"
    raise UsageError(f"{path} {what}", fix="pass --calibration-data DIR of photos, in any folders")


def open_folder(root: Path, classes: Classes) -> Source:
    """List a folder of class folders; nothing is decoded yet.

    Pictures at any depth below a class folder are of that class. Hidden files are passed over, and
    what else is no picture is said in a note.

    For a task without classes all pictures count, at any depth, and folders say nothing.

    Raises:
        UsageError: There are no class folders with images, they cannot be listed, or a name cannot
            be mapped.
    """
    if classes.model.task != "classify":
        return _open_pictures(root, classes.model)
    try:
        found, others = _list(root)
    except OSError as err:
        raise _not_listed(err) from err
    by_name = {name: files for name, files in found.items() if files}
    where = readable(str(root))
    if not by_name:
        raise UsageError(f"{where} holds {_what_there_is(others, root)}", fix=_FOLDER_FIX)
    _check_depth(by_name, root)
    preprocessing = classes.model.preprocessing
    _check_channels(classes.model)
    empty = [name for name in found if name not in by_name]
    mapping = classes.map_names(list(by_name), where=where, empty=empty)
    files = [file for of_class in by_name.values() for file in of_class]
    labels = np.array(
        [mapping.indices[name] for name, of_class in by_name.items() for _ in of_class],
        dtype=np.int64,
    )

    def describe(index: int) -> str:
        return readable(files[index].relative_to(root).as_posix())

    return Source(
        where, labels, mapping, read=lambda i: decode(files[i], preprocessing), describe=describe,
        notes=(
            *_folder_notes(root, by_name, empty, others),
            *classes.coverage(labels, mapping),
        ),
    )  # fmt: skip


def _open_pictures(root: Path, model: ModelSpec) -> Source:
    """All pictures of a folder, without labels."""
    where = readable(str(root))
    try:
        files, others = find_pictures(root)
    except OSError as err:
        raise _not_listed(err) from err
    if not files:
        raise UsageError(f"{where} holds no images", fix="put the images there, in any folders")
    _check_channels(model)

    def describe(index: int) -> str:
        return readable(files[index].relative_to(root).as_posix())

    return Source(
        where, np.zeros(len(files), dtype=np.int64), UNLABELLED,
        read=lambda i: decode(files[i], model.preprocessing), describe=describe,
        notes=tuple(_left_out(root, others, "as no pictures by their names, or broken links")),
        labelled=False,
    )  # fmt: skip


def _not_listed(err: OSError) -> UsageError:
    return UsageError(
        f"cannot list {err.filename}: {err.strerror}", fix="let it be read, or remove it"
    )


def _check_channels(model: ModelSpec) -> None:
    channels = model.preprocessing.input_size[0]
    if channels not in (1, 3):
        raise UsageError(
            f"{model.name} takes {channels} channels, which image files do not have",
            fix="pass the images as an .npz file with an array 'images' (N, H, W, C) uint8",
        )


def readable(name: str) -> str:
    """A name as it can be shown, saved and compared: one spelling for each accented letter, and
    bytes that are no text as escapes."""
    text = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return composed(text)


def _list(root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The pictures of each class folder, and all other files there and beside them."""
    inside = sorted(path for path in root.iterdir() if not is_hidden(path.name))
    others = [path for path in inside if not path.is_dir()]
    found: dict[str, list[Path]] = {}
    for folder in filter(Path.is_dir, inside):
        pictures, more = find_pictures(folder)
        found.setdefault(readable(folder.name), []).extend(pictures)
        others += more
    return found, others


def _what_there_is(others: Sequence[Path], root: Path) -> str:
    """What stands in the place of class folders with images."""
    loose = sum(path.suffix.lower() in PICTURE_SUFFIXES for path in others if path.parent == root)
    if loose:
        return f"{loose} images without class folders"
    names = [readable(path.relative_to(root).as_posix()) for path in others]
    strange = f"; files that are no pictures by their names: {some(names)}" if names else ""
    return f"no class folders with images{strange}"


def _check_depth(by_name: dict[str, list[Path]], root: Path) -> None:
    """Refuse a folder around the folder of class folders, as archives often leave one."""
    if len(by_name) > 1:
        return
    ((name, files),) = by_name.items()
    deeper = sorted({readable(path.relative_to(root).parts[1]) for path in files})
    if len(deeper) > 1 and all(len(path.relative_to(root).parts) > 2 for path in files):
        raise UsageError(
            f"{readable(str(root))} holds the single folder {name}, with the folders "
            f"{some(deeper)}: these are the classes, it seems",
            fix=f"pass {readable(str(root / name))}",
        )


def _folder_notes(
    root: Path, by_name: dict[str, list[Path]], empty: Sequence[str], others: Sequence[Path]
) -> list[str]:
    notes = []
    if empty:
        verb = "has" if len(empty) == 1 else "have"
        notes.append(f"{len(empty)} of {len(by_name) + len(empty)} class folders {verb} no "
                     f"pictures: {some(empty)}")  # fmt: skip
    relative = [path.relative_to(root) for files in by_name.values() for path in files]
    nested = sorted({readable(p.parent.as_posix()) for p in relative if len(p.parts) > 2})
    if nested:
        notes.append(f"pictures of folders within class folders are of the outer class: "
                     f"{some(nested)}")  # fmt: skip
    why = "as no pictures by their names, not in a class folder, or broken links"
    return [*notes, *_left_out(root, others, why)]


def _left_out(root: Path, files: Sequence[Path], why: str) -> list[str]:
    if not files:
        return []
    names = [readable(path.relative_to(root).as_posix()) for path in files]
    return [f"{len(files)} file{'' if len(files) == 1 else 's'} left out, {why}: {some(names)}"]


def open_npz(path: Path, classes: Classes, *, name: str | None = None) -> Source:
    """Read ``images`` (N, H, W, C) or (N, H, W) uint8 and ``labels`` (N,) from an ``.npz`` file.

    Labels are class indices of the model, or keys of the class map. Nothing is unpickled. Images
    of the network's size are taken as they are. For a task without classes labels may be absent, or
    anything with one row an image.

    Raises:
        UsageError: The file is no such archive, or its arrays do not fit each other or the model.
    """
    if classes.model.task != "classify":
        return _plain_npz(path, classes.model, name=name)
    preprocessing = classes.model.preprocessing
    images, labels = _arrays(path, ("images", "labels"), preprocessing)
    assert labels is not None
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),):
        raise UsageError(
            f"{path}: images {images.shape} and labels {labels.shape} do not match",
            fix="pass (N,) class indices, or --task binary for (N, K) labels of yes or no",
        )
    indices, mapping = _class_indices(labels, classes, where=str(path))
    return Source(
        name or str(path), indices, mapping,
        read=lambda i: _resized(images[i], preprocessing),
        notes=tuple(classes.coverage(indices, mapping)),
    )  # fmt: skip


def _plain_npz(path: Path, model: ModelSpec, *, name: str | None = None) -> Source:
    """Images of an ``.npz`` file; what else it says of them is kept as it is."""
    preprocessing = model.preprocessing
    images, labels = _arrays(path, ("images",), preprocessing)
    if labels is not None and labels.shape[:1] != (len(images),):
        raise UsageError(f"{path}: images {images.shape} and labels {labels.shape} do not match")
    return Source(
        name or str(path), np.zeros(len(images), dtype=np.int64), UNLABELLED,
        read=lambda i: _resized(images[i], preprocessing), targets=labels, labelled=False,
    )  # fmt: skip


def _arrays(
    path: Path, needed: Sequence[str], preprocessing: Preprocessing
) -> tuple[Pixels, NDArray[Any] | None]:
    """``images`` (N, H, W, C) that fit, and ``labels`` where there are some."""
    found = read_arrays(path, needed, ("labels",), fix=_ARRAYS_FIX)
    return _checked_images(found["images"], path, preprocessing), found.get("labels")


def _resized(image: Pixels, preprocessing: Preprocessing) -> Decoded | str:
    channels, height, width = preprocessing.input_size
    if image.shape == (height, width, channels):
        return Decoded(image)
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    try:
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        return Decoded(resize_and_crop(picture, preprocessing))
    except UNREADABLE as err:
        return _words(err)


def _class_indices(
    labels: NDArray[Any], classes: Classes, *, where: str
) -> tuple[Labels, ClassMapping]:
    """The model's class indices, from indices or names."""
    mapping = PLAIN
    if classes.class_map is not None or labels.dtype.kind == "U":
        keys = [readable(str(v)) for v in labels.tolist()]
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
        raise UsageError(
            f"{path}: images have shape {images.shape}, (N, H, W, C) is wanted", fix=_ARRAYS_FIX
        )
    if 0 in images.shape[1:]:
        raise UsageError(f"{path}: images have shape {images.shape}: no pixels", fix=_ARRAYS_FIX)
    channels, height, width = preprocessing.input_size
    fits = images.shape[1:] == (height, width, channels)
    if not fits and (images.shape[3] not in (1, 3, 4) or channels not in (1, 3)):
        hint = "; the channels come last" if images.shape[1] in (1, 3, 4) else ""
        raise UsageError(
            f"{path}: images have shape {images.shape}, (N, H, W, C) with 1, 3 or 4 channels "
            f"is wanted, or (N, {height}, {width}, {channels}) exactly{hint}",
            fix="save images.transpose(0, 2, 3, 1)" if hint else _ARRAYS_FIX,
        )
    return images
