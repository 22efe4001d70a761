"""From what the user named to a calibration and a validation set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cswap_deploy.data.draw import Drawer, Progress
from cswap_deploy.data.hub import open_hub, open_imagenet
from cswap_deploy.data.sampling import Counts, split_counts, split_shares
from cswap_deploy.data.sets import ImageSet, Samples, image_digest
from cswap_deploy.data.sources import Source, open_folder, open_npz
from cswap_deploy.errors import UsageError
from cswap_deploy.records.model import ModelSpec

_DATA_FIX = (
    "pass --data DIR (class folders), --data FILE.npz (images, labels) or --data hf:NAME[:split]"
)
_ZOO = Path(__file__).resolve().parent.parent / "models" / "zoo"
_NOTHING: frozenset[bytes] = frozenset()


def load_samples(
    *,
    data: str | None,
    validation_data: str | None,
    model: ModelSpec,
    calibration_samples: int,
    validation_samples: int,
    class_map: Path | None = None,
    allow_overlap: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Samples:
    """Draw the images that effects are measured on and those that the result is scored on.

    Both are balanced by class as far as the source allows, chosen by the seed (whatever the order
    of the directory), and decoded only when chosen. Without ``data`` a demo model uses the images
    that ship with the package and an ImageNet-1k model streams its validation split from the hub.
    A source with fewer images than both sets ask for is divided between them.

    Args:
        data: A folder of class folders, an ``.npz`` file, or ``hf:NAME[:split]``.
        validation_data: The same for the validation set alone.
        model: Whose preprocessing and class indices are wanted.
        calibration_samples: Images to measure on.
        validation_samples: Images to score on.
        class_map: JSON object, folder or label name -> class index.
        allow_overlap: Let an image be in both sets; ``shared_images`` counts them.
        seed: Of the choice.
        progress: Called with images done, images in all, and what is being read.

    Returns:
        The two sets; no image of one is in the other, by its pixels, unless allowed.

    Raises:
        UsageError: The data cannot be read, mapped to the model's classes or kept apart, or it
            has too many unreadable images, or calibration would see one class only.
        MissingDependencyError: The hub or the ``datasets`` package is needed and not there.
    """
    wanted = (calibration_samples, validation_samples)
    if validation_data is None and (data is not None or model.source != "demo"):
        source = _open(
            data,
            wanted=sum(wanted),
            part="",
            model=model,
            class_map=class_map,
            seed=seed,
            progress=progress,
        )
        calibration, validation = _from_one(
            source,
            model=model,
            wanted=wanted,
            allow_overlap=allow_overlap,
            seed=seed,
            progress=progress,
        )
    else:
        first, second = (
            _draw_all(
                _open(
                    where,
                    wanted=count,
                    part=part,
                    model=model,
                    class_map=class_map,
                    seed=seed,
                    progress=progress,
                ),
                model=model,
                count=count,
                seed=seed,
                progress=progress,
                what=f"{part} images",
            )
            for where, count, part in (
                (data, wanted[0], "calibration"),
                (validation_data, wanted[1], "validation"),
            )
        )
        calibration, validation = first, second
    _check_calibration(calibration, asked=calibration_samples)
    return Samples(
        calibration=calibration,
        validation=validation,
        shared_images=_shared(calibration, validation, allow_overlap=allow_overlap),
    )


def _open(
    data: str | None,
    *,
    wanted: int,
    part: str,
    model: ModelSpec,
    class_map: Path | None,
    seed: int,
    progress: Progress | None,
) -> Source:
    if data is None:
        if model.source == "demo":
            stem = "fashion-mnist-calibration" if part == "calibration" else "fashion-mnist-test"
            return open_npz(
                _ZOO / f"{stem}.npz", model=model, class_map=None, name=f"{stem} (embedded)"
            )
        if model.label_space == "imagenet-1k":
            return open_imagenet(wanted=wanted, model=model, seed=seed, progress=progress)
        raise UsageError(
            f"{model.name} needs images: its classes are not known, so none can be fetched for it",
            fix=_DATA_FIX,
        )
    if data.startswith("hf:"):
        return open_hub(
            data[3:], wanted=wanted, model=model, class_map=class_map, seed=seed, progress=progress
        )
    path = Path(data).expanduser()
    if path.is_dir():
        return open_folder(path, model=model, class_map=class_map)
    if path.is_file() and path.suffix.lower() == ".npz":
        return open_npz(path, model=model, class_map=class_map)
    if path.is_file():
        raise UsageError(f"{path} is neither a folder nor an .npz file", fix=_DATA_FIX)
    raise UsageError(f"{path} does not exist", fix=_DATA_FIX)


def _from_one(
    source: Source,
    *,
    model: ModelSpec,
    wanted: tuple[int, int],
    allow_overlap: bool,
    seed: int,
    progress: Progress | None,
) -> tuple[ImageSet, ImageSet]:
    """Calibration first, then validation from what is left."""
    total = len(source.labels)
    if allow_overlap and total < sum(wanted):
        both = [
            _draw_all(source, model=model, count=count, seed=seed, progress=progress, what=what)
            for count, what in zip(wanted, ("calibration images", "validation images"), strict=True)
        ]
        return both[0], both[1]
    if total < 2:
        raise UsageError(
            f"{source.name} has {total} image{'' if total else 's'}, too few for a calibration and "
            "a validation set"
        )
    drawer = Drawer(source, model, seed, progress)
    counts = split_counts(total, calibration=wanted[0], validation=wanted[1])
    first, second = split_shares(
        drawer.available(), calibration=counts[0], validation=counts[1], order=drawer.order
    )
    calibration, _ = drawer.take(first, refuse=_NOTHING, what="calibration images")
    seen = _NOTHING if allow_overlap else _digests(calibration)
    second = _refit(second, drawer)
    validation, doubles = drawer.take(second, refuse=seen, what="validation images")
    notes = []
    if total < sum(wanted):
        notes.append(
            f"{total} images where {wanted[0]} + {wanted[1]} were asked for: divided into "
            f"{calibration.spec.count} for calibration and {validation.spec.count} for validation"
        )
    if doubles:
        notes.append(f"{doubles} copies of calibration images left out of validation")
    return _noted(calibration, notes), _noted(validation, notes)


def _draw_all(
    source: Source,
    *,
    model: ModelSpec,
    count: int,
    seed: int,
    progress: Progress | None,
    what: str,
) -> ImageSet:
    drawer = Drawer(source, model, seed, progress)
    shares, _ = split_shares(
        drawer.available(), calibration=count, validation=0, order=drawer.order
    )
    images, _ = drawer.take(shares, refuse=_NOTHING, what=what)
    if images.spec.count == 0:
        raise UsageError(
            f"{source.name} has no images for the {what.split(maxsplit=1)[0]} set", fix=_DATA_FIX
        )
    return images


def _refit(shares: Counts, drawer: Drawer) -> Counts:
    """Lower shares to what is left after unreadable calibration images were replaced."""
    return np.minimum(shares, drawer.available())


def _check_calibration(calibration: ImageSet, *, asked: int) -> None:
    spec = calibration.spec
    if spec.classes >= 2:
        return
    only = f", all of class {int(calibration.labels[0])}" if spec.count else ""
    fix = _DATA_FIX if asked > 1 else "raise --calibration-samples"
    raise UsageError(
        f"the calibration set from {spec.source} has {spec.count} "
        f"image{'' if spec.count == 1 else 's'}{only}: effects are compared between classes, so at "
        "least two are needed",
        fix=fix,
    )


def _shared(calibration: ImageSet, validation: ImageSet, *, allow_overlap: bool) -> int:
    seen = _digests(calibration)
    shared = sum(image_digest(image) in seen for image in validation.images)
    if shared and not allow_overlap:
        raise UsageError(
            f"{shared} of {validation.spec.count} validation images from {validation.spec.source} "
            f"are also in the calibration set from {calibration.spec.source} (same pixels)",
            fix="pass sets that do not overlap, or --allow-overlap (the report will say so)",
        )
    return shared


def _digests(images: ImageSet) -> frozenset[bytes]:
    return frozenset(image_digest(image) for image in images.images)


def _noted(images: ImageSet, notes: list[str]) -> ImageSet:
    if not notes:
        return images
    words = "; ".join([images.spec.mapping, *notes])
    spec = images.spec.model_copy(update={"mapping": words})
    return ImageSet(images=images.images, labels=images.labels, spec=spec)
