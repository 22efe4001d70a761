"""The values that hold labelled images in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cswap_deploy.records.model import DataSpec, Preprocessing
from cswap_deploy.runtime.preprocess import normalise

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Labelled images of the network's size."""

    images: Pixels
    """(N, H, W, C) uint8, resized and cropped."""
    labels: Labels
    """(N,) class indices of the model; zeros where the task has no classes."""
    spec: DataSpec
    targets: NDArray[Any] | None = None
    """(N, ...) what the data says of the images, as it is, where the task has no classes: for the
    user's own metric."""


@dataclass(frozen=True, slots=True)
class Samples:
    """The images to measure effects on and those to test the result on."""

    calibration: ImageSet
    validation: ImageSet
    shared_images: int
    """Validation images whose pixels are also in the calibration set."""

    def notes(self) -> tuple[str, ...]:
        """Sentences on how labels were found, and what was left out or shared."""
        found = []
        for spec in (self.calibration.spec, self.validation.spec):
            if spec.mapping:
                found.append(f"{spec.source}: {spec.mapping}")
            if spec.unreadable:
                found.append(f"{spec.source}: unreadable, left out: {', '.join(spec.unreadable)}")
            found += [f"{spec.source}: {note}" for note in spec.notes]
        if self.shared_images:
            found.append(f"{self.shared_images} images are in both sets, as allowed")
        return tuple(dict.fromkeys(found))  # both sets often come from one source


def normalised_batches(
    images: ImageSet, preprocessing: Preprocessing, *, batch: int = 64
) -> Iterator[tuple[NDArray[np.float32], Labels]]:
    """Normalise in batches of (n, C, H, W): the float32 copy is never whole in memory."""
    for start in range(0, len(images.labels), batch):
        part = slice(start, start + batch)
        yield normalise(images.images[part], preprocessing), images.labels[part]


def digest(images: Pixels, labels: Labels, targets: NDArray[Any] | None = None) -> str:
    """sha256 over shape, pixels and labels, in order, and what else the data says of them."""
    hasher = hashlib.sha256(repr(images.shape).encode())
    hasher.update(np.ascontiguousarray(images).data)
    hasher.update(np.ascontiguousarray(labels).astype("<i8").data)
    if targets is not None:
        hasher.update(f"{targets.dtype}{targets.shape}".encode())
        hasher.update(np.ascontiguousarray(targets).data)
    return hasher.hexdigest()


def image_digest(image: Pixels) -> bytes:
    """sha256 of one image's pixels, to find images that two sets share."""
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()
