"""What stages leave in the store beside graphs and predictions."""

from __future__ import annotations

from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.measurements import (
    AccuracyChange,
    Agreement,
    MetricChange,
    OutputChange,
    Parity,
    PrecisionResult,
)
from cswap_deploy.records.value import Value

SCORE = "score.json"


class ExportRecord(Value):
    """``export.json``: a network as a float32 graph, and its parity with PyTorch."""

    graph: OnnxArtifact
    parity: tuple[Parity, ...]


class PrecisionRecord(Value):
    """``precision.json``: the pruned network's graph in another precision."""

    model: OnnxArtifact
    result: PrecisionResult


class Score(Value):
    """``score.json``: from the dense to the pruned network in PyTorch."""

    accuracy: AccuracyChange | None = None
    """``None`` for a task without classes, and for images without labels."""
    agreement: Agreement | None = None
    """Of classifiers."""
    outputs: OutputChange | None = None
    """For those."""
    metric: MetricChange | None = None
