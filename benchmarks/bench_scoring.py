"""How fast effects are measured: exact, in bfloat16 and adaptively, against the naive loop.

    python benchmarks/bench_scoring.py            # all networks, about half an hour on two cores
    python benchmarks/bench_scoring.py --quick    # ResNet-56 only, under five minutes

The naive loop is what a first script does: a forward hook sets one channel to zero, the whole
network runs, once a unit. It runs on a sample of the units (its time per unit does not depend on
the unit) and is extrapolated, in a process of its own with PyTorch's defaults (NCHW, the system's
allocator settings); the column after it has the same loop with this package's layout and allocator
settings. All take turns on the same parts of the images; before that the exact effects are checked
against the naive ones. ``operations saved`` counts multiply-accumulates; ``GFLOP/s`` is what the
exact measuring reaches, beside a large matrix product timed in between. Of ImageNet networks only
some units are measured, the table says how many; ResNet-50 has random weights, and only times are
taken. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import peers
import psutil
import torch
from accuracy_models import MODELS, Model, data_of, load
from torch import Tensor, nn

from cswap_deploy.causal import memory
from cswap_deploy.causal.adaptive import StoppingRule, as_estimates, measure_adaptively
from cswap_deploy.causal.effects import Effects, join, kl_divergence
from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.fisher import DIRECTIONS, FisherEstimate, estimate_effects
from cswap_deploy.causal.interventions import Moments, input_moments
from cswap_deploy.causal.measurement import LocalMeasurement
from cswap_deploy.causal.mixtures import half_mixed
from cswap_deploy.config import ModelConfig, PruneConfig
from cswap_deploy.data import load_samples
from cswap_deploy.data.sampling import balanced_order
from cswap_deploy.errors import CswapError
from cswap_deploy.measure.device import describe_device
from cswap_deploy.models.load import load_model
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.units import Group, consumers
from cswap_deploy.progress import Silent
from cswap_deploy.pruning.prepare import Prepared, prepare
from cswap_deploy.runtime.preprocess import normalise

PART = 64
"""Images of one turn."""
RATIO = 0.4
MATRIX = 2048
GROWTH_BUDGET = 256 << 20


@dataclass(frozen=True)
class Case:
    """A network, and how much of the work is done."""

    name: str
    images: int = 256
    unit_step: int = 1
    """Every so many units are measured; 1: all, so that decisions can be compared."""
    naive_units: int = 48
    """Units of the naive loop, spread over the network."""


CASES = (
    Case("resnet56"),
    Case("demo-vit"),
    Case("tf_efficientnet_lite0", images=64, unit_step=48, naive_units=16),
    Case("resnet50", images=32, unit_step=256, naive_units=12),
)


@dataclass
class Result:
    """Seconds are of all units on all images, extrapolated where units were sampled."""

    model: str
    images: int
    units: int
    sampled: float
    """Part of the units that was measured."""
    largest_difference: float
    """Of the KL effects to the naive loop's, relative to the largest of them; checked first."""
    naive_s: float = 0.0
    naive_tuned_s: float = 0.0
    """With channels-last images and freed memory kept, as the others have it."""
    exact_s: float = 0.0
    bf16_s: float = 0.0
    """With the measuring again in float32 of what bfloat16 leaves open, where all were measured."""
    adaptive_s: float | None = None
    taylor_s: float = 0.0
    operations_saved: float = 0.0
    """Multiply-accumulates of the naive loop over those of the exact one."""
    exact_gflops: float = 0.0
    matrix_gflops: float = 0.0
    """Of a large float32 product, the best of those in between."""
    matrix_bf16_gflops: float = 0.0
    same_units_adaptive: float | None = None
    """Of the units that go at 40 %, alike with exact measuring."""
    same_units_bf16: float | None = None
    measured_fraction: float | None = None
    """Masked forwards of the adaptive measuring over those of the exact one."""
    peak_rss_mib: float = 0.0
    growth: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Images -> (seconds, peak resident memory above the start in MiB) of the same units, within
    a budget of 256 MiB."""


def run(case: Case, tell: Callable[[str], None]) -> Result:
    """Verify, then time everything in turn."""
    model, prepared, images, labels = _network(case)
    graph, groups = prepared.graph, prepared.groups
    moments = input_moments(graph, consumers(groups), images, intervention="predicted", chunk=PART)
    wanted = {g: list(range(0, g.units, case.unit_step)) for g in groups}
    wanted = {g: units for g, units in wanted.items() if units}
    total = sum(g.units for g in groups)
    taken = sum(map(len, wanted.values()))
    result = Result(
        case.name, len(images), total, taken / total, _verify(prepared, images[:8], labels[:8])
    )
    tell(f"{case.name}: {total:,} units, {taken:,} measured, {len(images)} images; verified")
    naive = _naive_units(groups, case.naive_units)
    seconds: dict[str, list[float]] = {name: [] for name in ("naive", "tuned", "exact", "bf16")}
    plain = _PlainNaive(case)
    matrix = {torch.float32: 0.0, torch.bfloat16: 0.0}
    effects: dict[bool, list[list[Effects]]] = {False: [], True: []}
    for turn, (part, truth) in enumerate(
        zip(torch.split(images, PART), torch.split(labels, PART), strict=True)
    ):
        for dtype, best in matrix.items():
            matrix[dtype] = max(best, _matrix_gflops(dtype))
        seconds["naive"].append(plain.turn(turn) / len(naive) * total)
        seconds["tuned"].append(
            _timed(lambda p=part: _naive(prepared.dense.module, naive, p)) / len(naive) * total
        )
        measurement = LocalMeasurement(Experiment(graph, part, truth, moments))
        for bfloat16 in (False, True):

            def one(of: LocalMeasurement = measurement, bfloat16: bool = bfloat16) -> None:
                effects[bfloat16].append(of.effects(wanted, bfloat16=bfloat16))

            # What lies before the cuts runs once for all units, however many they are.
            prefix = _timed(lambda part=part: _forward(graph, part))
            behind = max(_timed(one) - prefix, 0.0)
            seconds["bf16" if bfloat16 else "exact"].append(behind / taken * total + prefix)
        tell(
            f"  {min(len(images), PART * (turn + 1))} images: naive "
            f"{sum(seconds['naive']):.0f} s (tuned {sum(seconds['tuned']):.0f} s), exact "
            f"{sum(seconds['exact']):.0f} s, bf16 {sum(seconds['bf16']):.0f} s"
        )
    plain.close()
    result.naive_s, result.naive_tuned_s, result.exact_s, result.bf16_s = (
        sum(seconds[name]) for name in ("naive", "tuned", "exact", "bf16")
    )
    whole, saved = _operations(prepared, len(images))
    result.operations_saved = whole / saved
    result.exact_gflops = 2 * saved / result.exact_s / 1e9
    result.matrix_gflops = matrix[torch.float32]
    result.matrix_bf16_gflops = matrix[torch.bfloat16]
    result.taylor_s = _timed(
        lambda: peers.taylor(prepared, images, labels, np.random.default_rng(0))
    )
    if case.unit_step == 1:
        _decisions(prepared, model, moments, images, labels, effects, result)
        tell(
            f"  adaptive {result.adaptive_s:.1f} s, {result.measured_fraction:.1%} of the forwards,"
            f" {result.same_units_adaptive:.1%} of the units that go alike"
        )
    result.peak_rss_mib = _peak_mib()
    return result


def _network(case: Case) -> tuple[Model, Prepared, Tensor, Tensor]:
    """The network ready to be pruned, and its calibration images as the loop sees them."""
    if case.name == "resnet50":  # random weights: nothing but time is measured on them
        model = Model("resnet50", "params", "auto", (RATIO,))
        loaded = load_model(ModelConfig(model="resnet50", pretrained=False))
        torch.manual_seed(0)
        images = torch.randn(case.images, *loaded.spec.preprocessing.input_size)
        labels = torch.arange(case.images)
    else:
        model = MODELS[case.name]
        loaded = load(model)
        data = data_of(model, max(case.images, model.calibration))
        samples = load_samples(data, model=loaded.spec, seed=0, progress=Silent())
        drawn = samples.calibration
        images = torch.from_numpy(normalise(drawn.images, loaded.spec.preprocessing))
        labels = torch.from_numpy(drawn.labels)
        order = torch.from_numpy(balanced_order(drawn.labels))[: case.images]
        images, labels = images[order], labels[order]
        images = half_mixed(images, seed=1)
        # as in the loop: classes and mixtures are spread over the parts
        shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[shuffled], labels[shuffled]
    images = images.contiguous(memory_format=torch.channels_last)
    prepared = prepare(
        loaded.module,
        images,
        PruneConfig(ratio=RATIO, ratio_of=model.ratio_of, round_to=model.round_to),
    )
    return model, prepared, images, labels


def _naive(module: nn.Module, units: list[tuple[Group, int]], images: Tensor) -> Tensor:
    """(units, N, classes) logits, one whole forward a unit, its channels zero where it is read."""
    found = []
    with torch.inference_mode():
        for group, unit in units:
            hooks = []
            for consumer in group.consumers:
                layer = module.get_submodule(consumer.layer)
                hooks.append(layer.register_forward_pre_hook(_zero(layer, consumer.indices[unit])))
            found.append(module(images))
            for hook in hooks:
                hook.remove()
    return torch.stack(found)


class _PlainNaive:
    """The naive loop in a process of its own, a part of the images at a time."""

    def __init__(self, case: Case) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--plain-naive", case.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.turn(0)  # wait until it is ready, and warm

    def turn(self, part: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{part}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _plain_naive(name: str) -> None:
    """Answers each number of a part with the seconds that the loop took on it."""
    case = next(c for c in CASES if c.name == name)
    _, prepared, images, _ = _network(case)
    parts = torch.split(images.contiguous(), PART)
    units = _naive_units(prepared.groups, case.naive_units)
    for line in sys.stdin:
        part = parts[int(line)]
        print(_timed(lambda part=part: _naive(prepared.dense.module, units, part)), flush=True)


def _zero(layer: nn.Module, channels: tuple[int, ...]) -> Callable[..., tuple[Tensor]]:
    index = torch.tensor(channels)
    dim = 1 if isinstance(layer, nn.Conv2d) else -1

    def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].index_fill(dim, index, 0.0),)

    return hook


def _forward(graph: Graph, images: Tensor) -> None:
    with torch.inference_mode():
        graph.run(images)


def _naive_units(groups: tuple[Group, ...], count: int) -> list[tuple[Group, int]]:
    units = [(g, u) for g in groups for u in range(g.units)]
    return units[:: max(1, len(units) // count)][:count]


def _verify(prepared: Prepared, images: Tensor, labels: Tensor) -> float:
    """The largest difference of exact to naive KL effects, over the largest effect.

    Raises:
        AssertionError: It is above what float32 explains.
    """
    units = _naive_units(prepared.groups, 24)
    logits = _naive(prepared.dense.module, units, images).double()
    with torch.inference_mode():
        base = prepared.dense.module(images).double()
    slow = kl_divergence(logits, base).numpy()
    measurement = LocalMeasurement(Experiment(prepared.graph, images, labels))
    fast = np.concatenate([measurement.effects({g: [u]})[0].kl for g, u in units])
    difference = float(np.abs(slow - fast).max() / slow.max())
    assert difference < 1e-3, f"exact effects are not the naive loop's: {difference}"
    return difference


def _operations(prepared: Prepared, images: int) -> tuple[int, int]:
    """Multiply-accumulates of the naive loop, and of the exact one."""
    graph = prepared.graph
    whole = graph.macs(graph.nodes)
    naive = exact = 0
    for group in prepared.groups:
        naive += group.units * whole
        suffix = graph.suffix(n for c in group.consumers for n in graph.readers(c.layer))
        behind = graph.macs(suffix.nodes)
        for consumer in group.consumers:
            layer = prepared.module.get_submodule(consumer.layer)
            for node in graph.readers(consumer.layer):
                if node.args[0] in suffix.cached or node.args[0] not in suffix.nodes:
                    # the cut: each variant computes its own unit's part, not the layer
                    inputs = layer.weight.shape[1] * getattr(layer, "groups", 1)
                    own = graph.macs([node]) * len(consumer.indices[0]) / inputs
                    behind -= round(graph.macs([node]) - own)
        exact += group.units * behind
    return naive * images, (exact + whole) * images


def _decisions(
    prepared: Prepared,
    model: Model,
    moments: Mapping[str, Moments],
    images: Tensor,
    labels: Tensor,
    effects: dict[bool, list[list[Effects]]],
    result: Result,
) -> None:
    """Time the adaptive measuring, and compare what would go at 40 % of the units."""
    groups = prepared.groups
    savings = np.concatenate(
        [np.full(g.units, prepared.sizes.saving(g.name, [0], model.ratio_of)) for g in groups]
    )
    count = round(RATIO * len(savings))

    def goes(costs: np.ndarray) -> set[int]:
        return set(np.argsort(costs / savings, kind="stable")[:count].tolist())

    def thresholds(costs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        together = np.sort(np.concatenate([costs[g.name] for g in groups]) / savings)
        limit = together[count - 1 : count + 1].mean()
        return {
            g.name: np.array([limit * prepared.sizes.saving(g.name, [0], model.ratio_of)])
            for g in groups
        }

    wanted = {g: list(range(g.units)) for g in groups}

    experiment = Experiment(prepared.graph, images, labels, moments)
    rule = StoppingRule(thresholds, error_rate=0.05)

    def decide(estimates: list[FisherEstimate] | None) -> tuple[float, float, set[int]]:
        begun = time.perf_counter()
        if estimates is None:
            estimates = estimate_effects(experiment, wanted)
        measurement = LocalMeasurement(experiment)
        found, spent = measure_adaptively(measurement, wanted, estimates, effect="kl", rule=rule)
        seconds = time.perf_counter() - begun
        left = goes(np.concatenate([e.kl.mean(1) for e in found]))
        return seconds, spent.forwards / spent.exact, left

    whole = {b: [join(parts) for parts in zip(*e, strict=True)] for b, e in effects.items()}
    exact = goes(np.concatenate([e.kl.mean(1) for e in whole[False]]))
    seconds, _, left = decide(as_estimates(whole[True]))
    result.bf16_s += seconds
    result.same_units_bf16 = len(exact & left) / count
    runs = [decide(None) for _ in range(3)]
    result.adaptive_s = float(np.median([seconds for seconds, *_ in runs]))
    result.measured_fraction = runs[0][1]
    result.same_units_adaptive = len(exact & runs[0][2]) / count


def growth(tell: Callable[[str], None]) -> dict[str, tuple[float, float]]:
    """1, 4 and 16 times the images, the same units, within a budget, each in a fresh process."""
    found = {}
    for count in (128, 512, 2048):
        told = subprocess.run(
            [sys.executable, __file__, "--growth", str(count)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        seconds, mib = json.loads(told.stdout)
        found[str(count)] = (seconds, mib)
        tell(f"  {count} images: {seconds:.1f} s, {mib:.0f} MiB beside network and images")
    return found


def _grow(count: int) -> tuple[float, float]:
    """Seconds, and the highest resident memory above that before measuring, in MiB."""
    _, prepared, images, labels = _network(Case("resnet56", images=64))
    moments = input_moments(
        prepared.graph, consumers(prepared.groups), images, intervention="predicted", chunk=PART
    )
    times = count // len(images)
    images = images.repeat(times, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    labels = labels.repeat(times)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = psutil.Process().memory_info().rss / 2**20
    budget = memory.Budget.of(GROWTH_BUDGET)
    measurement = LocalMeasurement(Experiment(prepared.graph, images, labels, moments, budget))
    seconds = _timed(lambda: measurement.effects({g: [0, 1] for g in prepared.groups}))
    return round(seconds, 2), round(_peak_mib() - before, 1)


def _peak_mib() -> float:
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def _matrix_gflops(dtype: torch.dtype) -> float:
    a = torch.randn(MATRIX, MATRIX).to(dtype)
    return max(2 * MATRIX**3 / _timed(lambda: a @ a) / 1e9 for _ in range(4))


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _row(r: Result) -> str:
    def over(seconds: float | None) -> str:
        return "-" if not seconds else f"{r.naive_s / seconds:.1f}x"

    def part(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    return (
        f"| {r.model} | {r.units:,} ({r.sampled:.0%}) | {r.images} | {r.naive_s:,.0f} s | "
        f"{r.naive_tuned_s:,.0f} s | {r.exact_s:,.0f} s, {over(r.exact_s)} | {over(r.bf16_s)} | "
        f"{over(r.adaptive_s)} | "
        f"{r.operations_saved:.2f}x | {r.exact_gflops:.0f} of {r.matrix_gflops:.0f} | "
        f"{part(r.same_units_bf16)}, {part(r.same_units_adaptive)} | {r.taylor_s:.1f} s |"
    )


HEAD = (
    "| model | units (measured) | images | naive | naive, tuned | exact | bf16 | adaptive "
    "| operations saved | GFLOP/s, of a matrix product | same units: bf16, adaptive | Taylor |\n"
    + "| --- " * 12
    + "|"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="ResNet-56 only")
    parser.add_argument("--models", nargs="+", choices=[c.name for c in CASES], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results here too")
    parser.add_argument("--growth", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--plain-naive", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain_naive:
        _plain_naive(args.plain_naive)
        return 0
    if args.growth:
        print(json.dumps(_grow(args.growth)))
        return 0
    names = ["resnet56"] if args.quick else args.models or [c.name for c in CASES]
    settled = memory.keep_freed_memory()

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        results = [run(case, tell) for case in CASES if case.name in names]
    except CswapError as err:
        print(f"nothing was measured: {err}\n  fix: {err.fix}")
        return 0 if args.quick else err.exit_code
    if "resnet56" in names:
        results[0].growth = growth(tell)
    print(HEAD)
    for result in results:
        print(_row(result))
    device = describe_device()
    kept = {
        "results": [asdict(r) for r in results],
        "device": device.model_dump(mode="json"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "directions": DIRECTIONS,
        "freed_memory_kept": settled,
        "date": time.strftime("%Y-%m-%d"),
    }
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    first = results[0]
    last = {
        "exact_speedup": round(first.naive_s / first.exact_s, 2),
        "bf16_speedup": round(first.naive_s / first.bf16_s, 2),
        "adaptive_speedup": None
        if first.adaptive_s is None
        else round(first.naive_s / first.adaptive_s, 1),
        "same_units_fraction": first.same_units_adaptive,
        "peak_rss_mib": round(max(r.peak_rss_mib for r in results)),
    }
    print(json.dumps(last))
    return 0


if __name__ == "__main__":
    sys.exit(main())
