"""The values that hold labelled images in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

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
    """(N,) int64, class indices of the model."""
    spec: DataSpec


@dataclass(frozen=True, slots=True)
class Samples:
    """The images to measure effects on and those to score the result on."""

    calibration: ImageSet
    validation: ImageSet
    shared_images: int
    """Validation images whose pixels are also in the calibration set."""


def normalised(images: ImageSet, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """All images as the network's input, (N, C, H, W) float32."""
    return normalise(images.images, preprocessing)


def normalised_batches(
    images: ImageSet, preprocessing: Preprocessing, *, batch: int = 64
) -> Iterator[tuple[NDArray[np.float32], Labels]]:
    """The same in batches, so that the float32 copy of a large set is never whole in memory.

    Yields:
        (n, C, H, W) float32 and (n,) int64, with n at most ``batch``.
    """
    for start in range(0, len(images.labels), batch):
        part = slice(start, start + batch)
        yield normalise(images.images[part], preprocessing), images.labels[part]


def digest(images: Pixels, labels: Labels) -> str:
    """sha256 over shape, pixels and labels, in order."""
    hasher = hashlib.sha256(repr(images.shape).encode())
    hasher.update(np.ascontiguousarray(images).data)
    hasher.update(np.ascontiguousarray(labels).astype("<i8").data)
    return hasher.hexdigest()


def image_digest(image: Pixels) -> bytes:
    """sha256 of one image's pixels: what tells whether two sets share an image."""
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()
