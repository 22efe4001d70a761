"""Latency of bundles on one runtime: batch sizes, and CUDA graphs off and on where there are some.

    python benchmarks/bench_latency.py --bundles dense=DIR pruned=DIR [--target tensorrt]
    python benchmarks/bench_latency.py            # builds both demo networks, dense and pruned
    python benchmarks/bench_latency.py --quick    # demo-resnet, fewer calls

Before anything is timed, every file is held against its digest, and the logits of every engine at
every batch size against the NumPy reference of ONNX on the bundle's graph. The calls of all bundles
alternate. Times are the host's wall clock, copies included; TensorRT's sessions also give the GPU's
own. Bundles of one line should be of one precision and one batch range. ``--samples`` keeps the raw
samples with all settings and the GPU's state. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import cswap_deploy
from cswap_deploy.measure.device import describe_device
from cswap_deploy.measure.latency import measure_latency
from cswap_deploy.measure.trtexec import TOOLS, trtexec_line
from cswap_deploy.models.demos import IMAGES
from cswap_deploy.records.bundle import verify_bundle
from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.records.measurements import Latency
from cswap_deploy.records.value import canonical_json
from cswap_deploy.runtime.bundle import DeviceBundle, Transform
from cswap_deploy.runtime.classifier import ONNX_TARGETS, load_engine
from cswap_deploy.runtime.preprocess import normalise, open_picture, resize_and_crop
from cswap_deploy.runtime.session import Floats, Session
from cswap_deploy.targets import get_target


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("demo-resnet", "demo-vit")
    ratio: float = 0.4
    """Of the MACs, where the bundles are built here: by magnitude, not refitted, as only their
    shape matters."""
    batches: tuple[int, ...] = (1, 8, 64)
    runs: int = 200
    warmup: int = 20
    images: int = 4
    """Distinct ones; a batch repeats them. All are checked against the reference."""
    tolerance: float = 0.01
    """Largest difference of logits, as a share of the reference's range; a float32 engine on a GPU
    computes in TF32."""
    tolerance_narrow: float = 0.1
    """The same where the graph is narrower than float32."""


@dataclass(frozen=True)
class Result:
    bundle: str
    batch: int
    cuda_graph: bool
    p50_ms: float
    p90_ms: float
    p99_ms: float
    speedup: float
    """Of the first bundle's median over this one's."""
    images_per_second: float
    """By the median."""
    compute_p50_ms: float | None
    """By CUDA events, copies not in it."""
    warmup: int
    runs: int
    logits_max_difference: float
    """From the reference, as a share of its range."""


@dataclass(frozen=True)
class Opened:
    """A verified bundle, with what its logits should be."""

    folder: Path
    bundle: DeviceBundle
    engine: EngineArtifact | None
    images: Floats
    reference: Floats
    tolerance: float


def pictures(folder: Path | None, transform: Transform, count: int) -> Floats:
    """The first pictures of a folder, else of the embedded clothes, as the network wants them."""
    if folder is None:
        with np.load(IMAGES["validation"]) as arrays:
            found = [Image.fromarray(pixels[..., 0]) for pixels in arrays["images"][:count]]
    else:
        found = [open_picture(path) for path in sorted(folder.iterdir())[:count]]
    return normalise(np.stack([resize_and_crop(p, transform) for p in found]), transform)


def reference_logits(bundle: DeviceBundle, images: Floats) -> Floats:
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = ReferenceEvaluator(onnx.load_from_string(bundle.read(bundle.onnx_path)))
    [name] = graph.input_names
    logits: Floats = graph.run(None, {name: images})[0]
    return logits


def open_bundle(folder: Path, target: str, config: Config, shown: Path | None) -> Opened:
    manifest = verify_bundle(folder).manifest
    bundle = DeviceBundle.open(folder)
    engine = next((r.engine for r in manifest.targets if r.engine.target == target), None)
    if engine is None and target not in ONNX_TARGETS:
        raise SystemExit(f"{folder} has no {target} engine")
    images = pictures(shown, bundle.transform, config.images)
    narrow = bundle.precision != "fp32"
    return Opened(
        folder=folder,
        bundle=bundle,
        engine=engine,
        images=images,
        reference=reference_logits(bundle, images),
        tolerance=config.tolerance_narrow if narrow else config.tolerance,
    )


def open_session(opened: Opened, target: str, threads: int | None, cuda_graph: bool) -> Session:
    bundle = opened.bundle
    if target in ONNX_TARGETS:
        from cswap_deploy.runtime.onnx_session import OnnxSession

        content = bundle.read(bundle.onnx_path)
        device: Any = ONNX_TARGETS[target]
        return OnnxSession(content, threads=threads, device=device)
    assert opened.engine is not None
    if target not in TOOLS:
        path = opened.folder / opened.engine.path
        engine = opened.engine.model_copy(update={"path": path})
        return get_target(target).load(engine, threads=threads)
    file = next(e for e in bundle.engines if e.target == target)
    return load_engine(bundle, file, cuda_graph=cuda_graph)


def check(name: str, opened: Opened, session: Session, batches: tuple[int, ...]) -> float:
    """Two calls at each batch: the second replays the CUDA graph that the first recorded."""
    largest = 0.0
    for size in batches:
        rows = np.arange(size) % len(opened.images)
        for _ in range(2):
            logits = session.run(np.ascontiguousarray(opened.images[rows]))
            difference = float(np.abs(logits - opened.reference[rows]).max())
            assert np.isfinite(difference), f"{name}: logits at batch {size} are not finite"
            largest = max(largest, difference / float(np.ptp(opened.reference)))
    assert largest <= opened.tolerance, (
        f"{name}: logits differ from the reference by {largest:.2e} of their range, "
        f"allowed are {opened.tolerance:g}"
    )
    return largest


def measure(
    bundles: Mapping[str, Opened], target: str, config: Config, threads: int | None
) -> tuple[list[Result], dict[str, Any]]:
    profiles = [o.engine.batch for o in bundles.values() if o.engine and o.engine.batch]
    batches = tuple(b for b in config.batches if all(p.min <= b <= p.max for p in profiles))
    assert batches, f"no batch of {config.batches} is inside all profiles"
    worst: dict[tuple[bool, str], float] = {}
    images = next(iter(bundles.values())).images
    assert all(np.array_equal(images, o.images) for o in bundles.values()), "unlike preprocessing"
    found = {}
    for cuda_graph in (False, True) if target in TOOLS else (False,):
        sessions: dict[str, Session] = {}
        try:
            for name, opened in bundles.items():
                sessions[name] = open_session(opened, target, threads, cuda_graph)
                worst[cuda_graph, name] = check(name, opened, sessions[name], batches)
            for batch in batches:
                found[batch, cuda_graph] = measure_latency(
                    sessions, images=images[np.arange(batch) % len(images)], runs=config.runs,
                    warmup=config.warmup,
                )  # fmt: skip
        finally:
            for session in sessions.values():
                session.close()
    results, raw = [], {}
    for (batch, cuda_graph), latencies in found.items():
        first = next(iter(latencies.values()))
        for name, latency in latencies.items():
            results.append(_result(name, batch, cuda_graph, latency, first, worst))
            raw[f"{name}, batch {batch}, CUDA graph {'on' if cuda_graph else 'off'}"] = {
                **latency.model_dump(mode="json"),
                "trtexec": _command(bundles[name].engine, latency),
            }
    return results, raw


def _result(
    name: str,
    batch: int,
    cuda_graph: bool,
    latency: Latency,
    first: Latency,
    worst: Mapping[tuple[bool, str], float],
) -> Result:
    result = Result(
        bundle=name,
        batch=batch,
        cuda_graph=cuda_graph,
        p50_ms=round(latency.p50_ms, 4),
        p90_ms=round(latency.p90_ms, 4),
        p99_ms=round(latency.p99_ms, 4),
        speedup=round(first.p50_ms / latency.p50_ms, 3),
        images_per_second=round(1000 * batch / latency.p50_ms),
        compute_p50_ms=None if latency.device is None else round(latency.device.p50_ms, 4),
        warmup=latency.warmup,
        runs=len(latency.samples_ms),
        logits_max_difference=float(f"{worst[cuda_graph, name]:.2e}"),
    )
    gpu = "" if result.compute_p50_ms is None else f" GPU {result.compute_p50_ms:.3f} ms"
    print(
        f"{name:24} batch {batch:3} graph {'on ' if cuda_graph else 'off'} p50 "
        f"{result.p50_ms:8.3f} p90 {result.p90_ms:8.3f} p99 {result.p99_ms:8.3f} ms{gpu} "
        f"{result.speedup:.2f}x {result.images_per_second:7,} images/s",
        flush=True,
    )
    return result


def _command(engine: EngineArtifact | None, latency: Latency) -> str | None:
    if engine is None or engine.target not in TOOLS:
        return None
    return trtexec_line(engine, latency)


def build(model: str, target: str, ratio: float, folder: Path) -> dict[str, Path]:
    made = {}
    for name, removed in (("dense", 0.0), ("pruned", ratio)):
        made[f"{model}, {name}"] = cswap_deploy.build(
            model, ratio=removed, ratio_of="macs", criterion="magnitude", refit=False,
            refit_producers=False, target=(target,), batch="1:8:64", calibration_samples=64,
            validation_samples=64, latency_runs=10, store=folder / "store",
            output=folder / f"{model}-{name}",
        ).path  # fmt: skip
    return made


def named_folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"NAME=FOLDER is wanted, the folder of a bundle: {text}")
    return name, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundles", nargs="+", type=named_folder, metavar="NAME=DIR")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--threads", type=int, help="of a CPU runtime")
    parser.add_argument("--batches", type=int, nargs="+", help="1 8 64 unless said")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="instead of embedded ones")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="JSON with everything raw")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    config = Config(models=("demo-resnet",), runs=50) if args.quick else Config()
    if args.batches:
        config = replace(config, batches=tuple(args.batches))
    results: list[Result] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        pairs = [dict(args.bundles)] if args.bundles else []
        pairs = pairs or [build(m, args.target, config.ratio, Path(scratch)) for m in config.models]
        for pair in pairs:
            opened = {
                name: open_bundle(folder, args.target, config, args.pictures)
                for name, folder in pair.items()
            }
            rows, samples = measure(opened, args.target, config, args.threads)
            results += rows
            raw |= samples
    if args.samples:
        args.samples.write_text(canonical_json(raw))
    device = describe_device()
    print(
        json.dumps(
            {
                "target": args.target,
                "device": device.model_dump(mode="json"),
                "config": asdict(config),
                "results": [asdict(result) for result in results],
            }
        )
    )


if __name__ == "__main__":
    main()
