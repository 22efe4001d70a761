"""What a classifier's outputs are, recognised by their values, and turned into one another.

A network that ends in a softmax gives probabilities. Taken for logits they would go through a
second softmax, which flattens every effect and every probability that is shown.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

OutputKind = Literal["logits", "probabilities", "log-probabilities"]
LEAST = 1.2e-38
"""Smallest probability that has a logarithm here: float32's smallest normal number."""
_SUM_TOLERANCE = 5e-3
"""How far a row's sum may be from one; float16 rounds a thousand classes to within 1e-3."""


def recognise(outputs: npt.NDArray[Any]) -> OutputKind:
    """What (N, classes) outputs on real images are.

    Probabilities: no value below zero, and every row sums to one. Log-probabilities: every row's
    exponentials do. Of logits neither holds, unless by construction.
    """
    values = np.asarray(outputs, dtype=np.float64)
    if values.ndim != 2 or not len(values) or values.shape[1] < 2 or not np.isfinite(values).all():
        return "logits"
    if values.min() >= 0 and _are_one(values.sum(1)):
        return "probabilities"
    if values.max() <= _SUM_TOLERANCE and _are_one(np.exp(values).sum(1)):
        return "log-probabilities"
    return "logits"


def to_logits(
    outputs: npt.NDArray[Any], kind: OutputKind, *, least: float = LEAST
) -> npt.NDArray[Any]:
    """(N, classes) outputs as logits of the same softmax, in the same type.

    Log-probabilities are such logits; of probabilities the logarithm is one, taken of ``least``
    where they are below it.
    """
    if kind != "probabilities":
        return outputs
    logits: npt.NDArray[Any] = np.log(np.maximum(outputs, least)).astype(outputs.dtype)
    return logits


def to_probabilities(outputs: npt.NDArray[Any], kind: OutputKind) -> npt.NDArray[np.float64]:
    """(N, classes) outputs as probabilities; those of a softmax inside the network as they are."""
    values = np.asarray(outputs, dtype=np.float64)
    if kind == "probabilities":
        return values
    exponents = np.exp(values - values.max(1, keepdims=True))
    found: npt.NDArray[np.float64] = exponents / exponents.sum(1, keepdims=True)
    return found


def note(kind: OutputKind) -> str:
    """What to know of outputs that are not logits; empty for logits."""
    if kind == "logits":
        return ""
    inside = "a softmax" if kind == "probabilities" else "a log-softmax"
    return (
        f"the network's outputs are {kind} ({inside} is part of it): measured, compared and shown "
        "as such, with no second softmax; the exported graph gives them too"
    )


def _are_one(sums: npt.NDArray[np.float64]) -> bool:
    return bool((np.abs(sums - 1) <= _SUM_TOLERANCE).all())
