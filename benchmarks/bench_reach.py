"""Whether a speed-up that is asked for is had: random small networks, random speed-ups.

    python benchmarks/bench_reach.py                    # 20 networks
    python benchmarks/bench_reach.py --networks 3 7     # two of them
    python benchmarks/bench_reach.py --quick            # 2

Each network is pruned to a random speed-up on ONNX Runtime, or refused with the range. What comes
out is exported afresh and timed in one loop with the dense one, three times: the median is within
3 % of what was asked, or it counts as missed. Weights are random: this is about time alone. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cswap_deploy.config import load_config
from cswap_deploy.data import Calibration
from cswap_deploy.errors import PruneError
from cswap_deploy.models.load import wrap_module
from cswap_deploy.progress import Silent
from cswap_deploy.pruning.prune import prune
from cswap_deploy.targets.aim import TargetAim

SIZE, CLASSES, IMAGES = 32, 10, 96
NEAR = 0.03


@dataclass(frozen=True)
class Result:
    """One network."""

    seed: int
    blocks: int
    params: int
    asked: float
    measured: float | None
    """Dense over pruned, median of three timings; ``None`` where it was refused."""
    refused: str
    branches: int
    seconds: float


class Block(nn.Module):
    """Two convolutions beside a shortcut; depthwise in the middle in some networks."""

    def __init__(self, width: int, hidden: int, *, depthwise: bool) -> None:
        super().__init__()
        groups = hidden if depthwise else 1
        self.conv1 = nn.Conv2d(width, hidden, 1 if depthwise else 3, padding=int(not depthwise))
        self.middle = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.norm(self.middle(torch.relu(self.conv1(x))))))


def network(seed: int) -> nn.Module:
    """A stem, one to three stages of random blocks, and a classifier."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    width = int(rng.choice([16, 24, 32]))
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for stage in range(int(rng.integers(1, 4))):
        if stage:
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()]
            width *= 2
        for _ in range(int(rng.integers(1, 4))):
            hidden = int(rng.choice([1, 2, 3]) * width)
            layers.append(Block(width, hidden, depthwise=bool(rng.integers(2))))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*layers).eval()


def run(seed: int) -> Result:
    """Prune and time one."""
    rng = np.random.default_rng(1000 + seed)
    asked = round(float(rng.uniform(1.1, 2.5)), 2)
    module = network(seed)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = module(images).argmax(1)
    config = load_config(
        model="random", speedup=asked, threads=1, seed=seed, input_size=(3, SIZE, SIZE),
        mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    spec = wrap_module(module, config.model).spec
    blocks = sum(isinstance(m, Block) for m in module.modules())
    params = sum(p.numel() for p in module.parameters())
    begun = time.perf_counter()
    batch = images[:1].numpy()
    try:
        pruned = prune(
            module, Calibration(images, labels), config=config.prune, seed=seed,
            device=TargetAim("onnxruntime", config, spec, batch), progress=Silent(),
        )  # fmt: skip
    except PruneError as err:
        words, seconds = str(err).splitlines()[0], round(time.perf_counter() - begun, 1)
        return Result(seed, blocks, params, asked, None, words, 0, seconds)
    seconds = round(time.perf_counter() - begun, 1)
    fresh = TargetAim("onnxruntime", config, spec, batch)
    fresh.start(module)
    measured = 1 / statistics.median(fresh.fraction(pruned.module) for _ in range(3))
    gone = sum(g.kind == "branch" and not g.kept for g in pruned.plan.groups)
    return Result(seed, blocks, params, asked, round(measured, 3), "", gone, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", type=int, nargs="+", metavar="N", help="only these")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    results = []
    for seed in range(2) if args.quick else args.networks or range(20):
        r = run(seed)
        results.append(r)
        told = f"refused: {r.refused}" if r.measured is None else f"{r.measured:.2f}x"
        print(
            f"seed {r.seed:2} {r.blocks} blocks, {r.params:7,} parameters: asked {r.asked:.2f}x, "
            f"{told}, {r.branches} branches, {r.seconds:.0f} s",
            flush=True,
        )
    had = [r for r in results if r.measured is not None]
    short = [r.seed for r in had if r.measured < r.asked * (1 - NEAR)]
    over = [r.seed for r in had if r.measured > r.asked * (1 + NEAR)]
    slower = [r.seed for r in had if r.measured < 1]
    print(
        f"{len(had)} of {len(results)} reached: {len(short)} short by over {NEAR:.0%} {short}, "
        f"{len(over)} faster by more {over}, {len(slower)} slower than dense; "
        f"{len(results) - len(had)} refused"
    )
    print(json.dumps({"results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
