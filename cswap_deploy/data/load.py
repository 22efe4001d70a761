"""From what the user named to a calibration and a validation set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from cswap_deploy.config import DataConfig
from cswap_deploy.data.draw import Drawer, Request
from cswap_deploy.data.hub import open_hub, open_imagenet
from cswap_deploy.data.labels import (
    Classes,
    check_classes,
    check_count,
    check_variety,
    composed,
    read_class_map,
)
from cswap_deploy.data.sampling import split_counts, split_shares
from cswap_deploy.data.sets import ImageSet, Samples, image_digest
from cswap_deploy.data.sources import DATA_FIX, Source, open_folder, open_npz, open_plain, readable
from cswap_deploy.errors import UsageError
from cswap_deploy.models.demos import IMAGES
from cswap_deploy.progress import Phases
from cswap_deploy.records.model import ModelSpec

Part = Literal["calibration", "validation"]


def load_samples(config: DataConfig, *, model: ModelSpec, seed: int, progress: Phases) -> Samples:
    """Draw the images that effects are measured on and those that the result is tested on.

    Both are balanced by class as far as the source allows, chosen by the seed (whatever the order
    of the directory), and decoded only when chosen. Without ``data`` a demo model uses the images
    that ship with the package and an ImageNet-1k model streams its validation split from the hub.
    A source with fewer images than both sets ask for is divided between them. Photos without
    classes are pruned on; where there is nothing else, also tested on.
    No image of one set is in the other, by its pixels, unless ``config`` allows it.

    Raises:
        UsageError: The data cannot be read, mapped to the model's classes or kept apart, or it
            has too many unreadable images, or the calibration set has one class only.
        MissingDependencyError: The hub or the ``datasets`` package is needed and not there.
    """
    request = Request(model, seed, progress)
    demo, tested_on = model.source == "demo", config.validation_data or config.data
    if config.calibration_data is not None and (demo or tested_on is not None):
        source, wanted = _plain(config, model), config.validation_samples
        calibration = _take(request, source, config.calibration_samples, "calibration")
        source = _open(config, request, tested_on, wanted=wanted, part="validation")
        validation = _take(request, source, wanted, "validation")
    elif config.calibration_data is not None or (
        config.validation_data is None and (config.data is not None or not demo)
    ):
        calibration, validation = _both_of_one_source(config, request)
    else:
        calibration = _whole_set(config, request, "calibration")
        validation = _whole_set(config, request, "validation")
    _check_calibration(calibration, asked=config.calibration_samples)
    seen = _digests(calibration)
    shared = sum(image_digest(image) in seen for image in validation.images)
    if shared and not config.allow_overlap:
        raise UsageError(
            f"{shared} of {validation.spec.count} validation images from {validation.spec.source} "
            f"are also in the calibration set from {calibration.spec.source} (same pixels)",
            fix="pass sets that do not overlap, or --allow-overlap (the report will say so)",
        )
    return Samples(calibration, validation, shared)


def load_calibration(
    config: DataConfig, *, model: ModelSpec, seed: int, progress: Phases
) -> ImageSet:
    """Draw the calibration set alone, from all of ``config.data``; see :func:`load_samples`."""
    images = _whole_set(config, Request(model, seed, progress), "calibration")
    _check_calibration(images, asked=config.calibration_samples)
    return images


def _plain(config: DataConfig, model: ModelSpec) -> Source:
    """Photos without classes."""
    assert config.calibration_data is not None
    return open_plain(Path(config.calibration_data).expanduser(), model)


def _open(
    config: DataConfig, request: Request, data: str | None, *, wanted: int, part: Part
) -> Source:
    model = request.model
    if data is None:
        if model.source == "demo":
            file = IMAGES[part]
            return open_npz(file, Classes(model), name=f"{file.stem} (embedded)")
        if model.label_space == "imagenet-1k":
            return open_imagenet(request, wanted=wanted)
        if model.task != "classify":
            raise UsageError(
                f"{model.name} needs images; no labels are wanted for task {model.task}",
                fix="pass --data DIR of images, or --data FILE.npz with an array 'images'",
            )
        raise UsageError(
            f"{model.name} needs images: its classes are not known, so none can be fetched for it",
            fix=DATA_FIX,
        )
    given = read_class_map(config.class_map, model) if config.class_map is not None else None
    classes = Classes(model, given)
    if readable(data) != composed(data):
        raise UsageError(
            f"the path {readable(data)} is no UTF-8, so the manifest cannot name it",
            fix="rename the folder, or pass a link to it",
        )
    if data.startswith("hf:"):
        if model.task != "classify":
            raise UsageError(
                f"{data}: data sets of the hub are read for classifiers, not for task {model.task}",
                fix="pass --data DIR of images, or --data FILE.npz with an array 'images'",
            )
        return open_hub(data[3:], classes, request, wanted=wanted)
    path = Path(data).expanduser()
    if path.is_dir():
        return open_folder(path, classes)
    if path.is_file() and path.suffix.lower() == ".npz":
        return open_npz(path, classes)
    what = "is neither a folder nor an .npz file" if path.is_file() else "does not exist"
    raise UsageError(f"{path} {what}", fix=DATA_FIX)


def _both_of_one_source(config: DataConfig, request: Request) -> tuple[ImageSet, ImageSet]:
    """Calibration first, then validation from what is left."""
    wanted = (config.calibration_samples, config.validation_samples)
    if config.calibration_data is not None:
        source = _plain(config, request.model)
    else:
        source = _open(config, request, config.data, wanted=sum(wanted), part="calibration")
    total = len(source.labels)
    if config.allow_overlap and total < sum(wanted):
        return (
            _take(request, source, wanted[0], "calibration"),
            _take(request, source, wanted[1], "validation"),
        )
    if total < 2:
        raise UsageError(
            f"{source.name} has {total} image{'' if total else 's'}, too few for a calibration and "
            "a validation set"
        )
    drawer = Drawer(source, request)
    counts = split_counts(total, calibration=wanted[0], validation=wanted[1])
    first, second = split_shares(
        drawer.available(), calibration=counts[0], validation=counts[1], order=drawer.order
    )
    calibration = drawer.take(first, part="calibration")
    seen = frozenset() if config.allow_overlap else _digests(calibration)
    second = np.minimum(second, drawer.available())  # replacing unreadable ones may have taken more
    validation = drawer.take(second, part="validation", refuse=seen)
    notes = []
    if total < sum(wanted):
        notes.append(
            f"{total} images where {wanted[0]} + {wanted[1]} were asked for: divided into "
            f"{calibration.spec.count} for calibration and {validation.spec.count} for validation"
        )
    if drawer.refused:
        notes.append(f"{drawer.refused} copies of calibration images left out of validation")
    return _noted(calibration, notes), _noted(validation, notes)


def _whole_set(config: DataConfig, request: Request, part: Part) -> ImageSet:
    """A set that has a source of its own."""
    data, count = config.data, config.calibration_samples
    if part == "validation":
        data, count = config.validation_data, config.validation_samples
    return _take(request, _open(config, request, data, wanted=count, part=part), count, part)


def _take(request: Request, source: Source, count: int, part: Part) -> ImageSet:
    drawer = Drawer(source, request)
    shares, _ = split_shares(drawer.available(), calibration=count, order=drawer.order)
    images = drawer.take(shares, part=part)
    if images.spec.count == 0:
        raise UsageError(f"{source.name} has no images for the {part} set", fix=DATA_FIX)
    return images


def _check_calibration(images: ImageSet, *, asked: int) -> None:
    where = f"from {images.spec.source}"
    if images.spec.labelled:
        fix = DATA_FIX if asked > 1 else "raise --calibration-samples"
        check_classes(images.labels, where=where, fix=fix)
    else:
        check_count(len(images.labels), where=where)
    check_variety(images.images, where=where)


def _digests(images: ImageSet) -> frozenset[bytes]:
    return frozenset(map(image_digest, images.images))


def _noted(images: ImageSet, notes: list[str]) -> ImageSet:
    words = "; ".join([images.spec.mapping, *notes])
    return replace(images, spec=images.spec.model_copy(update={"mapping": words}))
