"""The pruned network's graph in the number formats that the engine is to have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.measurements import PrecisionResult
from cswap_deploy.records.store import stage_key
from cswap_deploy.records.value import Value, read_value
from cswap_deploy.stages.run import (
    MODEL,
    ExportRecord,
    Floats,
    Run,
    calibration_inputs,
    few_images,
    once,
    tool_versions,
)

_VERSION = 3
"""Raised when this stage's code changes what it writes."""


@dataclass(frozen=True, slots=True)
class Graphs:
    """What engines are built from."""

    folder: Path
    """Holds ``model.onnx`` in the precision asked for."""
    model: OnnxArtifact
    float32: OnnxArtifact
    dense: OnnxArtifact
    """Float32."""
    precision: PrecisionResult | None
    """``None`` for float32."""

    def stand_in(self) -> tuple[Callable[[Floats], Floats], str]:
        """What shows the graph's predictions where its engine does not run, and its name."""
        from cswap_deploy.runtime.onnx_session import OnnxSession

        if self.precision is not None and self.precision.emulated:
            from cswap_deploy.export.precision import ROUNDED

            words = "float32 results rounded after every operator, in ONNX Runtime"
            return OnnxSession(self.folder / ROUNDED, threads=None).run, words
        return OnnxSession(self.model.path, threads=None).run, "the same graph in ONNX Runtime"


class _Record(Value):
    """``precision.json`` in the store."""

    model: OnnxArtifact
    result: PrecisionResult


def precision_stage(run: Run, exported: Path) -> Graphs:
    """Narrow the pruned network's graph; nothing is to be done for float32."""
    config = run.config
    record = read_value(exported / "export.json", ExportRecord)
    float32 = record.model.model_copy(update={"path": exported / MODEL})
    dense = record.dense.model_copy(update={"path": exported / "dense.onnx"})
    if config.precision == "fp32":
        return Graphs(exported, float32, float32, dense, None)
    run.progress.stage("precision", config.precision)
    names = ("precision", "keep_fp32", "int8_calibration", "int8_quantizer", "drop_limit")
    tools = tool_versions("cswap-deploy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu")
    if config.int8_quantizer == "modelopt":
        from cswap_deploy.export.modelopt import modelopt_version

        tools |= {"modelopt": modelopt_version()}
    key = run.keys["precision"] = stage_key(
        "precision",
        version=_VERSION,
        inputs={"onnx": float32.sha256} | calibration_inputs(run),
        settings={name: getattr(config, name) for name in names},
        tools=tools,
    )

    def make(out: Path) -> None:
        from cswap_deploy.export.precision import JUDGE_IMAGES, RANGE_IMAGES, reduce_precision

        images = few_images(run, RANGE_IMAGES + JUDGE_IMAGES)
        model, result = reduce_precision(
            float32, precision=config.precision, images=images,
            labels=run.samples.calibration.labels[: len(images)],
            drop_limit=config.drop_limit, path=out / MODEL,
            keep_fp32=config.keep_fp32, int8_calibration=config.int8_calibration,
            int8_quantizer=config.int8_quantizer, progress=run.progress,
        )  # fmt: skip
        record = _Record(model=model.model_copy(update={"path": Path(MODEL)}), result=result)
        (out / "precision.json").write_text(record.canonical_json())

    folder = once(run, "precision", key, make)
    found = read_value(folder / "precision.json", _Record)
    model = found.model.model_copy(update={"path": folder / MODEL})
    run.progress.done(_summary(model, found.result), reused=run.stages["precision"] == "reused")
    return Graphs(folder, model, float32, dense, found.result)


def _summary(model: OnnxArtifact, result: PrecisionResult) -> str:
    kept = len(result.kept)
    text = f"{model.size_bytes / 2**20:.2f} MiB, {result.agreement:.2%} of {result.images} "
    text += "predictions as in float32"
    if result.calibration:
        text += f", ranges by {result.calibration}"
    return text + (f"; {kept} nodes kept wider" if kept else "")
