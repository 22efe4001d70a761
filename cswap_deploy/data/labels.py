"""From folder and label names to the model's class indices; what is not certain is an error."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cswap_deploy.data.sets import Labels
from cswap_deploy.errors import UsageError
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.runtime.preprocess import is_hidden
from cswap_deploy.settings import read_text, shown

_SYNSET = re.compile(r"n\d{8}")
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}
CLASS_MAP_FIX = (
    "pass --class-map FILE, a JSON object from each name to the model's class index, "
    'for example {"cat": 0, "dog": 1}, or a text of the names, one a line, in the model\'s order'
)
_FEW = 20
"""Names of which a fix line writes the whole class map."""


@dataclass(frozen=True, slots=True)
class ClassMapping:
    """Names of the data, as class indices of the model."""

    indices: dict[str, int]
    words: str
    """How they were found, for people."""


PLAIN = ClassMapping({}, "labels are class indices")
UNLABELLED = ClassMapping({}, "no class labels")


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a model, and what the user says of the names in the data."""

    model: ModelSpec
    class_map: dict[str, int] | None = None
    """Folder or label name -> class index; wins over everything."""

    def map_names(
        self, names: Sequence[str], *, where: str, empty: Sequence[str] = ()
    ) -> ClassMapping:
        """Map class names of a data set to the model's class indices.

        In this order: the class map; the model's own class names; numbers as class indices;
        ImageNet synsets and names for an ImageNet-1k model; and, only for a model whose classes
        have no known names, the sorted names when there are exactly as many as it has classes.

        Args:
            names: Of the classes that have images.
            where: The data, for messages.
            empty: Class folders without images: they count where names are numbered.

        Raises:
            UsageError: A name cannot be mapped, is ambiguous, or its index is out of range; or
                names that would be numbered have another order by their numbers than as text.
        """
        names, model = sorted(names), self.model
        if self.class_map is not None:
            absent = [n for n in names if composed(n) not in self.class_map]
            if absent:
                raise UsageError(
                    f"{len(absent)} of {len(names)} names in {where} are not in the class map: "
                    f"{some(absent)}",
                    fix=CLASS_MAP_FIX,
                )
            given = {n: self.class_map[composed(n)] for n in names}
            return ClassMapping(given, "class map given by the user")
        known = _known_names(model)
        if _are_splits(names) and not any(_key(n) in known for n in names):
            raise UsageError(
                f"the class names in {where} are {some(names)}; these look like splits: pass one "
                "with --data, another with --validation-data",
                fix=_split_fix(names, where),
            )
        numbers = all(n.isascii() and n.isdigit() for n in names)
        if numbers and not all(_key(n) in known for n in names):
            indices = {n: int(n) for n in names}
            self.check(np.array(list(indices.values()), dtype=np.int64), where=where)
            return ClassMapping(indices, "names are class indices")
        if known:
            return _by_name(names, known, model, where)
        for numbered in (names, sorted({*names, *empty})):
            if len(numbered) == model.num_classes:
                _check_order(numbered, where, model)
                return ClassMapping(
                    {n: i for i, n in enumerate(numbered) if n in names},
                    f"sorted names numbered 0..{len(numbered) - 1} (torchvision's convention: "
                    f"{model.name} does not say what its {model.num_classes} classes are)",
                )
        raise UsageError(
            f"{where} has {len(names)} classes ({some(names)}) and {model.name} has "
            f"{model.num_classes} without names, so they cannot be matched",
            fix=f"name them by class index, or {CLASS_MAP_FIX}",
        )

    def coverage(self, labels: Labels, mapping: ClassMapping) -> list[str]:
        """Sentences on the model's classes that have no image, or a single one.

        Args:
            labels: (N,) class indices of all images.
            mapping: Where the labels came from; its names are shown.
        """
        counts = np.bincount(labels, minlength=self.model.num_classes)
        names = {index: name for name, index in mapping.indices.items()}

        def shown(classes: Any) -> str:
            known = [(int(k), names.get(int(k)) or self._name(int(k))) for k in classes]
            return some([f"{k} ({name})" if name not in ("", str(k)) else str(k)
                         for k, name in known])  # fmt: skip

        told = []
        if (absent := np.flatnonzero(counts == 0)).size:
            told.append(
                f"{len(absent):,} of the {len(counts):,} classes of {self.model.name} have no "
                f"images: {shown(absent)}"
            )
        if (single := np.flatnonzero(counts == 1)).size:
            told.append(
                f"{len(single):,} of the {len(counts):,} classes of {self.model.name} have one "
                f"image only: {shown(single)}"
            )
        return told

    def _name(self, index: int) -> str:
        if index < len(self.model.class_names):
            return self.model.class_names[index]
        imagenet = self.model.label_space == "imagenet-1k"
        return imagenet_classes()[index][1].split(",")[0] if imagenet else ""

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
        classes = self.model.num_classes
        fix = _counted_from_one(labels, classes) or CLASS_MAP_FIX
        check_range(labels, classes, where=where, name=self.model.name, fix=fix)


def check_range(
    labels: Labels, classes: int, *, where: str, name: str, fix: str = CLASS_MAP_FIX
) -> None:
    """Refuse labels outside 0..classes - 1 with a :class:`UsageError` that names them."""
    wrong = np.unique(labels[(labels < 0) | (labels >= classes)])
    if wrong.size:
        raise UsageError(
            f"labels out of range in {where}: {some([str(v) for v in wrong.tolist()])}; "
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


def check_variety(images: NDArray[Any], *, where: str) -> None:
    """Refuse calibration images that are all alike: no unit's effect shows on them."""
    if len(images) > 1 and all(np.array_equal(image, images[0]) for image in images[1:]):
        raise UsageError(
            f"the calibration set {where} has {len(images)} images, all alike: nothing that a unit "
            "does shows on them",
            fix="pass photos of what the network is for; that many copies of one are one",
        )


def read_class_map(path: Path, model: ModelSpec) -> dict[str, int]:
    """Read ``--class-map``: a JSON object of class indices, or the names in their order.

    These are a JSON list, or a text with one name a line; a slash at the end, as ``ls -d */``
    prints, is left out.

    Raises:
        UsageError: It cannot be read, or does not fit the model.
    """
    try:
        text = read_text(path, encoding="utf-8-sig")
        listed = (line for line in text.splitlines() if line.strip())
        # What systems leave beside class folders is listed with them.
        lines = [n.removesuffix("/") for n in listed if not (n[-1] == "/" and is_hidden(n[:-1]))]
        plain = text.lstrip()[:1] not in ("{", "[")
        loaded = lines if plain else json.loads(text, object_pairs_hook=_Pairs)
    except (OSError, ValueError, RecursionError) as err:
        words = "it is nested too deep" if isinstance(err, RecursionError) else str(err)
        raise UsageError(
            f"cannot read the class map {shown(path)}: {words}", fix=CLASS_MAP_FIX
        ) from err
    if not isinstance(loaded, _Pairs) and all(isinstance(name, str) for name in loaded):
        loaded = _Pairs((name, index) for index, name in enumerate(loaded))
    if not isinstance(loaded, _Pairs) or not all(type(v) is int for _, v in loaded):
        raise UsageError(
            f"the class map {path} is not a JSON object of integers, nor a list of names",
            fix=CLASS_MAP_FIX,
        )
    counts = Counter(composed(name) for name, _ in loaded)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise UsageError(
            f"the class map {path} has names twice: {some(twice)}", fix="leave one of each"
        )
    if wrong := {k: v for k, v in loaded if not 0 <= v < model.num_classes}:
        raise UsageError(
            f"the class map {path} has indices outside 0..{model.num_classes - 1}, "
            f"the classes of {model.name}: {some([f'{k}: {shown(v)}' for k, v in wrong.items()])}",
            fix=f"give each name an index from 0 to {model.num_classes - 1}",
        )
    return {composed(name): index for name, index in loaded}


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written: a dictionary would keep the last of two equal keys."""


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
            f"{model.name}: {some(unknown)}",
            fix=CLASS_MAP_FIX,
        )
    vague = [n for n in names if len(known[_key(n)]) > 1]
    if vague:
        raise UsageError(
            f"class names in {where} that mean more than one class of {model.name}: "
            + some([f"{n} ({', '.join(map(str, sorted(known[_key(n)])))})" for n in vague]),
            fix=CLASS_MAP_FIX,
        )
    indices = {n: next(iter(known[_key(n)])) for n in names}
    synsets = model.label_space == "imagenet-1k" and all(_SYNSET.fullmatch(n) for n in names)
    kind = "ImageNet synsets" if synsets else "class names"
    return ClassMapping(indices, f"{kind} looked up among the {model.num_classes} of {model.name}")


def _key(name: str) -> str:
    """Case, blanks, dashes and underscores do not matter."""
    return re.sub(r"[\s_\-]+", " ", composed(name)).strip().lower()


def composed(name: str) -> str:
    """A name in one of the spellings that Unicode has for accented letters, to compare it."""
    return unicodedata.normalize("NFC", name)


def _check_order(names: list[str], where: str, model: ModelSpec) -> None:
    """Refuse to number names that have another order by the numbers in them."""
    by_number = sorted(names, key=_natural)
    if by_number == names:
        return
    differing = [n for n in names if names.index(n) != by_number.index(n)]
    shown = "\n    ".join(
        f"{n}: {names.index(n)} as text, {by_number.index(n)} by number" for n in differing[:5]
    )
    more = f"\n    and {len(differing) - 5} more" if len(differing) > 5 else ""
    folder = shlex.quote(where)
    two = (
        f"(cd {folder} && LC_ALL=C ls -d */) > FILE",
        f"(cd {folder} && LC_ALL=C ls -dv */) > FILE",
    )
    if not Path(where).is_dir():
        two = json.dumps(names, ensure_ascii=False), json.dumps(by_number, ensure_ascii=False)
    raise UsageError(
        f"the class index of {len(differing)} of {len(names)} names in {where} depends on how they "
        f"are sorted, and {model.name} does not name its classes:\n    "
        f"{shown}{more}",
        fix="pass --class-map FILE, the names in the order of the network's training; as text, as "
        f"torchvision and Keras sort them: {two[0]}; by number: {two[1]}",
    )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts the numbers in names by their value."""
    found = re.findall(r"([0-9]+)|([^0-9]+)", name)
    return [(bool(number), int(number or 0), text) for number, text in found]


def are_from_one(labels: Labels, classes: int) -> bool:
    """Whether labels seem to be 1..K where the model has the classes 0..K-1."""
    return bool(labels.size and labels.min() >= 1 and labels.max() == classes)


def _counted_from_one(labels: Labels, classes: int) -> str:
    """The fix for labels 1..K of a model with the classes 0..K-1."""
    if not are_from_one(labels, classes):
        return ""
    text = f"a text of the numbers, one a line: seq 1 {classes} > FILE"
    if classes <= _FEW:
        text = f"this JSON: {json.dumps({str(n): n - 1 for n in range(1, classes + 1)})}"
    return f"if they count from 1, pass --class-map FILE with {text}; else name them by class index"


def _split_fix(names: Sequence[str], where: str) -> str:
    """The flags for a folder of splits."""
    first, *rest = sorted(names, key=lambda n: not n.lower().startswith("train"))
    second = f" --validation-data {shlex.quote(f'{where}/{rest[0]}')}" if rest else ""
    return f"pass --data {shlex.quote(f'{where}/{first}')}{second}"


def _are_splits(names: Sequence[str]) -> bool:
    return bool(names) and all(n.lower() in _SPLITS for n in names)


def some(items: Sequence[str], limit: int = 5) -> str:
    """A few of them, and how many more there are."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
