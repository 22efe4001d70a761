"""Speed against agreement: what pruning to a speed-up, to MACs and to parameters gives.

    python benchmarks/bench_speed.py                              # both demo networks
    python benchmarks/bench_speed.py --models resnet56 --speedups 1.3 1.6 --seeds 2
    python benchmarks/bench_speed.py --peer 0.4 0.55 --speedups   # no speed-ups, a peer twice
    python benchmarks/bench_speed.py --quick                      # demo-vit, one speed-up

What Torch-Pruning's magnitude ranks, plainly and in one step to a part of the MACs, gets this
package's means and refit (``--peer``). Dense and pruned engines are timed in one loop
(``--runtime``, on the CPU), after the pruned module's parameters were counted and its graph
exported. Agreement and top-1 are on test images that it never saw. Real networks and images are
read from the folder that ``CSWAP_DATA`` names. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import peers
from bench_build import network_and_images, what_is_kept
from torch import nn

from cswap_deploy.config import PruneConfig, load_config
from cswap_deploy.data import Calibration
from cswap_deploy.errors import PruneError
from cswap_deploy.network.deletion import delete_removed
from cswap_deploy.progress import Silent
from cswap_deploy.pruning.importance import Importance, View
from cswap_deploy.pruning.job import Job
from cswap_deploy.pruning.prepare import prepare
from cswap_deploy.pruning.prune import prune
from cswap_deploy.pruning.rounds import remove_in_rounds
from cswap_deploy.pruning.state import State
from cswap_deploy.runtime.profiling import TIMERS
from cswap_deploy.targets.aim import TargetAim

RATIOS = {"params 0.4": {"ratio": 0.4}, "macs 0.4": {"ratio": 0.4, "ratio_of": "macs"}}
SPEEDUPS = (1.3, 1.6, 2.0)


@dataclass(frozen=True)
class Result:
    """One pruning."""

    model: str
    aim: str
    runtime: str
    seed: int
    batch: int
    threads: int
    speedup: float
    """Median call of the dense engine over that of the pruned one."""
    top1_dense: float
    top1: float
    agreement: float
    kl: float
    """Mean divergence from the dense network on the test images, nats."""
    params_removed: float
    macs_removed: float
    branches: int
    """Residual branches that are gone."""
    seconds: float


@dataclass(frozen=True)
class Made:
    """A pruned network, for real."""

    module: nn.Module
    params_removed: float
    """A fraction."""
    macs_removed: float
    branches: int = 0


Way = Callable[[nn.Module, Calibration, int, TargetAim], Made]
"""Prunes a network on images, with a seed, for a device."""


def ways(speedups: list[float], peer: list[float]) -> dict[str, Way]:
    """What is asked -> how: as today, speed-ups with and without whole branches, and a peer."""
    found: dict[str, Way] = {name: partial(by_cswap, asked) for name, asked in RATIOS.items()}
    for speedup in speedups:
        found[f"{speedup:g}x"] = partial(by_cswap, {"speedup": speedup})
        narrow = {"speedup": speedup, "branches": False}
        found[f"{speedup:g}x, no branches"] = partial(by_cswap, narrow)
    return found | {
        f"magnitude, macs {ratio:g}": partial(by_torch_pruning, ratio) for ratio in peer
    }


def by_cswap(
    settings: Mapping[str, Any], module: nn.Module, calibration: Calibration, seed: int,
    device: TargetAim,
) -> Made:  # fmt: skip
    """As the command does."""
    pruned = prune(
        module, calibration, config=PruneConfig(**settings), seed=seed, device=device,
        progress=Silent(),
    )  # fmt: skip
    plan = pruned.plan
    assert sum(p.numel() for p in pruned.module.parameters()) == plan.pruned.params
    branches = sum(g.kind == "branch" and not g.kept for g in plan.groups)
    return Made(pruned.module, plan.effective("params"), plan.effective("macs"), branches)


def by_torch_pruning(
    ratio: float, module: nn.Module, calibration: Calibration, seed: int, _: TargetAim
) -> Made:
    """A part of the MACs is removed as Torch-Pruning's group magnitude ranks, and refitted."""
    config = PruneConfig(
        ratio=ratio, ratio_of="macs", intervention="mean", branches=False, rounds=1
    )
    network = prepare(module, calibration.images, config)
    view = View(network.graph, network.groups, calibration, np.random.default_rng(seed))
    values = peers.plainly(peers.magnitude_l2(view), network, "macs")
    state = State()
    remove_in_rounds(Job(network, calibration, config, Importance(lambda _: values), seed), state)
    smaller = delete_removed(network.module, state.removed, network.groups, network.example)
    dense, left = network.dense_size, network.sizes.size()
    return Made(smaller, 1 - left.params / dense.params, 1 - left.macs / dense.macs)


def run(name: str, aim: str, way: Way, *, runtime: str, seed: int, batch: int) -> Result:
    """Prune, count, time, and compare predictions."""
    loaded, calibration, test = network_and_images(name, seed)
    images = calibration.images[:batch].contiguous().numpy()
    config = load_config(
        model=name, target=(runtime,), batch=f"1:{batch}:{max(batch, 16)}", threads=1
    )
    device = TargetAim(runtime, config, loaded.spec, images)
    begun = time.perf_counter()
    made = way(loaded.module, calibration, seed, device)
    seconds = time.perf_counter() - begun
    fresh = TargetAim(runtime, config, loaded.spec, images)
    fresh.start(loaded.module)
    speedup = 1 / fresh.fraction(made.module)
    return Result(
        model=name, aim=aim, runtime=runtime, seed=seed, batch=batch, threads=1,
        speedup=round(speedup, 3),
        **what_is_kept(loaded.module, made.module, test),
        params_removed=round(made.params_removed, 4), macs_removed=round(made.macs_removed, 4),
        branches=made.branches,
        seconds=round(seconds, 1),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["demo-resnet", "demo-vit"], metavar="NAME")
    add("--speedups", nargs="*", type=float, default=list(SPEEDUPS), metavar="X")
    add("--peer", nargs="*", type=float, default=[0.4], metavar="R", help="parts of the MACs")
    add("--seeds", type=int, default=1, metavar="N", help="calibration sets")
    add("--batch", type=int, default=1)
    add("--runtime", default="onnxruntime", choices=list(TIMERS))
    add("--quick", action="store_true")
    args = parser.parse_args()
    wanted = ways(args.speedups, args.peer)
    if args.quick:
        args.models, wanted = ["demo-vit"], {"1.3x": partial(by_cswap, {"speedup": 1.3})}
    results = []
    for name in args.models:
        for seed in range(args.seeds):
            for aim, way in wanted.items():
                try:
                    r = run(name, aim, way, runtime=args.runtime, seed=seed, batch=args.batch)
                except PruneError as err:
                    print(f"{name:22} {aim:18} seed {seed}: refused: {err}", flush=True)
                    continue
                results.append(r)
                print(
                    f"{r.model:22} {r.aim:18} seed {r.seed}: {r.speedup:.2f}x, top-1 "
                    f"{r.top1_dense:.2%} -> {r.top1:.2%}, agreement {r.agreement:.2%}, KL "
                    f"{r.kl:.4f}, params -{r.params_removed:.0%}, MACs -{r.macs_removed:.0%}, "
                    f"{r.branches} branches, {r.seconds:.0f} s",
                    flush=True,
                )
    print(json.dumps({"results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
