"""Class by class: what pruning changed, and pictures whose prediction changed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cswap_deploy.measure.accuracy import Classes, Predicted, by_class
from cswap_deploy.measure.statistics import paired_difference_interval
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.report import cells as c
from cswap_deploy.report.document import Picture, Section, section, table

_MOST_PICTURES = 12
_LOST = 8
"""Of them, at most so many that only the dense network has right, where there are others."""
_SIDE = 96
"""Pixels of a thumbnail's longer side."""
_MOST_CLASSES = 1000
_PYTORCH = "pruned"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the networks of a bundle predicted of the validation images."""

    networks: Mapping[str, Predicted]
    """``dense`` and ``pruned`` in PyTorch, and the engines by target."""
    labels: Classes | None
    images: npt.NDArray[np.uint8] | None = None
    """(N, H, W, C), where they may be shown."""


def class_by_class(
    evidence: Evidence, manifest: Manifest, names: Mapping[int, str]
) -> Section | None:
    """Classes by what they lost, and pictures whose prediction changed."""
    after = _after(evidence, manifest)
    dense, labels = evidence.networks.get("dense"), evidence.labels
    if dense is None or after is None or labels is None:
        return None
    where, pruned = after
    rows = sorted(by_class(dense, pruned, labels), key=lambda row: (row[3] - row[2], row[0]))
    lost = sum(second < first for _, _, first, second in rows)
    won = sum(second > first for _, _, first, second in rows)
    words = (
        f"Right answers of the dense network and of the pruned one ({where}), class by class: "
        f"{lost:,} of {len(rows):,} classes have fewer than before, {won:,} have more. A class has "
        "few images, so the interval of its change is wide.",
    )
    told = table(
        "class | images | dense | pruned | change, 95 %",
        (
            (
                names.get(k, f"class {k}"), count, c.percent(first / count),
                c.percent(second / count), _change(dense, pruned, labels, k),
            )
            for k, count, first, second in rows[:_MOST_CLASSES]
        ),
    )  # fmt: skip
    return section(
        "Classes", *words, tables=[told], pictures=_pictures(evidence, pruned, labels, names)
    )


def _after(evidence: Evidence, manifest: Manifest) -> tuple[str, Predicted] | None:
    """The first engine that ran, else PyTorch."""
    for result in manifest.targets:
        if (found := evidence.networks.get(result.engine.target)) is not None:
            return result.engine.target, found
    found = evidence.networks.get(_PYTORCH)
    return None if found is None else ("PyTorch", found)


def _change(dense: Predicted, pruned: Predicted, labels: Classes, which: int) -> c.Amount:
    held = labels == which
    first, second = (one.classes[held] == which for one in (dense, pruned))
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    count = int(held.sum())
    low, high = paired_difference_interval(won, lost, count)
    return c.interval(c.signed_points, (won - lost) / count, low, high)


def _pictures(
    evidence: Evidence, pruned: Predicted, labels: Classes, names: Mapping[int, str]
) -> tuple[Picture, ...]:
    images, dense = evidence.images, evidence.networks["dense"]
    if images is None:
        return ()
    first, second = dense.classes == labels, pruned.classes == labels
    surest = np.argsort(-pruned.confidence, kind="stable")
    kinds = [
        [int(at) for at in surest if which[at]]
        for which in (
            first & ~second,
            second & ~first,
            (dense.classes != pruned.classes) & ~first & ~second,
        )
    ]
    room = _MOST_PICTURES - min(len(kinds[1]), _MOST_PICTURES - _LOST)
    chosen = [*kinds[0][:room], *kinds[1], *kinds[2]][:_MOST_PICTURES]

    def name(k: Any) -> str:
        return names.get(int(k), f"class {int(k)}")

    return tuple(
        Picture(
            _thumbnail(images[at]),
            f"{name(labels[at])}: {name(dense.classes[at])} before, "
            f"{name(pruned.classes[at])} now ({c.percent(float(pruned.confidence[at]))} sure)",
            _what_changed(bool(first[at]), bool(second[at])),
        )
        for at in chosen
    )


def _what_changed(before: bool, now: bool) -> str:
    """What changed, in a word."""
    if before == now:
        return "wrong in another way"
    return "lost" if before else "won"


def _thumbnail(pixels: npt.NDArray[np.uint8]) -> str:
    """A ``data:`` address of a small picture."""
    from PIL import Image

    grey = pixels.shape[-1] == 1
    picture = Image.fromarray(pixels[..., 0] if grey else pixels[..., :3])
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    # Small pictures have few bytes as they are; photos would have many.
    small = max(picture.size) <= 48
    picture.save(file, format="PNG" if small else "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
