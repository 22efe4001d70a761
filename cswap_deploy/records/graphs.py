"""What the export stages leave in the store beside the graphs."""

from __future__ import annotations

from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.measurements import Parity, PrecisionResult
from cswap_deploy.records.value import Value


class ExportRecord(Value):
    """``export.json``: both networks as float32 graphs, and their parity with PyTorch."""

    model: OnnxArtifact
    """The pruned network."""
    dense: OnnxArtifact
    parity: tuple[Parity, ...]


class PrecisionRecord(Value):
    """``precision.json``: the pruned network's graph in another precision."""

    model: OnnxArtifact
    result: PrecisionResult
