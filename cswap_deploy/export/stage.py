"""The float32 graphs of both networks, and the graphs that engines are built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cswap_deploy.config import ExportConfig
from cswap_deploy.export.onnx import export_onnx
from cswap_deploy.export.precision import ROUNDED
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.progress import Progress
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.graphs import ExportRecord, PrecisionRecord
from cswap_deploy.records.measurements import Parity, PrecisionResult
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.session import Session

MODEL, DENSE = "model.onnx", "dense.onnx"
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
    def exported(cls, folder: Path, record: ExportRecord) -> Graphs:
        """The float32 graphs in the folder that :func:`export_networks` filled."""
        float32 = record.model.model_copy(update={"path": folder / MODEL})
        dense = record.dense.model_copy(update={"path": folder / DENSE})
        return cls(folder, float32, float32, dense, record.parity)

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


def export_networks(
    pruned: nn.Module, dense: nn.Module, *, config: ExportConfig, spec: ModelSpec,
    check: ParityCheck, folder: Path, progress: Progress,
) -> ExportRecord:  # fmt: skip
    """Export both networks and simplify the graphs; each pass is checked against PyTorch.

    Args:
        pruned: Becomes ``model.onnx``.
        dense: Becomes ``dense.onnx``, whose parity is checked after simplification alone.
        config: Gives the opset.
        spec: Gives the input's size and the outputs' names.
        check: Compares a graph with its network.
        folder: Existing, empty; the two graphs are left there.
        progress: Told of each export.

    Returns:
        The record, with paths relative to ``folder``.

    Raises:
        ExportError: torch does not export a network, or a pass changed its outputs.
        MissingDependencyError: onnxsim or onnxruntime is absent.
    """
    graphs: dict[str, OnnxArtifact] = {}
    parities = []
    for what, module, name in (("pruned", pruned, MODEL), ("dense", dense, DENSE)):
        progress.begin(f"exporting the {what} network", 0)
        path, opset = folder / f"exported-{name}", config.graph_opset
        exported = export_onnx(
            module, input_size=spec.preprocessing.input_size, path=path, opset=opset,
            outputs=spec.outputs,
        )  # fmt: skip
        graph = simplify_onnx(exported, path=folder / name)
        progress.end()
        steps = {"exported": exported, "simplified": graph}
        if name == DENSE:
            steps = {"dense, simplified": graph}
        parities += [check(module, g.path, f"ONNX, {step}") for step, g in steps.items()]
        path.unlink()
        graphs[name] = graph.model_copy(update={"path": Path(name)})
    return ExportRecord(model=graphs[MODEL], dense=graphs[DENSE], parity=tuple(parities))
