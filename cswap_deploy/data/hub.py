"""Labelled images streamed from the Hugging Face hub with ``datasets``."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cswap_deploy.data.draw import Request
from cswap_deploy.data.labels import CLASS_MAP_FIX, PLAIN, Classes, ClassMapping
from cswap_deploy.data.sampling import Counts, balanced_shares, take_balanced
from cswap_deploy.data.sources import DATA_FIX, Decoded, Source, decode
from cswap_deploy.errors import MissingDependencyError, UsageError, missing
from cswap_deploy.models.hub import hub_errors, hub_words, reach_hub, settings_within

IMAGENET_SETTING = "CSWAP_IMAGENET"
IMAGENET_DEFAULT = "ILSVRC/imagenet-1k:validation,evanarlian/imagenet_1k_resized_256:val"
"""ImageNet-1k's validation split: the original (gated: needs a token), then a public copy whose
shorter side is 256 pixels. ``CSWAP_IMAGENET`` replaces the list."""

_SPLITS = ("validation", "val", "valid", "dev", "test", "train")
_LABEL_NAMES = ("label", "labels", "class", "target", "fine_label", "cls")
_PEEK = 256
_FEW_RETRIES = {
    "STREAMING_READ_MAX_RETRIES": 3,
    "STREAMING_READ_RETRY_INTERVAL": 1,
    "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL": 2,
    "STREAMING_OPEN_MAX_RETRIES": 3,
    "STREAMING_OPEN_RETRY_INTERVAL": 1,
}
"""Settings of ``datasets``: a lost stream is retried for seconds, not minutes."""


def open_imagenet(request: Request, *, wanted: int) -> Source:
    """Stream a balanced sample of ImageNet-1k's validation split.

    Raises:
        MissingDependencyError: No repository of the setting could be read.
    """
    names = [n.strip() for n in os.environ.get(IMAGENET_SETTING, IMAGENET_DEFAULT).split(",")]
    model, problems = request.model, []
    for name in filter(None, names):
        try:
            return open_hub(name, Classes(model), request, wanted=wanted)
        except MissingDependencyError as err:
            words = str(err).partition("\n  fix: ")[0]
            if isinstance(err.__cause__, ImportError):
                raise MissingDependencyError(
                    f"{model.name} has no --data, and ImageNet-1k cannot be streamed: {words}",
                    fix=f"{err.fix}, or {DATA_FIX}",
                ) from err
            problems.append(words)
    raise MissingDependencyError(
        f"no ImageNet-1k images for {model.name}:\n    " + "\n    ".join(problems),
        fix=f"{DATA_FIX}; or set HF_TOKEN (ILSVRC/imagenet-1k is gated), HF_ENDPOINT, or "
        f"{IMAGENET_SETTING}=NAME:split to another copy",
    )


def open_hub(name: str, classes: Classes, request: Request, *, wanted: int) -> Source:
    """Stream images from a dataset repository until there are enough of each class.

    Args:
        name: ``NAME`` or ``NAME:split``; without a split the first of validation, test, train.
        classes: Classes of the model, and the class map.
        request: Its seed decides which classes give one image more when they do not divide evenly.
        wanted: Images in all; a few more are read, because some may be copies or not decode.

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
    count = wanted + 4 + wanted // 100
    request.progress.begin(f"streaming images of {repository}", count)
    try:
        if not Path(repository).exists():
            reach_hub(f"datasets/{repository}", what=f"the dataset {repository}", fix=DATA_FIX)
        words = f"the hub gave no images of {repository}"
        absent = datasets.exceptions.DatasetNotFoundError
        with (
            settings_within(datasets.config, **_FEW_RETRIES),
            hub_errors(words, fix=DATA_FIX, also=(absent,)),
        ):
            if not split:
                names = list(datasets.get_dataset_split_names(repository))
                split = next((s for s in _SPLITS if s in names), names[0])
            stream = datasets.load_dataset(repository, split=split, streaming=True)
            return _read(stream, f"hf:{repository}:{split}", classes, request, count)
    except (ValueError, RuntimeError, FileNotFoundError) as err:
        raise UsageError(
            f"cannot read the dataset {repository}{f' (split {split})' if split else ''}: "
            f"{hub_words(err)}",
            fix=DATA_FIX,
        ) from err
    finally:
        request.progress.end()


class _Labels:
    """Turns a row's label into a class index of the model.

    ``names`` are those that the label column declares; ``None`` if it holds plain indices or names.
    """

    def __init__(self, classes: Classes, where: str, names: list[str] | None) -> None:
        self._classes, self._where, self._names = classes, where, names
        self.mapping = PLAIN if names is None else classes.map_ordered(names, where=where)

    def possible(self) -> list[int]:
        """Class indices that may occur."""
        if self._names is None:
            return list(range(self._classes.model.num_classes))
        return sorted(set(self.mapping.indices.values()))

    def __call__(self, value: Any) -> int:
        if self._names is not None and isinstance(value, int):
            if not 0 <= value < len(self._names):  # -1 marks images without a label
                raise UsageError(
                    f"{self._where} has the label {value} among {len(self._names)} classes: is "
                    "this split labelled?",
                    fix="name another split, --data hf:NAME:split",
                )
            value = self._names[value]
        if isinstance(value, str) or self._classes.class_map is not None:
            key = str(value)
            if key not in self.mapping.indices:
                found = self._classes.map_names([key], where=self._where)
                self.mapping = ClassMapping(self.mapping.indices | found.indices, found.words)
            return self.mapping.indices[key]
        if not isinstance(value, int):
            raise UsageError(
                f"{self._where} has a label of type {type(value).__name__}", fix=CLASS_MAP_FIX
            )
        self._classes.check(np.array([value]), where=self._where)
        return value


def _read(stream: Any, name: str, classes: Classes, request: Request, count: int) -> Source:
    """Read the stream until every class has its share."""
    import datasets

    model, preprocessing = request.model, request.model.preprocessing
    image, label, names = _columns(stream, name=name, classes=model.num_classes)
    labels = _Labels(classes, name, names)
    stream = stream.select_columns([image, label])
    rows = iter(stream.cast_column(image, datasets.Image(decode=False)))
    first = list(islice(rows, _PEEK))
    broken: list[str] = []

    def read(row: tuple[int, Mapping[str, Any] | None]) -> Decoded | None:
        position, encoded = row
        if encoded is None:
            made: Decoded | str = "no image in this row"
        else:
            data = encoded.get("bytes")
            made = decode(io.BytesIO(data) if data else Path(encoded["path"]), preprocessing)
        if isinstance(made, str):
            broken.append(f"row {position}: {made}")
            return None
        request.progress.advance(1)
        return made

    quota = _quota(
        [row[label] for row in first], labels.possible(),
        classes=model.num_classes, count=count, seed=request.seed,
    )  # fmt: skip
    numbered = enumerate(chain(first, rows))
    stream = ((labels(row[label]), (position, row[image])) for position, row in numbered)
    images, found = take_balanced(stream, read, quota=quota, count=count)
    return Source(name, found, labels.mapping, read=images.__getitem__, broken=tuple(broken))


def _quota(first: list[Any], possible: list[int], *, classes: int, count: int, seed: int) -> Counts:
    """(K,) most images that each class gives, judged by the labels of the first rows.

    A stream in random order is left as soon as there are enough images: no class gives more than
    its share rounded up. One that is sorted by class is read until every class has its exact
    share, which may be to its end.
    """
    quota = np.zeros(classes, dtype=np.int64)
    if 4 * sum(a != b for a, b in pairwise(first)) >= len(first):  # sorted ones hardly ever change
        quota[possible] = -(-count // len(possible))
        return quota
    quota[possible] = count
    order = np.random.default_rng(seed).permutation(possible).tolist()
    return balanced_shares(quota, count, order)


def _columns(stream: Any, *, name: str, classes: int) -> tuple[str, str, list[str] | None]:
    """The image column, the label column, and the label's class names where it has some."""
    import datasets

    features = stream.features or stream._resolve_features().features  # from the first rows
    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    named = {n: list(f.names) for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
    plain = [n for n in _LABEL_NAMES if isinstance(features.get(n), datasets.Value)]
    if len(images) > 1:
        images = [n for n in images if n in ("image", "img")] or images
    if len(named) > 1:
        fitting = {n: c for n, c in named.items() if len(c) == classes}
        named = fitting or {n: c for n, c in named.items() if n in _LABEL_NAMES}
    labels = [*named, *plain]
    if not images or not labels:
        have = ", ".join(f"{n}: {type(f).__name__}" for n, f in features.items())
        raise UsageError(
            f"{name} has no {'label' if images else 'image'} column; it has {have}", fix=DATA_FIX
        )
    return images[0], labels[0], named.get(labels[0])
