"""Labelled images streamed from the Hugging Face hub with ``datasets``."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from collections.abc import Mapping as Map
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cswap_deploy.data.draw import Progress
from cswap_deploy.data.labels import (
    CLASS_MAP_FIX,
    Mapping,
    check_range,
    map_class_label,
    map_names,
    read_class_map,
)
from cswap_deploy.data.sampling import balanced_shares
from cswap_deploy.data.sets import Pixels
from cswap_deploy.data.sources import ArraySource, UnreadableError, decode
from cswap_deploy.errors import MissingDependencyError, UsageError, missing
from cswap_deploy.models.hub import hub_failure, hub_words, reach_hub
from cswap_deploy.records.model import ModelSpec

IMAGENET_SETTING = "CSWAP_IMAGENET"
IMAGENET_DEFAULT = "ILSVRC/imagenet-1k:validation,evanarlian/imagenet_1k_resized_256:val"
"""ImageNet-1k's validation split: the original (gated: needs a token), then a public copy whose
shorter side is 256 pixels. ``CSWAP_IMAGENET`` replaces the list."""

_SPLITS = ("validation", "val", "valid", "dev", "test", "train")
_LABEL_NAMES = ("label", "labels", "class", "target", "fine_label", "cls")
_PEEK = 256
_FIX = "pass --data DIR (class folders), --data FILE.npz or --data hf:NAME[:split]"


def open_imagenet(
    *, wanted: int, model: ModelSpec, seed: int, progress: Progress | None
) -> ArraySource:
    """Stream a balanced sample of ImageNet-1k's validation split.

    Raises:
        MissingDependencyError: No repository of the setting could be read; says what to pass.
    """
    names = [n.strip() for n in os.environ.get(IMAGENET_SETTING, IMAGENET_DEFAULT).split(",")]
    problems = []
    for name in filter(None, names):
        try:
            return open_hub(
                name, wanted=wanted, model=model, class_map=None, seed=seed, progress=progress
            )
        except MissingDependencyError as err:
            if isinstance(err.__cause__, ImportError):
                words, _, fix = str(err).partition("\n  fix: ")
                raise MissingDependencyError(
                    f"{model.name} has no --data, and ImageNet-1k cannot be streamed: {words}",
                    fix=f"{fix}, or {_FIX}",
                ) from err
            problems.append(str(err).partition("\n  fix:")[0])
    raise MissingDependencyError(
        f"no ImageNet-1k images for {model.name}:\n    " + "\n    ".join(problems),
        fix=f"{_FIX}; or set HF_TOKEN (ILSVRC/imagenet-1k is gated), HF_ENDPOINT, or "
        f"{IMAGENET_SETTING}=NAME:split to another copy",
    )


def open_hub(
    name: str,
    *,
    wanted: int,
    model: ModelSpec,
    class_map: Path | None,
    seed: int,
    progress: Progress | None,
) -> ArraySource:
    """Stream images from a dataset repository until there are enough of each class.

    Args:
        name: ``NAME`` or ``NAME:split``; without a split the first of validation, test, train.
        wanted: Images in all.
        model: Whose preprocessing and class indices are wanted.
        class_map: JSON object, label name -> class index.
        seed: Which classes give one image more when they do not divide evenly.
        progress: Called with images done, images in all, and what is being read.

    Returns:
        The decoded images, of the network's size.

    Raises:
        MissingDependencyError: ``datasets`` or the hub is not there, or the hub refuses.
        UsageError: The dataset has no such split, no image or label column, or names that are
            none of the model's classes.
    """
    try:
        import datasets
    except ImportError as err:
        raise missing("datasets", "hub", err) from err
    repository, _, split = name.partition(":")
    if not Path(repository).exists():
        reach_hub(f"datasets/{repository}", what=f"the dataset {repository}", fix=_FIX)
    given = read_class_map(class_map, model) if class_map is not None else None
    with _few_retries(datasets):
        try:
            split = split or _choose_split(datasets, repository)
            stream = datasets.load_dataset(repository, split=split, streaming=True)
            return _pool(
                stream,
                name=f"hf:{repository}:{split}",
                wanted=wanted,
                model=model,
                class_map=given,
                seed=seed,
                progress=progress,
            )
        except Exception as err:
            if isinstance(err, datasets.exceptions.DatasetNotFoundError) or hub_failure(err):
                raise MissingDependencyError(
                    f"the hub gave no images of {repository}: {hub_words(err)}", fix=_FIX
                ) from err
            if isinstance(err, (ValueError, RuntimeError, FileNotFoundError)) and not isinstance(
                err, UsageError
            ):
                raise UsageError(
                    f"cannot read the dataset {repository}"
                    f"{f' (split {split})' if split else ''}: {hub_words(err)}",
                    fix=_FIX,
                ) from err
            raise


def _choose_split(datasets: Any, repository: str) -> str:
    names = list(datasets.get_dataset_split_names(repository))
    return next((s for s in _SPLITS if s in names), names[0])


@dataclass(slots=True)
class _Labels:
    """Turns a row's label into a class index of the model."""

    model: ModelSpec
    class_map: dict[str, int] | None
    where: str
    names: list[str] | None
    mapping: Mapping = field(init=False)

    def __post_init__(self) -> None:
        self.mapping = Mapping({}, "labels are class indices")
        if self.names is not None:
            self.mapping = map_class_label(
                self.names, model=self.model, class_map=self.class_map, where=self.where
            )

    def classes(self) -> list[int]:
        """Class indices that may occur."""
        if self.names is not None:
            return sorted(set(self.mapping.indices.values()))
        return list(range(self.model.num_classes))

    def __call__(self, value: Any) -> int:
        if self.names is not None and isinstance(value, int):
            if not 0 <= value < len(self.names):  # -1 marks images without a label
                raise UsageError(
                    f"{self.where} has the label {value} among {len(self.names)} classes: is this "
                    "split labelled?",
                    fix="name another split, --data hf:NAME:split",
                )
            value = self.names[value]
        if isinstance(value, str) or self.class_map is not None:
            key = str(value)
            if key not in self.mapping.indices:
                found = map_names(
                    [key], model=self.model, class_map=self.class_map, where=self.where
                )
                indices = self.mapping.indices | found.indices
                self.mapping = Mapping(indices, found.words)
            return self.mapping.indices[key]
        if not isinstance(value, int):
            raise UsageError(
                f"{self.where} has a label of type {type(value).__name__}", fix=CLASS_MAP_FIX
            )
        check_range(np.array([value]), self.model, where=self.where)
        return value


def _pool(
    stream: Any,
    *,
    name: str,
    wanted: int,
    model: ModelSpec,
    class_map: dict[str, int] | None,
    seed: int,
    progress: Progress | None,
) -> ArraySource:
    """Read the stream until every class has its share.

    A stream in random order is left as soon as there are ``wanted`` images, none of a class
    having more than its share rounded up. One that is sorted by class is read until every class
    has its exact share, which may be to its end. Where classes are missing or small, others give
    more.
    """
    image_column, label_column, names = _columns(stream, name=name, classes=model.num_classes)
    labels = _Labels(model, class_map, name, names)
    rows = _rows(stream, image_column, label_column)
    peeked = list(islice(rows, _PEEK))
    classes = labels.classes()
    changes = sum(a != b for (_, a), (_, b) in pairwise(peeked))
    mixed = 4 * changes >= len(peeked)  # sorted by class, the label hardly ever changes
    spare = 4 + wanted // 100  # some may be copies, or not decode
    quota = np.zeros(model.num_classes, dtype=np.int64)
    if mixed:
        quota[classes] = -(-(wanted + spare) // len(classes))
    else:
        unlimited = np.zeros_like(quota)
        unlimited[classes] = wanted + spare
        order = [int(c) for c in np.random.default_rng(seed).permutation(classes)]
        quota = balanced_shares(unlimited, wanted + spare, order)
    images: list[Pixels] = []
    found: list[int] = []
    broken: list[str] = []
    surplus: list[tuple[int, Any, int]] = []

    def add(position: int, image: Any, label: int) -> None:
        try:
            images.append(_decode(image, model))
        except UnreadableError as err:
            broken.append(f"row {position}: {err}")
            return
        found.append(label)
        quota[label] -= 1
        if progress is not None:
            progress(len(found), wanted + spare, f"images from {name}")

    for position, (image, value) in enumerate(chain(peeked, rows)):
        label = labels(value)
        if quota[label] > 0:
            add(position, image, label)
        elif len(surplus) < wanted + spare:
            surplus.append((position, image, label))  # for when other classes have too few
        if len(found) == wanted + spare:
            break
    have = np.bincount([label for _, _, label in surplus], minlength=model.num_classes)
    quota = balanced_shares(have, wanted + spare - len(found), classes)
    for position, image, label in surplus:
        if quota[label] > 0:
            add(position, image, label)
    return ArraySource(
        name=name,
        images=images,
        labels=np.array(found, dtype=np.int64),
        mapping=labels.mapping,
        preprocessing=model.preprocessing,
        broken=tuple(broken),
    )


def _rows(stream: Any, image: str, label: str) -> Iterator[tuple[Map[str, Any], Any]]:
    import datasets

    stream = stream.select_columns([image, label])
    for row in stream.cast_column(image, datasets.Image(decode=False)):
        yield row[image], row[label]


def _decode(image: Map[str, Any], model: ModelSpec) -> Pixels:
    if image is None:
        raise UnreadableError("no image in this row")
    if image.get("bytes"):
        return decode(io.BytesIO(image["bytes"]), model.preprocessing)
    return decode(Path(image["path"]), model.preprocessing)


def _columns(stream: Any, *, name: str, classes: int) -> tuple[str, str, list[str] | None]:
    """The image column, the label column, and the label's class names where it has some."""
    import datasets

    features = stream.features
    if features is None:
        features = stream._resolve_features().features  # inferred from the first rows
    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    named = {n: list(f.names) for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
    plain = [n for n in _LABEL_NAMES if isinstance(features.get(n), datasets.Value)]
    if len(images) > 1:
        images = [n for n in images if n in ("image", "img")] or images
    if len(named) > 1:
        fitting = {n: c for n, c in named.items() if len(c) == classes}
        named = fitting or {n: c for n, c in named.items() if n in _LABEL_NAMES}
    if not images or not (named or plain):
        have = ", ".join(f"{n}: {type(f).__name__}" for n, f in features.items())
        raise UsageError(
            f"{name} has no {'label' if images else 'image'} column; it has {have}", fix=_FIX
        )
    if named:
        label = next(iter(named))
        return images[0], label, named[label]
    return images[0], plain[0], None


@contextmanager
def _few_retries(datasets: Any) -> Iterator[None]:
    """``datasets`` retries a lost stream for minutes; the user should hear after seconds."""
    settings = {
        "STREAMING_READ_MAX_RETRIES": 3,
        "STREAMING_READ_RETRY_INTERVAL": 1,
        "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL": 2,
        "STREAMING_OPEN_MAX_RETRIES": 3,
        "STREAMING_OPEN_RETRY_INTERVAL": 1,
    }
    before = {
        key: getattr(datasets.config, key) for key in settings if hasattr(datasets.config, key)
    }
    try:
        for key in before:
            setattr(datasets.config, key, settings[key])
        yield
    finally:
        for key, value in before.items():
            setattr(datasets.config, key, value)
