"""Everything that waits for a GPU, in one command, the most worth first.

    python benchmarks/on_gpu.py --minutes 9                # on a machine with an NVIDIA GPU
    python benchmarks/on_gpu.py --device cpu --quick       # the same logic, small, without one

Each step has a process and a time limit of its own, so that one that hangs costs no other. The
results are written after every step, as one JSON object with the versions of all tools
(``--output``, benchmarks/results/on_gpu.json); a step that failed or found nothing to run on says
why. Weights are random: what is measured is time, and that both devices agree.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = (
    "cswap-deploy", "torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "tensorrt-rtx",
)  # fmt: skip
SHARE = 0.45
"""Part of the time left that one step may take: the later ones get theirs."""


@dataclass(frozen=True)
class Options:
    """What every step is told."""

    device: str = "cuda"
    quick: bool = False

    @property
    def network(self) -> tuple[str, int, int]:
        """timm's name, side of the images, how many to prune on."""
        return ("test_resnet", 64, 24) if self.quick else ("resnet50", 224, 512)

    @property
    def batches(self) -> tuple[int, ...]:
        """Of latencies."""
        return (1, 2) if self.quick else (1, 8, 64)


class NotHereError(Exception):
    """A step has nothing to run on; says what is missing."""


@dataclass(frozen=True)
class Step:
    """One question, and who answers it."""

    name: str
    answer: Callable[[Options], dict[str, Any]]
    seconds: int
    """At most."""


def kernel(options: Options) -> dict[str, Any]:
    """Correctness and bandwidth of ``masked_fanout``, against a copy (bench_kernel.py)."""
    if options.device == "cpu":
        raise NotHereError("the kernel needs a GPU")
    return _last_json([sys.executable, "benchmarks/bench_kernel.py", *["--quick"] * options.quick])


def sanitizer(options: Options) -> dict[str, Any]:
    """The kernel's tests under each tool of compute-sanitizer."""
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if found is None or options.device == "cpu":
        raise NotHereError("compute-sanitizer is not installed" if found is None else "no GPU")
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels", "-m", "gpu"]
    said = {}
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        done = subprocess.run(
            [found, "--tool", tool, "--error-exitcode", "9", *tests],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        said[tool] = {"code": done.returncode, "end": done.stdout.strip().splitlines()[-3:]}
    return said


def effects(options: Options) -> dict[str, Any]:
    """Effects on the device against the CPU's, of units of both demo networks."""
    import numpy as np
    import torch

    from cswap_deploy.causal.experiment import Experiment
    from cswap_deploy.causal.interventions import input_moments
    from cswap_deploy.causal.measurement import LocalMeasurement
    from cswap_deploy.config import PruneConfig
    from cswap_deploy.network.placing import device_named
    from cswap_deploy.network.units import consumers
    from cswap_deploy.pruning.prepare import prepare

    found = {}
    for name in ("demo-resnet", "demo-vit"):
        module, images, labels = _demo(name, 8 if options.quick else 128)
        ready = prepare(module, images, PruneConfig(ratio=0.4))
        step = 8 if options.quick else 2
        wanted = {g: range(0, g.units, step) for g in ready.groups}
        measured = []
        for network in (ready, ready.to(device_named(options.device))):
            moments = input_moments(
                network.graph, consumers(network.groups), images,
                intervention="predicted", chunk=64,
            )  # fmt: skip
            work = LocalMeasurement(Experiment(network.graph, images, labels, moments))
            begun = time.perf_counter()
            measured.append(np.concatenate([e.kl.ravel() for e in work.effects(wanted)]))
            seconds = time.perf_counter() - begun
        there = LocalMeasurement(Experiment(network.graph, images, labels, moments), fused=True)
        fused = np.concatenate([e.kl.ravel() for e in there.effects(wanted)])
        host = measured[0]
        found[name] = {
            "forwards": int(host.size),
            "seconds_on_device": round(seconds, 3),
            "largest_difference": float(np.abs(measured[1] - host).max()),
            "largest_difference_fused": float(np.abs(fused - host).max()),
            "largest_effect": float(host.max()),
            "peak_mib": _peak_mib(torch),
        }
    return found


def prune(options: Options) -> dict[str, Any]:
    """A whole prune stage on the device, in seconds and passes."""
    import torch

    from cswap_deploy.config import PruneConfig
    from cswap_deploy.data.calibration import Calibration
    from cswap_deploy.network.placing import device_named, placed
    from cswap_deploy.progress import Silent
    from cswap_deploy.pruning.prune import prune as prune_stage

    name, side, count = options.network
    module = _random(name)
    images = torch.randn(count, 3, side, side).contiguous(memory_format=torch.channels_last)
    device = device_named(options.device)
    there = _random(name).to(device)

    def one_pass() -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            said = [there(placed(part, device)).sum() for part in torch.split(images, 64)]
        float(torch.stack(said).sum())
        return time.perf_counter() - begun

    one_pass()
    passing = min(one_pass() for _ in range(3))
    phases: dict[str, float] = {}

    class Watched(Silent):
        """How long each kind of phase takes."""

        kind, since = "", 0.0

        def begin(self, what: str, total: int) -> None:
            self.end()
            self.kind, self.since = what.split(maxsplit=1)[0], time.perf_counter()

        def end(self) -> None:
            if self.kind:
                spent = time.perf_counter() - self.since
                phases[self.kind] = phases.get(self.kind, 0.0) + spent
            self.kind = ""

    config = PruneConfig(ratio=0.4, device=options.device, rounds=2 if options.quick else 4)
    labels = torch.randint(0, 1000, (count,))
    begun = time.perf_counter()
    done = prune_stage(module, Calibration(images, labels), config=config, progress=Watched())
    seconds = time.perf_counter() - begun
    return {
        "network": name, "images": count, "side": side, "seconds": round(seconds, 2),
        "pass_seconds": round(passing, 4), "passes": round(seconds / passing, 1),
        "phases_in_passes": {k: round(v / passing, 1) for k, v in phases.items()},
        "params": [done.plan.dense.params, done.plan.pruned.params], "peak_mib": _peak_mib(torch),
    }  # fmt: skip


def latency(options: Options) -> dict[str, Any]:
    """Dense against pruned in PyTorch, widths aligned and not: float16 and CUDA graphs on a GPU."""
    import torch

    name, side, _ = options.network
    on_gpu = options.device != "cpu"
    dtype = torch.float16 if on_gpu else torch.float32
    networks = {"dense": _random(name)} | {
        f"pruned, multiples of {n}": _cut(name, side, n) for n in (1, 8)
    }
    found: dict[str, Any] = {"dtype": str(dtype)}
    for batch in options.batches:
        calls = {}
        for label, module in networks.items():
            there = module.to(options.device, dtype, memory_format=torch.channels_last)
            images = torch.randn(batch, 3, side, side, device=options.device, dtype=dtype)
            images = images.contiguous(memory_format=torch.channels_last)
            calls[label] = _recorded(there, images) if on_gpu else _plain(there, images)
        found[f"batch {batch}"] = _interleaved(calls, 10 if options.quick else 100)
    return found


def engines(options: Options) -> dict[str, Any]:
    """Dense against pruned in each runtime that is installed here."""
    import onnxruntime
    import torch

    from cswap_deploy.export.onnx import export_onnx

    name, side, _ = options.network
    wanted = "CPUExecutionProvider" if options.device == "cpu" else "CUDAExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise NotHereError(f"onnxruntime {onnxruntime.__version__} has no {wanted}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for label, module in (("dense", _random(name)), ("pruned", _cut(name, side, 8))):
            path = Path(folder) / f"{label}.onnx"
            export_onnx(module, input_size=(3, side, side), path=path)
            sessions[label] = onnxruntime.InferenceSession(path, providers=[wanted])
        for batch in options.batches:
            images = torch.randn(batch, 3, side, side).numpy()
            calls = {k: _session(s, images) for k, s in sessions.items()}
            found[f"{wanted}, batch {batch}"] = _interleaved(calls, 10 if options.quick else 100)
    return found


STEPS = (
    Step("kernel", kernel, 90),
    Step("effects", effects, 60),
    Step("prune", prune, 240),
    Step("latency", latency, 90),
    Step("sanitizer", sanitizer, 120),
    Step("engines", engines, 90),
)


def _demo(name: str, count: int) -> tuple[Any, Any, Any]:
    from accuracy_models import MODELS, data_of
    from accuracy_models import load as load_demo

    from cswap_deploy.data import calibration_set, load_samples
    from cswap_deploy.progress import Silent

    loaded = load_demo(MODELS[name])
    data = data_of(MODELS[name], count)
    samples = load_samples(data, model=loaded.spec, seed=0, progress=Silent())
    images = calibration_set(samples.calibration, loaded.spec.preprocessing)
    return loaded.module, images.images, images.labels


def _random(name: str) -> Any:
    import torch

    from cswap_deploy.models.torchvision_shim import import_timm

    torch.manual_seed(0)
    return import_timm().create_model(name, pretrained=False).eval()


def _cut(name: str, side: int, multiple: int) -> Any:
    """Without 40 % of the MACs by magnitude; which units go does not matter for time."""
    import torch

    import cswap_deploy

    images = torch.randn(8, 3, side, side)
    return cswap_deploy.prune(
        _random(name), (images, torch.arange(8)), ratio=0.4, ratio_of="macs",
        criterion="magnitude", intervention="zero", refit=False, round_to=multiple, device="cpu",
    ).module  # fmt: skip


def _plain(module: Any, images: Any) -> Callable[[], object]:
    import torch

    def call() -> object:
        with torch.inference_mode():
            return module(images)

    return call


def _recorded(module: Any, images: Any) -> Callable[[], object]:
    """One call as a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(3):
            module(images)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        module(images)

    def call() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return call


def _session(session: Any, images: Any) -> Callable[[], object]:
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def _interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Median milliseconds of each, run in turn, and the first one's over each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for at in range(rounds + 3):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if at >= 3:
                samples[name].append(1e3 * (time.perf_counter() - begun))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    first = next(iter(medians.values()))
    return {
        name: {"median_ms": round(median, 4), "speedup": round(first / median, 3)}
        for name, median in medians.items()
    }


def _peak_mib(torch: Any) -> float | None:
    there = torch.cuda.is_available()
    return round(torch.cuda.max_memory_allocated() / 2**20, 1) if there else None


def _last_json(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-800:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def machine(options: Options) -> dict[str, Any]:
    """What it ran on."""
    import torch

    from cswap_deploy.run import tool_versions

    there = options.device != "cpu" and torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if there else None,
        "cuda": torch.version.cuda, "python": sys.version.split()[0], "cores": os.cpu_count(),
        "versions": tool_versions(*TOOLS),
    }  # fmt: skip


def answered(step: Step, options: Options, seconds: float) -> dict[str, Any]:
    """A step's answer, from a process of its own."""
    flags = ["--step", step.name, "--device", options.device, *["--quick"] * options.quick]
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, __file__, *flags], cwd=ROOT, capture_output=True, text=True,
            timeout=seconds, check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {seconds:.0f} s"}
    took = {"seconds": round(time.perf_counter() - begun, 1)}
    if done.returncode:
        return took | {"failed": (done.stderr.strip().splitlines() or ["no words"])[-1]}
    return took | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="for all steps together")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--quick", action="store_true", help="small networks, few calls")
    add("--output", type=Path, default=ROOT / "benchmarks/results/on_gpu.json")
    add("--step", choices=[s.name for s in STEPS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    options = Options(args.device, args.quick)
    if args.step:
        (step,) = (s for s in STEPS if s.name == args.step)
        try:
            print(json.dumps({"answer": step.answer(options)}))
        except NotHereError as err:
            print(json.dumps({"skipped": str(err)}))
        return
    end = time.perf_counter() + 60 * args.minutes
    found: dict[str, Any] = {"options": asdict(options), "machine": machine(options), "steps": {}}
    for step in STEPS:
        left = end - time.perf_counter()
        if left < 5:
            found["steps"][step.name] = {"skipped": "no time was left"}
        else:
            found["steps"][step.name] = answered(step, options, min(step.seconds, SHARE * left + 5))
        said = found["steps"][step.name]
        how = next((k for k in ("answer", "skipped", "failed") if k in said), "failed")
        print(f"{step.name:10} {how:8} {said.get('seconds', 0):6} s  "
              f"{'' if how == 'answer' else said[how]}", flush=True)  # fmt: skip
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
