"""From folder and label names to the model's class indices; what is not certain is an error."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cswap_deploy.data.sets import Labels
from cswap_deploy.errors import UsageError
from cswap_deploy.records.model import ModelSpec

_SYNSET = re.compile(r"n\d{8}")
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}
CLASS_MAP_FIX = (
    "pass --class-map FILE, a JSON object from each name to the model's class index, "
    'for example {"cat": 0, "dog": 1}'
)


@dataclass(frozen=True, slots=True)
class ClassMapping:
    """Names of the data, as class indices of the model."""

    indices: dict[str, int]
    words: str
    """How they were found, for people."""


PLAIN = ClassMapping({}, "labels are class indices")
UNLABELLED = ClassMapping({}, "no class labels wanted")


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a model, and what the user says of the names in the data."""

    model: ModelSpec
    class_map: dict[str, int] | None = None
    """Folder or label name -> class index; wins over everything."""

    def map_names(self, names: Sequence[str], *, where: str) -> ClassMapping:
        """Map class names of a data set to the model's class indices.

        In this order: the class map; the model's own class names; numbers as class indices;
        ImageNet synsets and names for an ImageNet-1k model; and, only for a model whose classes
        have no known names, the sorted names when there are exactly as many as it has classes.

        Raises:
            UsageError: A name cannot be mapped, is ambiguous, or its index is out of range.
        """
        names, model = sorted(names), self.model
        if self.class_map is not None:
            absent = [n for n in names if n not in self.class_map]
            if absent:
                raise UsageError(
                    f"{len(absent)} of {len(names)} names in {where} are not in the class map: "
                    f"{_some(absent)}",
                    fix=CLASS_MAP_FIX,
                )
            given = {n: self.class_map[n] for n in names}
            return ClassMapping(given, "class map given by the user")
        known = _known_names(model)
        numbers = all(n.isascii() and n.isdigit() for n in names)
        if numbers and not all(_key(n) in known for n in names):
            indices = {n: int(n) for n in names}
            self.check(np.array(list(indices.values()), dtype=np.int64), where=where)
            return ClassMapping(indices, "names are class indices")
        if known:
            return _by_name(names, known, model, where)
        if len(names) == model.num_classes:
            return ClassMapping(
                {n: i for i, n in enumerate(names)},
                f"sorted names numbered 0..{len(names) - 1} (torchvision's convention: "
                f"{model.name} does not say what its {model.num_classes} classes are)",
            )
        raise UsageError(
            f"{where} has {len(names)} classes ({_some(names)}) and {model.name} has "
            f"{model.num_classes} without names, so they cannot be matched{_split_hint(names)}",
            fix=f"name them by class index, or {CLASS_MAP_FIX}",
        )

    def map_ordered(self, names: Sequence[str], *, where: str) -> ClassMapping:
        """Map the names of a ``ClassLabel`` feature, whose own order often is the model's.

        Its order is taken when it has as many classes as the model and agrees with every name
        that the model knows without ambiguity (at least half of them); otherwise names are mapped
        one by one.
        """
        if self.class_map is not None or len(names) != self.model.num_classes:
            return self.map_names(names, where=where)
        in_order = {n: i for i, n in enumerate(names)}
        known = _known_names(self.model)
        if not known:
            words = f"the data set's class order ({self.model.name} does not name its classes)"
            return ClassMapping(in_order, words)
        meant = [(i, known.get(_key(n), set())) for i, n in enumerate(names)]
        clear = [(i, indices) for i, indices in meant if len(indices) == 1]
        agree = sum(i in indices for i, indices in clear)
        if 2 * agree < len(names) or agree < 0.99 * len(clear):
            return self.map_names(names, where=where)
        words = (
            f"the data set's class order, which agrees with the model's on {agree} of {len(clear)} "
            "recognised names"
        )
        return ClassMapping(in_order, words)

    def check(self, labels: Labels, *, where: str) -> None:
        """Refuse labels that the model has no class for; see :func:`check_range`."""
        check_range(labels, self.model.num_classes, where=where, name=self.model.name)


def check_range(
    labels: Labels, classes: int, *, where: str, name: str, fix: str = CLASS_MAP_FIX
) -> None:
    """Refuse labels outside 0..classes - 1 with a :class:`UsageError` that names them."""
    wrong = np.unique(labels[(labels < 0) | (labels >= classes)])
    if wrong.size:
        raise UsageError(
            f"labels out of range in {where}: {_some([str(v) for v in wrong.tolist()])}; "
            f"{name} has {classes} classes, 0..{classes - 1}",
            fix=fix,
        )


def check_classes(labels: Labels, *, where: str, fix: str) -> None:
    """Refuse a calibration set that is empty or of one class with a :class:`UsageError`."""
    found = np.unique(labels)
    if len(found) < 2:
        only = f", all of class {found[0]}" if len(found) else ""
        raise UsageError(
            f"the calibration set {where} has {len(labels)} image{'' if len(labels) == 1 else 's'}"
            f"{only}: effects are compared between classes, so at least two are needed",
            fix=fix,
        )


def check_count(count: int, *, where: str) -> None:
    """Refuse a calibration set without labels that has fewer than two images."""
    if count < 2:
        raise UsageError(
            f"the calibration set {where} has {count} image{'' if count == 1 else 's'}, two are "
            "the least",
            fix="pass more images, or raise --calibration-samples",
        )


def read_class_map(path: Path, model: ModelSpec) -> dict[str, int]:
    """Read ``--class-map``, a JSON object of class indices; else raise a :class:`UsageError`."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UsageError(f"cannot read the class map {path}: {err}", fix=CLASS_MAP_FIX) from err
    if not isinstance(loaded, dict) or not all(type(v) is int for v in loaded.values()):
        raise UsageError(
            f"the class map {path} is not a JSON object of integers", fix=CLASS_MAP_FIX
        )
    wrong = {k: v for k, v in loaded.items() if not 0 <= v < model.num_classes}
    if wrong:
        raise UsageError(
            f"the class map {path} has indices outside 0..{model.num_classes - 1}, "
            f"the classes of {model.name}: {_some([f'{k}: {v}' for k, v in wrong.items()])}"
        )
    return dict(loaded)


def _known_names(model: ModelSpec) -> dict[str, set[int]]:
    """Normalised class name -> the indices it may mean."""
    found: dict[str, set[int]] = defaultdict(set)
    for index, name in enumerate(model.class_names):
        found[_key(name)].add(index)
    if model.label_space == "imagenet-1k":
        for index, (synset, description) in enumerate(imagenet_classes()):
            for name in (synset, description, *description.split(",")):
                found[_key(name)].add(index)
    return dict(found)


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """Synset and names of the 1,000 classes, in the order of their index.

    Source:
        ``timm.data.ImageNetInfo``.
    """
    from cswap_deploy.models.torchvision_shim import import_timm

    info = import_timm().data.ImageNetInfo("imagenet-1k")
    return tuple(zip(info.label_names(), info.label_descriptions(), strict=True))


def _by_name(
    names: list[str], known: dict[str, set[int]], model: ModelSpec, where: str
) -> ClassMapping:
    unknown = [n for n in names if _key(n) not in known]
    if unknown:
        raise UsageError(
            f"{len(unknown)} of {len(names)} class names in {where} are no classes of "
            f"{model.name}: {_some(unknown)}{_split_hint(names)}",
            fix=CLASS_MAP_FIX,
        )
    vague = [n for n in names if len(known[_key(n)]) > 1]
    if vague:
        raise UsageError(
            f"class names in {where} that mean more than one class of {model.name}: "
            + _some([f"{n} ({', '.join(map(str, sorted(known[_key(n)])))})" for n in vague]),
            fix=CLASS_MAP_FIX,
        )
    indices = {n: next(iter(known[_key(n)])) for n in names}
    synsets = model.label_space == "imagenet-1k" and all(_SYNSET.fullmatch(n) for n in names)
    kind = "ImageNet synsets" if synsets else "class names"
    return ClassMapping(indices, f"{kind} looked up among the {model.num_classes} of {model.name}")


def _key(name: str) -> str:
    """Case, blanks, dashes and underscores do not matter."""
    return re.sub(r"[\s_\-]+", " ", name).strip().lower()


def _split_hint(names: Sequence[str]) -> str:
    if names and all(n.lower() in _SPLITS for n in names):
        return "; these look like splits: pass one with --data, another with --validation-data"
    return ""


def _some(items: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
