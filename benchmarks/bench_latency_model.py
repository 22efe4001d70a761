"""How far the latency model is off on engines that it never saw.

    python benchmarks/bench_latency_model.py                      # both demo networks
    python benchmarks/bench_latency_model.py --models tf_efficientnet_lite0 --batches 1
    python benchmarks/bench_latency_model.py --quick              # demo-resnet, four engines

The model is fitted to the dense engine and five narrowed ones, as a build does. Then engines of
other widths, some without whole branches, are timed in turn with the dense one: what the model says
of each, over what was measured. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from bench_build import network_and_images

from cswap_deploy.config import load_config
from cswap_deploy.pruning.prepare import Prepared, prepare
from cswap_deploy.pruning.timing import Variant, latency_model, narrowed, variant
from cswap_deploy.runtime.profiling import TIMERS
from cswap_deploy.targets.aim import TargetAim


@dataclass(frozen=True)
class Result:
    """One network in one runtime at one batch."""

    model: str
    runtime: str
    batch: int
    threads: int
    engines: int
    dense_ms: float
    fastest_ms: float
    """Of the engines that the model never saw."""
    error_median: float
    """Of |predicted - measured| / measured, fractions."""
    error_worst: float


def unseen(network: Prepared, count: int, seed: int) -> list[Variant]:
    """Any aligned width of each group; in half of them some whole branches gone too."""
    rng = np.random.default_rng(seed)
    branches = [group.name for group in network.groups if group.kind == "branch"]
    found = []
    for at in range(count):
        removed = narrowed(network, rng)
        removed |= {name: [0] for name in branches if at % 2 and rng.random() < 0.25}
        found.append(variant(network, removed))
    return found


def run(name: str, runtime: str, batch: int, engines: int) -> Result:
    """Fit, then predict and measure."""
    loaded, calibration, _ = network_and_images(name, 0)
    config = load_config(
        model=name, target=(runtime,), batch=f"1:{batch}:{max(batch, 16)}", threads=1
    )
    images = calibration.images[:batch].contiguous().numpy()
    network = prepare(
        loaded.module, calibration.images, config.prune.model_copy(update={"ratio_of": "latency"})
    )
    aim = TargetAim(runtime, config, loaded.spec, images)
    model = latency_model(network, aim)
    timed = aim.timed([variant(network, {}), *unseen(network, engines, seed=1)])
    predicted = [model.ms(each.widths) for each in timed]
    dense = timed[0].ms / predicted[0]  # the machine may be quicker or slower than at the fit
    errors = [abs(p * dense / t.ms - 1) for p, t in zip(predicted[1:], timed[1:], strict=True)]
    return Result(
        name, runtime, batch, 1, engines, round(timed[0].ms, 3),
        round(min(t.ms for t in timed), 3), round(float(np.median(errors)), 4),
        round(max(errors), 4),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["demo-resnet", "demo-vit"], metavar="NAME")
    add("--runtimes", nargs="+", default=list(TIMERS), choices=list(TIMERS))
    add("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    add("--engines", type=int, default=20, metavar="N")
    add("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.models, args.batches, args.engines = ["demo-resnet"], [1], 4
    results = []
    for name in args.models:
        for each in (partial(run, name, r, b) for r in args.runtimes for b in args.batches):
            result = each(args.engines)
            results.append(result)
            print(
                f"{result.model:22} {result.runtime:12} batch {result.batch}: median "
                f"{result.error_median:.1%}, worst {result.error_worst:.1%} of "
                f"{result.engines} engines ({result.fastest_ms:g} to {result.dense_ms:g} ms)",
                flush=True,
            )
    print(json.dumps({"results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
