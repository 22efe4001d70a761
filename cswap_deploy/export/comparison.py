"""A narrower graph's predictions against those of the float32 graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cswap_deploy.config import ExportConfig
from cswap_deploy.errors import GateError, UsageError
from cswap_deploy.export.names import is_meant
from cswap_deploy.progress import Progress
from cswap_deploy.records.amounts import percent
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.measurements import KeptLayer, PrecisionTrial
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.probabilities import OutputKind, to_logits
from cswap_deploy.runtime.session import Floats, Outputs

Labels = npt.NDArray[np.int64]
RANGE_IMAGES = 64
"""Calibration images on which ranges are taken."""
COMPARED_IMAGES = 256
"""Further ones on which predictions are compared."""
FLIPS = 3
"""Predictions may change on this multiple of the drop's limit: most changes are between classes
that were close, and as often for the better."""
_BATCH = 32
_MOST_BYTES = 256 << 20
"""Outputs of the compared images, where there are no classes."""
_FEWEST = 8


@dataclass(frozen=True, slots=True)
class Comparison:
    """A graph's predictions against the float32 graph's."""

    finite: bool
    kl: float
    """Mean KL divergence (nats), or squared change over squared size; infinite where a value is
    not finite."""
    agreement: float
    """Fraction of the images with the same class, or of a change within the limit."""
    lost: int
    """Images right before and wrong now, less those that became right."""


def compare(reference: Floats, logits: Floats, labels: Labels) -> Comparison:
    """Compare logits, (N, classes), with the float32 graph's; labels are (N,)."""
    if not np.isfinite(logits).all():
        return Comparison(finite=False, kl=float("inf"), agreement=0.0, lost=len(labels))
    from scipy.special import log_softmax

    before, after = (log_softmax(x.astype(np.float64), axis=1) for x in (reference, logits))
    kl = float((np.exp(before) * (before - after)).sum(1).mean())
    old, new = reference.argmax(1), logits.argmax(1)
    lost = int((old == labels).sum()) - int((new == labels).sum())
    return Comparison(finite=True, kl=max(kl, 0.0), agreement=float((old == new).mean()), lost=lost)


def compare_outputs(reference: Outputs, outputs: Outputs, *, limit: float) -> Comparison:
    """Compare outputs without classes with the float32 graph's.

        change[x] = max over outputs of ||o[x] - o*[x]||^2 / ||o[x]||^2

    Args:
        reference: (N, ...) each, by name.
        outputs: The same of the narrower graph.
        limit: Largest change of an image that counts as none.
    """
    changes = []
    for name, value in reference.items():
        if value.dtype.kind == "f":
            old, new = (x[name].reshape(len(value), -1) for x in (reference, outputs))
            if not np.isfinite(new).all():
                return Comparison(finite=False, kl=float("inf"), agreement=0.0, lost=0)
            # An output at a time in float64: those of maps are large.
            error = np.square(old.astype(np.float64) - new).sum(1)
            energy = np.square(old.astype(np.float64)).sum(1)
            changes.append(error / np.maximum(energy, np.finfo(np.float32).tiny))
    change = np.max(changes, 0) if changes else np.zeros(1)
    within = float((change <= limit).mean())
    return Comparison(finite=True, kl=float(change.mean()), agreement=within, lost=0)


def same_predictions(found: Comparison, *, images: int, drop_limit: float) -> bool:
    """Whether predictions count as those of the float32 graph.

        finite,  lost <= max(1, drop_limit · images),  changed <= max(1, 3 · drop_limit · images)

    with ``drop_limit`` a fraction of top-1.
    """
    flips = max(1.0, FLIPS * drop_limit * images)
    few_lost = found.lost <= max(1.0, drop_limit * images)
    return found.finite and few_lost and (1 - found.agreement) * images <= flips + 1e-6


class Comparer:
    """Compares graphs of one precision with the float32 graph, and keeps a record for the report.

    Arguments are those of :func:`cswap_deploy.export.precision.narrow`.

    Raises:
        UsageError: A pattern of ``config.keep_fp32`` matches no node.
    """

    def __init__(
        self, onnx: OnnxArtifact, config: ExportConfig, images: Floats, labels: Labels | None,
        progress: Progress, kind: OutputKind = "logits",
    ) -> None:  # fmt: skip
        from onnx import load

        self.onnx, self.config, self.progress = onnx, config, progress
        self._kind = kind
        self.ranged = images[:RANGE_IMAGES]
        """Images for ranges; where there are few, comparisons share them."""
        rest = images[RANGE_IMAGES:] if len(images) >= 2 * RANGE_IMAGES else images
        self._images = rest[: COMPARED_IMAGES if labels is not None else _affordable(onnx)]
        self._labels = None
        if labels is not None:
            self._labels = labels[len(images) - len(rest) :][:COMPARED_IMAGES]
        self._reference = _outputs(onnx.path, self._images)
        self.tried: list[PrecisionTrial] = []
        self._operators = {n.name: n.op_type for n in load(onnx.path).graph.node}
        self.asked = _matching(self._operators, config.keep_fp32)
        """Nodes that the user keeps in float32."""

    @property
    def images(self) -> int:
        """Number of images that are compared."""
        return len(self._images)

    def compare(self, model: bytes) -> Comparison:
        """Run a graph on the images."""
        outputs = _outputs(model, self._images)
        self.progress.advance(1)
        if self._labels is None:
            return compare_outputs(self._reference, outputs, limit=self.config.drop_limit)
        before, after = (
            to_logits(next(iter(o.values())), self._kind) for o in (self._reference, outputs)
        )
        return compare(before, after, self._labels)

    def same(self, found: Comparison) -> bool:
        """Whether the predictions count as those of the float32 graph."""
        if self._labels is None:
            return found.finite and found.kl <= self.config.drop_limit
        return same_predictions(found, images=self.images, drop_limit=self.config.drop_limit)

    def record(self, what: str, found: Comparison) -> None:
        """Keep a comparison for the report."""
        kl, passes = found.kl if found.finite else None, self.same(found)
        self.tried.append(
            PrecisionTrial(what=what, kl=kl, agreement=found.agreement, passes=passes)
        )

    def kept(self, name: str, reason: Literal["range", "accuracy"], value: float) -> KeptLayer:
        """A node that stays wide; a value that is not finite is not recorded."""
        finite, operator = value if np.isfinite(value) else None, self._operators.get(name, "")
        return KeptLayer(node=name, operator=operator, reason=reason, value=finite)

    def refuse(self, found: Comparison) -> GateError:
        """The error for when nothing that is left to try is good enough."""
        alike = f"{percent(found.agreement, 2)} of the classes alike"
        words = alike if found.finite else "not finite"
        if found.finite and self._labels is None:
            words = f"a squared change of {found.kl:.2e} of the outputs' squared size"
        return GateError(
            f"{self.config.precision}: even with every layer kept that can be, predictions on "
            f"{self.images} calibration images differ too much from float32: {words}",
            fix="--precision fp16 or fp32, or raise --precision-drop",
        )


def _matching(operators: dict[str, str], patterns: tuple[str, ...]) -> list[KeptLayer]:
    for pattern in patterns:
        if not any(is_meant(name, pattern) for name in operators):
            raise UsageError(
                f"--keep-fp32 {pattern!r} matches none of the graph's {len(operators)} nodes, "
                f"among them {', '.join(list(operators)[:3])}"
            )
    return [
        KeptLayer(node=name, operator=operator, reason="asked")
        for name, operator in operators.items()
        if any(is_meant(name, pattern) for pattern in patterns)
    ]


def _affordable(onnx: OnnxArtifact) -> int:
    """Images whose outputs may be held twice: those of maps are large."""
    sizes = [[d for d in tensor.shape if isinstance(d, int)] for tensor in onnx.outputs]
    one = 4 * sum(math.prod(shape) for shape in sizes)
    return max(_FEWEST, min(COMPARED_IMAGES, _MOST_BYTES // max(one, 1)))


def _outputs(graph: Path | bytes, images: Floats) -> Outputs:
    """(N, ...) each output that has a row an image."""
    session = OnnxSession(graph, threads=None)
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for start in range(0, len(images), _BATCH):
        batch = np.ascontiguousarray(images[start : start + _BATCH])
        for name, value in session.named(batch).items():
            if value.ndim and len(value) == len(batch):
                parts.setdefault(name, []).append(value)
    return {n: np.concatenate(p) for n, p in parts.items() if sum(map(len, p)) == len(images)}
