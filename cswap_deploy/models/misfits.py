"""Why weights do not fit a network: channels, classes, the size of images, or another network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, Shape]]
"""Tensor -> its shape in the file, and in the network."""
_POSITIONS = re.compile(r"pos|attention_bias|attn_mask|attn_bias|rope|freqs|rel_h|rel_w", re.I)
"""Names of what depends on the number of positions, so on the size of images."""
_FEW_TOKENS = 8
"""Class tokens, distillation tokens and registers, at most."""


@dataclass(slots=True)
class Misfit:
    """What differs, in words, and what to do."""

    differs: list[str] = field(default_factory=list)
    fixes: list[str] = field(default_factory=list)

    def add(self, what: str, fix: str) -> None:
        """One more difference."""
        self.differs.append(what)
        self.fixes.append(fix)

    @property
    def fix(self) -> str:
        """One line."""
        return "; ".join(self.fixes) or "pass the MODEL that the checkpoint was trained as"


def misfit(
    module: nn.Module, missing: Sequence[str], unexpected: Sequence[str], reshaped: Shapes,
    *, name: str, input_size: tuple[int, int, int], by_flags: bool,
) -> Misfit:  # fmt: skip
    """Say why weights do not fit.

    Args:
        module: The network.
        missing: Its tensors that the file lacks.
        unexpected: The file's that it lacks.
        reshaped: Those of another shape.
        name: Of the network, for people.
        input_size: (C, H, W) that it takes.
        by_flags: Whether ``--input-size`` shapes it; else whatever makes it must be changed.
    """
    own = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    if missing or unexpected:
        return _without_head(own, missing, unexpected, reshaped)
    found, rest = Misfit(), dict(reshaped)
    channels, height, width = input_size
    size = list(input_size)
    if taken := _channels(rest, channels):
        size[0] = taken
        for key in [k for k, (a, b) in rest.items() if _only(a, b, 1) and a[1] == taken]:
            del rest[key]
        found.differs.append(
            f"the checkpoint's network takes images of {_count(taken, 'channel')}, this one of "
            f"{channels}"
        )
    positions = [k for k in rest if _POSITIONS.search(k)]
    if any(_other_tokens(module, k, *rest[k]) for k in positions):
        return Misfit()
    side = None
    if positions:
        side = next(filter(None, (_side(module, k, *rest[k]) for k in positions)), None)
        size[1:] = [side, side] if side else [height, width]
        first, (theirs, ours) = positions[0], rest[positions[0]]
        found.differs.append(
            f"the size of images differs: {first} has {theirs}, for {height} x {width} it is {ours}"
        )
    elif len(rest) == 1 and (flat := _flattened(rest)):
        positions = list(rest)
        found.differs.append(
            f"the size of images differs: {positions[0]} reads {flat[0]:,} values of each, for "
            f"{height} x {width} it is {flat[1]:,}"
        )
    rest = {k: shapes for k, shapes in rest.items() if k not in positions}
    if found.differs:
        found.fixes.append(_size_fix(size, taken, positions and not side, name, by_flags))
    rows = {(a[0], b[0]) for a, b in rest.values() if _only(a, b, 0)}
    if rest and len(rows) == 1 and all(_only(a, b, 0) for a, b in rest.values()):
        ((theirs_, ours_),) = rows
        found.add(
            f"the checkpoint's network has {_count(theirs_, 'class')}, this one {ours_}",
            f"pass a MODEL with {_count(theirs_, 'class')} (package.module:factory makes any), or "
            f"weights with {ours_}",
        )
    elif rest:
        return Misfit()
    return found


def _without_head(
    own: Mapping[str, Shape], missing: Sequence[str], unexpected: Sequence[str], reshaped: Shapes
) -> Misfit:
    """A backbone's weights lack the network's last layer alone."""
    found, last = Misfit(), list(own)[-1].rpartition(".")[0] if own else ""
    head = [k for k in own if k.rpartition(".")[0] == last]
    if missing and not unexpected and not reshaped and set(missing) == set(head) != set(own):
        found.add(
            f"the checkpoint has no classifier ({last})",
            "pass weights that were saved with the classifier",
        )
    return found


def _channels(shapes: Shapes, ours: int) -> int:
    """The input channels of the file's network where they differ from ours, else 0."""
    found = {a[1] for a, b in shapes.values() if len(a) == 4 and _only(a, b, 1) and b[1] == ours}
    return found.pop() if len(found) == 1 else 0


def _flattened(shapes: Shapes) -> tuple[int, int] | None:
    """Values that a linear layer reads behind a flattened map, in the file's network and ours."""
    ((theirs, ours),) = shapes.values()
    return (theirs[1], ours[1]) if len(ours) == 2 and _only(theirs, ours, 1) else None


def _side(module: Any, key: str, theirs: Shape, ours: Shape) -> int | None:
    """Height and width of the file's images (pixels), where they are square and can be told."""
    embed = getattr(module, "patch_embed", None)
    grid, patch = getattr(embed, "grid_size", None), getattr(embed, "patch_size", None)
    if grid is None or patch is None or len(theirs) != 3 or not key.endswith("pos_embed"):
        return None
    others = ours[1] - math.prod(grid)  # class tokens and registers
    root = math.isqrt(max(theirs[1] - others, 0))
    return root * int(patch[0]) if root and root * root == theirs[1] - others else None


def _other_tokens(module: Any, key: str, theirs: Shape, ours: Shape) -> bool:
    """Whether the file's network has other tokens beside the image's, not another image."""
    near = len(theirs) == len(ours) == 3 and abs(theirs[1] - ours[1]) <= _FEW_TOKENS
    return near and _side(module, key, theirs, ours) is None


def _size_fix(size: list[int], channels: int, unknown: Any, name: str, by_flags: bool) -> str:
    text = ",".join(map(str, size))
    if unknown:
        text = f"{size[0]},H,W of the images that it was trained on"
    fix = f"pass --input-size {text}"
    if channels not in (0, 1, 3) or (channels and not by_flags):
        fix += f" and --mean and --std of {_count(channels, 'value')}"
    return fix if by_flags else f"make {name} for that, and {fix}"


def _only(one: Shape, other: Shape, dim: int) -> bool:
    """Whether two shapes differ in one dimension alone."""
    alike = len(one) == len(other) > dim
    return alike and [d for d in range(len(one)) if one[d] != other[d]] == [dim]


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{plural if number != 1 else ''}"
