"""Both networks as ONNX, simplified, each pass compared with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.measurements import Parity
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.store import stage_key
from cswap_deploy.records.value import read_value, sha256_file
from cswap_deploy.stages.run import (
    PARITY_BATCHES,
    WEIGHTS,
    ExportRecord,
    Floats,
    Run,
    once,
    parity_images,
    pruned_module,
    require_parity,
    runner,
    tool_versions,
)

if TYPE_CHECKING:
    from torch import nn


_VERSION = 2
"""Raised when this stage's code changes what it writes."""
EXPORT_TOOLS = (
    "cswap-deploy", "torch", "timm", "onnx", "onnxscript", "onnxsim", "onnxruntime",
)  # fmt: skip


def export_stage(run: Run, pruned: Path, plan: PrunePlan) -> Path:
    """Both networks as ONNX, simplified, each pass compared with PyTorch."""
    config = run.config
    run.progress.stage("export", f"ONNX opset {config.graph_opset}")
    key = run.keys["export"] = stage_key(
        "export",
        version=_VERSION,
        inputs={"pruned": run.keys["prune"], "weights": sha256_file(pruned / WEIGHTS)},
        settings={"opset": config.graph_opset, "parity_tolerance": config.parity_tolerance},
        tools=tool_versions(*EXPORT_TOOLS),
    )
    folder = once(run, "export", key, lambda out: _export(run, pruned, plan, out))
    record = read_value(folder / "export.json", ExportRecord)
    run.fallbacks += record.model.notes
    run.progress.done(
        f"{record.model.size_bytes / 2**20:.2f} MiB, {record.model.nodes} nodes, logits within "
        f"{max(p.max_abs for p in record.parity):.1e}",
        reused=run.stages["export"] == "reused",
    )
    return folder


def _export(run: Run, pruned: Path, plan: PrunePlan, out: Path) -> None:
    from cswap_deploy.export.onnx import export_onnx
    from cswap_deploy.export.simplify import simplify_onnx

    images = parity_images(run)
    networks = {"model": pruned_module(run, pruned, plan), "dense": run.loaded.module}
    graphs: dict[str, OnnxArtifact] = {}
    parities = []
    for name, module in networks.items():
        run.progress.begin(f"exporting the {'pruned' if name == 'model' else 'dense'} network", 0)
        exported = export_onnx(
            module, input_size=run.spec.preprocessing.input_size,
            path=out / f"{name}.exported.onnx", opset=run.config.graph_opset,
        )  # fmt: skip
        graph = simplify_onnx(exported, path=out / f"{name}.onnx")
        run.progress.end()
        steps = (
            {"exported": exported, "simplified": graph}
            if name == "model"
            else {"dense, simplified": graph}
        )
        parities += [
            require_parity(_onnx_parity(run, module, step, images, label))
            for label, step in steps.items()
        ]
        exported.path.unlink()
        graphs[name] = graph.model_copy(update={"path": Path(f"{name}.onnx")})
    record = ExportRecord(model=graphs["model"], dense=graphs["dense"], parity=tuple(parities))
    (out / "export.json").write_text(record.canonical_json())


def _onnx_parity(
    run: Run, module: nn.Module, graph: OnnxArtifact, images: Floats, label: str
) -> Parity:
    """A graph in ONNX Runtime against the network in PyTorch."""
    from cswap_deploy.measure.parity import parity
    from cswap_deploy.runtime.onnx_session import OnnxSession

    return parity(
        runner(module), OnnxSession(graph.path, threads=None).run, images,
        reference_name="PyTorch", candidate_name=f"ONNX, {label}",
        tolerance=run.config.parity_tolerance, batches=PARITY_BATCHES,
    )  # fmt: skip
