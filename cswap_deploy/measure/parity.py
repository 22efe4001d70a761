"""Whether a network is still the same after a pass: the largest difference of its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cswap_deploy.errors import ExportError, StageError
from cswap_deploy.records.measurements import Parity
from cswap_deploy.runtime.probabilities import OutputKind, to_logits
from cswap_deploy.runtime.session import Floats, Outputs

Run = Callable[[Floats], Floats]
"""A network as a function: (B, C, H, W) float32 -> logits (B, classes)."""
AnyRun = Callable[[Floats], "Floats | Outputs"]
"""The same, or -> every output by name."""
PARITY_BATCHES = (1, 8)
"""Batch sizes that are compared unless the caller says otherwise."""
_LEAST = 1e-6
"""Probabilities below count as this: float16 cannot hold them, and they decide no prediction."""


def logits_of(network: Run, kind: OutputKind) -> Run:
    """A network as one that gives logits, so that differences mean the same for every network.

    Those of probabilities would be below any tolerance where there are many classes.
    """
    return lambda images: to_logits(network(images), kind, least=_LEAST)


def parity(
    reference: AnyRun, candidate: AnyRun, images: Floats, *, reference_name: str,
    candidate_name: str, tolerance: float | None, batches: tuple[int, ...] = PARITY_BATCHES,
) -> Parity:  # fmt: skip
    """Compare two networks on the same images, at several batch sizes.

        max over images x and classes k of |reference(x)[k] - candidate(x)[k]|

    Outputs that come by name may have any size: the largest difference of each is divided by the
    largest value of the reference's where that is above one. Of integers the shape alone counts:
    classes and indices flip where values are close.

    A dynamic graph can be right at the batch size it was traced with and wrong at others.

    Args:
        reference: The network.
        candidate: What it became.
        images: (N, C, H, W) float32, N > 0. Every image goes through at every batch size.
        reference_name: For the report, for example ``torch``.
        candidate_name: For the report, for example ``onnx``.
        tolerance: Largest difference that counts as the same; ``None`` to only measure.
        batches: Batch sizes (samples); one above N becomes N.

    Raises:
        StageError: The names or shapes differ, or a value is not finite.
    """
    sizes = tuple(sorted({min(size, len(images)) for size in batches}))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"parity needs images and batch sizes: {len(images)} images, {batches}")
    largest, relative = 0.0, False
    for size in sizes:
        for start in range(0, len(images), size):
            batch = np.ascontiguousarray(images[start : start + size])
            expected, got = reference(batch), candidate(batch)
            where = f"images {start} to {start + len(batch) - 1} at batch {size}"
            relative = isinstance(expected, Mapping)
            pairs = _paired(expected, got, reference_name, candidate_name, where=where)
            for output, one, other in pairs:
                if one.shape != other.shape:
                    raise StageError(
                        f"{candidate_name} gives {output} of shape {other.shape}, "
                        f"{reference_name} of {one.shape}, on {where}"
                    )
                for name, values in ((reference_name, one), (candidate_name, other)):
                    check_finite(values, name=name, where=where)
                difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
                found = float(difference.max(initial=0.0))
                if relative and one.dtype.kind == "f":
                    found /= max(1.0, float(np.abs(one).max(initial=0.0)))
                elif relative:
                    found = 0.0
                largest = max(largest, found)
    return Parity(
        reference=reference_name, candidate=candidate_name, max_abs=largest, tolerance=tolerance,
        images=len(images), batches=sizes, relative=relative,
    )  # fmt: skip


def _paired(
    expected: Floats | Outputs, got: Floats | Outputs, reference: str, candidate: str, *, where: str
) -> Iterator[tuple[str, npt.NDArray[Any], npt.NDArray[Any]]]:
    """Each output with its name and both values."""
    if not isinstance(expected, Mapping) or not isinstance(got, Mapping):
        yield "outputs", np.asarray(expected), np.asarray(got)
        return
    if expected.keys() != got.keys():
        raise StageError(
            f"{candidate} gives outputs {', '.join(got)}, {reference} {', '.join(expected)}, on "
            f"{where}"
        )
    yield from ((name, value, got[name]) for name, value in expected.items())


def require_parity(compared: Parity) -> Parity:
    """A comparison within its tolerance; beyond it, :class:`ExportError`."""
    if not compared.ok:
        raise ExportError(
            f"{compared.candidate} does not agree with {compared.reference}: "
            f"{'outputs' if compared.relative else 'logits'} differ by up "
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
