"""What a whole build costs and gives on the embedded networks, against two baselines.

    python benchmarks/bench_build.py             # both demo networks, three seeds of images
    python benchmarks/bench_build.py --quick     # demo-resnet, one seed

Every build is verified before its figures count: the bundle's digests, the parity of its graph, and
the ratio. The baselines (magnitude, random) get the same refit, so that only the ranking differs.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import cswap_deploy
from cswap_deploy.records.bundle import verify_bundle


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("demo-resnet", "demo-vit")
    criteria: tuple[str, ...] = ("cswap", "magnitude", "random")
    ratios: tuple[float, ...] = (0.4, 0.6)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Result:
    model: str
    criterion: str
    ratio: float
    ratio_effective: float
    seed: int
    top1_dense: float
    top1_pruned: float
    p50_speedup: float
    """Dense over pruned, interleaved in one loop."""
    first_seconds: float
    again_seconds: float
    """The same build again, all stages reused."""


def measure(model: str, criterion: str, ratio: float, seed: int, folder: Path) -> Result:
    settings = {
        "ratio": ratio,
        "criterion": criterion,
        "seed": seed,
        "store": folder / "store",
        "output": folder / f"{model}-{criterion}-{ratio}-{seed}",
    }
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        bundle = cswap_deploy.build(model, **settings)
        seconds.append(time.perf_counter() - begun)
    assert set(bundle.stages.values()) == {"reused"}, bundle.stages
    manifest = verify_bundle(bundle.path).manifest
    result = manifest.targets[0]
    assert result.parity is not None
    assert result.parity.ok
    assert result.accuracy is not None
    assert result.speedup is not None
    assert abs(manifest.ratio_effective["params"] - ratio) < 0.02
    return Result(
        model=model,
        criterion=criterion,
        ratio=ratio,
        ratio_effective=round(manifest.ratio_effective["params"], 4),
        seed=seed,
        top1_dense=result.accuracy.dense.top1,
        top1_pruned=result.accuracy.pruned.top1,
        p50_speedup=round(result.speedup, 3),
        first_seconds=round(seconds[0], 1),
        again_seconds=round(seconds[1], 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    config = Config(models=("demo-resnet",), seeds=(0,)) if args.quick else Config()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for model in config.models:
            for ratio in config.ratios:
                for seed in config.seeds:
                    for criterion in config.criteria:  # interleaved: one build of each in turn
                        r = measure(model, criterion, ratio, seed, Path(folder))
                        results.append(r)
                        print(
                            f"{r.model:12} {r.criterion:10} seed {r.seed} removed "
                            f"{r.ratio_effective:.1%} top-1 {r.top1_dense:.2%} -> "
                            f"{r.top1_pruned:.2%} speed {r.p50_speedup:.2f}x build "
                            f"{r.first_seconds:.0f} s, again {r.again_seconds:.1f} s",
                            flush=True,
                        )
    print(json.dumps({"cores": os.cpu_count(), "results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
