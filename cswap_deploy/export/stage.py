"""The float32 graphs of both networks, and the graphs that engines are built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cswap_deploy.config import ExportConfig
from cswap_deploy.export.child import ChildLimits
from cswap_deploy.export.onnx import export_onnx
from cswap_deploy.export.precision import ROUNDED
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.records.bundle import MODEL
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.graphs import ExportRecord, PrecisionRecord
from cswap_deploy.records.measurements import Parity, PrecisionResult
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.records.value import read_value
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.session import Session

DENSE, RECORD = "dense.onnx", "export.json"
ParityCheck = Callable[[nn.Module, Path, str], Parity]
"""Compares a network with its graph, whose name the report shows; raises ``ExportError`` where
their outputs differ by more than the tolerance."""


@dataclass(frozen=True, slots=True)
class Graphs:
    """What engines are built from."""

    folder: Path
    """Holds ``model.onnx`` in the precision asked for."""
    model: OnnxArtifact
    """The pruned network in that precision."""
    float32: OnnxArtifact
    """The pruned network."""
    dense: OnnxArtifact
    """The dense network, float32."""
    parity: tuple[Parity, ...]
    """Parity of the float32 graphs with PyTorch."""
    precision: PrecisionResult | None = None
    """``None`` for float32."""

    @classmethod
    def exported(cls, folder: Path, dense_folder: Path) -> Graphs:
        """The float32 graphs in the folders that :func:`export_network` filled."""
        read = {f: read_value(f / RECORD, ExportRecord) for f in (folder, dense_folder)}
        float32, dense = (
            record.graph.model_copy(update={"path": at / record.graph.path})
            for at, record in read.items()
        )
        parity = tuple(p for record in read.values() for p in record.parity)
        return cls(folder, float32, float32, dense, parity)

    def narrowed(self, folder: Path, record: PrecisionRecord) -> Graphs:
        """The same with the narrowed graph in a folder."""
        model = record.model.model_copy(update={"path": folder / MODEL})
        return Graphs(folder, model, self.float32, self.dense, self.parity, record.result)

    def emulate(self) -> tuple[Session, str]:
        """What shows an engine's predictions where it does not run here, and a name for it."""
        if self.precision is not None and self.precision.emulated:
            words = "float32 results rounded after every operator, in ONNX Runtime"
            return OnnxSession(self.folder / ROUNDED, threads=None), words
        return OnnxSession(self.model.path, threads=None), "the same graph in ONNX Runtime"


def export_network(
    module: nn.Module, name: str, *, config: ExportConfig, spec: ModelSpec,
    check: ParityCheck, folder: Path,
) -> None:  # fmt: skip
    """Export a network and simplify the graph; each pass is checked against PyTorch.

    Args:
        module: The network.
        name: ``MODEL`` or ``DENSE``, the file; the latter is checked once simplified, not before.
        config: Gives the opset.
        spec: Gives the input's size and the outputs' names.
        check: Compares a graph with its network.
        folder: Existing, empty; the graph and its record, :class:`ExportRecord`, are left there.

    Raises:
        ExportError: torch does not export the network, or a pass changed its outputs.
        MissingDependencyError: onnxsim or onnxruntime is absent.
    """
    path = folder / f"exported-{name}"
    exported = export_onnx(
        module, input_size=spec.preprocessing.input_size, path=path, opset=config.graph_opset,
        outputs=spec.outputs,
    )  # fmt: skip
    graph = simplify_onnx(exported, path=folder / name, limits=ChildLimits.of(config))
    steps = {"exported": exported, "simplified": graph}
    if name == DENSE:
        steps = {"dense, simplified": graph}
    parity = tuple(check(module, g.path, f"ONNX, {step}") for step, g in steps.items())
    path.unlink()
    record = ExportRecord(graph=graph.model_copy(update={"path": Path(name)}), parity=parity)
    (folder / RECORD).write_text(record.canonical_json())
