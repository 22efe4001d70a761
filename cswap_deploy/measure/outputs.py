"""What pruning changed in the outputs of networks that do not classify."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cswap_deploy.config import Task
from cswap_deploy.errors import StageError
from cswap_deploy.models.outputs import named_outputs
from cswap_deploy.records.amounts import fixed, percent
from cswap_deploy.records.measurements import OutputChange, OutputError
from cswap_deploy.runtime.session import Floats, Outputs

_HALF = 0.5
_PIECE = 1 << 24
"""Elements that are compared at once."""
OutputRun = Callable[[Floats], Outputs]
"""A network as a function: (B, C, H, W) float32 -> every output by name."""


def torch_outputs(module: nn.Module, names: Sequence[str]) -> OutputRun:
    """A network in PyTorch as a function on arrays; ``names`` are those of its outputs."""

    def run(images: Floats) -> Outputs:
        with torch.inference_mode():
            found = named_outputs(module(torch.from_numpy(images))).values()
        return {name: value.numpy() for name, value in zip(names, found, strict=True)}

    return run


def output_change(pairs: Iterable[tuple[Outputs, Outputs]], task: Task) -> OutputChange:
    """Compare the outputs of two networks on the same images, a batch at a time.

        error_db = 10 log10(sum ||o||^2 / sum ||o - o*||^2)

    over all images, for each output. Decisions are compared where there are some: the sign of
    yes-or-no logits (of what is never outside 0..1, the side of 0.5), the largest channel of each
    pixel of maps, integers as they are.

    Args:
        pairs: For each batch, the outputs before (o) and after (o*).
        task: What the outputs are.

    Raises:
        StageError: The shapes differ, or a value is not finite.
    """
    sums: dict[str, _Sums] = {}
    images = 0
    for before, after in pairs:
        images += max(len(value) for value in before.values() if value.ndim)
        for name, value in before.items():
            other = after.get(name)
            if other is None or other.shape != value.shape:
                got = "nothing" if other is None else f"shape {other.shape}"
                raise StageError(f"output {name} has shape {value.shape} before and {got} after")
            one = sums.setdefault(name, _Sums())
            for old, new in zip(_pieces(value), _pieces(other), strict=True):
                one.add(old, new, task, name)
    return OutputChange(
        outputs=tuple(one.result(name) for name, one in sums.items()), images=images
    )


def decisions(values: npt.NDArray[Any], task: Task) -> npt.NDArray[Any] | None:
    """What an output decides, element by element; ``None`` where it decides nothing."""
    if values.dtype.kind in "iub":
        return values
    if task == "binary":
        return np.asarray(values > 0)
    if task == "classify":
        return np.asarray(values.argmax(1))
    if task == "dense" and values.ndim == 4 and values.shape[1] > 1:
        return np.asarray(values.argmax(1))
    return None


def trimmed(outputs: Outputs, rows: frozenset[str], count: int) -> Outputs:
    """Of outputs with one row an image the first ``count`` rows; the others are left out."""
    return {name: value[:count] for name, value in outputs.items() if name in rows}


def _pieces(values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """A few rows at a time: they become float64, and maps are large."""
    if values.ndim == 0 or values.size <= _PIECE:
        return [values]
    rows = max(1, _PIECE * len(values) // values.size)
    return [values[start : start + rows] for start in range(0, len(values), rows)]


@dataclass(slots=True)
class _Sums:
    """What is known of one output so far."""

    energy: float = 0.0
    error: float = 0.0
    same: int = 0
    decided: int = 0
    same_half: int = 0
    """As ``same``, of probabilities."""
    within: bool = True
    """Whether all values are in 0..1."""
    is_float: bool = False

    def add(self, before: npt.NDArray[Any], after: npt.NDArray[Any], task: Task, name: str) -> None:
        if before.dtype.kind == "f":
            self.is_float = True
            wide, other = before.astype(np.float64), after.astype(np.float64)
            for values in (wide, other):
                if bad := int(values.size - np.isfinite(values).sum()):
                    raise StageError(f"{bad} of {values.size} values of {name} are not finite")
            self.energy += float(np.square(wide).sum())
            self.error += float(np.square(wide - other).sum())
        old, new = decisions(before, task), decisions(after, task)
        if old is not None and new is not None:
            self.same += int((old == new).sum())
            self.decided += old.size
        if task == "binary":
            self.same_half += int(((before > _HALF) == (after > _HALF)).sum())
            self.within &= bool((before >= 0).all() and (before <= 1).all())
        else:
            self.within = False

    def result(self, name: str) -> OutputError:
        same = self.same_half if self.within else self.same
        agreement = same / self.decided if self.decided else None
        error = None
        if self.is_float and self.error > 0:
            error = 10 * math.log10(max(self.energy, 1e-300) / self.error)
        return OutputError(name=name, error_db=error, agreement=agreement)


def relative_error(change: OutputChange) -> float:
    """The largest squared error over squared size among the outputs: 10^(-error_db / 10)."""
    errors = [10 ** (-one.error_db / 10) for one in change.outputs if one.error_db is not None]
    return max(errors, default=0.0)


def worst_words(change: OutputChange) -> str:
    """The output that changed most, for the screen."""
    found = [one for one in change.outputs if one.error_db is not None]
    decided = [one for one in change.outputs if one.agreement is not None]
    text = "outputs identical"
    if found:
        worst = min(found, key=lambda one: one.error_db or 0.0)
        text = f"{worst.name} {fixed(worst.error_db or 0.0, 1)} dB"
    if decided:
        least = min(decided, key=lambda one: one.agreement or 0.0)
        text += f", {percent(least.agreement or 0.0, 2)} of decisions alike"
    return text


def named(outputs: Floats | Mapping[str, npt.NDArray[Any]]) -> Outputs:
    """Outputs by name, where a classifier gives its logits alone."""
    return outputs if isinstance(outputs, Mapping) else {"logits": np.asarray(outputs)}
