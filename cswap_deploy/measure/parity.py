"""Whether a network is still the same after a pass: the largest difference of its logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cswap_deploy.errors import ExportError, StageError
from cswap_deploy.records.measurements import Parity
from cswap_deploy.runtime.outputs import Outputs, to_logits
from cswap_deploy.runtime.session import Floats

Run = Callable[[Floats], Floats]
"""A network as a function: (B, C, H, W) float32 -> logits (B, classes)."""
PARITY_BATCHES = (1, 8)
"""Batch sizes that are compared unless the caller says otherwise."""
_LEAST = 1e-6
"""Probabilities below count as this: float16 cannot hold them, and they decide no prediction."""


def logits_of(network: Run, kind: Outputs) -> Run:
    """A network as one that gives logits, so that differences mean the same for every network.

    Those of probabilities would be below any tolerance where there are many classes.
    """
    return lambda images: to_logits(network(images), kind, least=_LEAST)


def parity(
    reference: Run, candidate: Run, images: Floats, *, reference_name: str, candidate_name: str,
    tolerance: float | None, batches: tuple[int, ...] = PARITY_BATCHES,
) -> Parity:  # fmt: skip
    """Compare two networks on the same images, at several batch sizes.

        max over images x and classes k of |reference(x)[k] - candidate(x)[k]|

    A dynamic graph can be right at the batch size it was traced with and wrong at others.

    Args:
        reference: The network.
        candidate: What it became.
        images: (N, C, H, W) float32, N > 0. Every image goes through at every batch size.
        reference_name: For the report, for example ``torch``.
        candidate_name: For the report, for example ``onnx``.
        tolerance: Largest difference that counts as the same (logits); ``None`` to only measure.
        batches: Batch sizes (samples); one above N becomes N.

    Raises:
        StageError: The shapes differ, or a logit is not finite.
    """
    sizes = tuple(sorted({min(size, len(images)) for size in batches}))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"parity needs images and batch sizes: {len(images)} images, {batches}")
    largest = 0.0
    for size in sizes:
        for start in range(0, len(images), size):
            batch = np.ascontiguousarray(images[start : start + size])
            expected, got = np.asarray(reference(batch)), np.asarray(candidate(batch))
            where = f"images {start} to {start + len(batch) - 1} at batch {size}"
            if expected.shape != got.shape:
                raise StageError(
                    f"{candidate_name} gives outputs of shape {got.shape}, {reference_name} of "
                    f"{expected.shape}, on {where}"
                )
            for name, logits in ((reference_name, expected), (candidate_name, got)):
                check_finite(logits, name=name, where=where)
            difference = np.abs(expected.astype(np.float64) - got.astype(np.float64))
            largest = max(largest, float(difference.max()))
    return Parity(
        reference=reference_name, candidate=candidate_name, max_abs=largest, tolerance=tolerance,
        images=len(images), batches=sizes,
    )  # fmt: skip


def require_parity(compared: Parity) -> Parity:
    """A comparison within its tolerance; beyond it, :class:`ExportError`."""
    if not compared.ok:
        raise ExportError(
            f"{compared.candidate} does not agree with {compared.reference}: logits differ by up "
            f"to {compared.max_abs:.2e} on {compared.images} images, allowed "
            f"{compared.tolerance:g}",
            fix="try another --opset, or raise --parity-tolerance (of build) if accuracy counts",
        )
    return compared


def check_finite(logits: Floats, *, name: str, where: str) -> None:
    """Refuse NaN and infinity, with a :class:`StageError` that says how many."""
    bad = int(logits.size - np.isfinite(logits).sum())
    if bad:
        raise StageError(f"{bad} of {logits.size} logits of {name} are not finite, on {where}")
