"""What number formats cost: top-1 in float32, float16, bfloat16, int8 and mixed, on real images.

Dense networks, so that only the format differs. Graphs run in ONNX Runtime on the CPU; 16-bit ones
as float32 graphs that round after every operator, as a GPU would. TensorRT for RTX builds every
graph where it is installed. No time is measured: these formats are for GPUs.

    python benchmarks/bench_precision.py --quick
    CSWAP_DATA=... python benchmarks/bench_precision.py --models demo-resnet demo-vit \\
        tf_efficientnet_lite0 --json benchmarks/results/precision-cpu.json

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from cswap_deploy.config import OPSETS, DataConfig, ExportConfig, ModelConfig
from cswap_deploy.data import load_samples
from cswap_deploy.export.onnx import export_onnx
from cswap_deploy.export.precision import ROUNDED, narrow
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.models.load import load_model
from cswap_deploy.progress import Silent
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.run import tool_versions
from cswap_deploy.runtime.onnx_session import OnnxSession
from cswap_deploy.runtime.preprocess import normalise
from cswap_deploy.settings import BatchRange
from cswap_deploy.targets import BuildRequest
from cswap_deploy.targets.tensorrt_rtx import TensorRtRtx

BATCH = 50


@dataclass(frozen=True)
class Row:
    """One network in one format."""

    model: str
    precision: str
    top1: float
    drop: float
    """Against float32, a fraction."""
    agreement: float
    images: int
    kept: int
    layers: int
    calibration: str
    graph_mib: float
    engine_mib: float | None
    """Of TensorRT for RTX, built ahead of time and not run."""


def classes(graph: Path, images: np.ndarray) -> np.ndarray:
    session = OnnxSession(graph, threads=None)
    parts = [session.run(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return np.concatenate(parts).argmax(1)


def engine_mib(graph: OnnxArtifact, folder: Path) -> float | None:
    if find_spec("tensorrt_rtx") is None:
        return None
    built = TensorRtRtx().build(BuildRequest(graph, batch=BatchRange(max=8), out_dir=folder))
    return built.size_bytes / 2**20


def measure(name: str, formats: list[tuple[str, str]]) -> list[Row]:
    loaded = load_model(ModelConfig(model=name))
    photos = Path(os.environ.get("CSWAP_DATA", "data")) / "imagenet-sample"
    data = DataConfig(
        data=None if name.startswith("demo-") else str(photos), calibration_samples=320
    )
    samples = load_samples(data, model=loaded.spec, seed=0, progress=Silent())
    steps = loaded.spec.preprocessing
    calibration, test = (
        normalise(s.images, steps) for s in (samples.calibration, samples.validation)
    )
    rows: list[Row] = []
    exact: np.ndarray | None = None
    for precision, quantizer in formats:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            exported = export_onnx(
                loaded.module, input_size=steps.input_size, path=folder / "e.onnx",
                opset=OPSETS[precision],
            )  # fmt: skip
            graph = simplify_onnx(exported, path=folder / "model.onnx")
            judged, kept, layers, ranges = graph.path, 0, 0, ""
            if precision != "fp32":
                config = ExportConfig(precision=precision)
                if config.int8:
                    config = ExportConfig(precision=precision, int8_quantizer=quantizer)
                path = folder / "narrow.onnx"
                record = narrow(
                    graph, config=config, images=calibration, labels=samples.calibration.labels,
                    path=path,
                )  # fmt: skip
                graph, result = record.model.model_copy(update={"path": path}), record.result
                judged = folder / ROUNDED if result.emulated else path
                kept, layers, ranges = len(result.kept), result.layers, result.calibration
            found = classes(judged, test)
            exact = found if exact is None else exact
            right = float((found == samples.validation.labels).mean())
            first = rows[0].top1 if rows else right
            rows.append(
                Row(
                    name,
                    precision,
                    right,
                    first - right,
                    float((found == exact).mean()),
                    len(found),
                    kept,
                    layers,
                    ranges,
                    graph.size_bytes / 2**20,
                    engine_mib(graph, folder),
                )
            )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["demo-resnet", "demo-vit"])
    parser.add_argument("--quick", action="store_true", help="demo-resnet alone, three formats")
    parser.add_argument("--int8-quantizer", nargs="+", default=["onnxruntime"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = ["demo-resnet"] if options.quick else options.models
    precisions = ["fp32", "fp16", "int8"] if options.quick else list(OPSETS)
    precisions.sort(key=lambda p: p != "fp32")
    formats = [
        (precision, quantizer)
        for precision in precisions
        for quantizer in (options.int8_quantizer if precision in ("int8", "mixed") else [""])
    ]
    rows = [row for name in models for row in measure(name, formats)]
    packages = ("torch", "onnx", "onnxruntime", "tensorrt-rtx", "cswap-deploy")
    told = {
        "versions": tool_versions(*packages),
        "rows": [asdict(row) for row in rows],
    }
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
