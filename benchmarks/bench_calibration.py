"""How many calibration images are enough, and does the choice depend on which ones they are?

    python benchmarks/bench_calibration.py [--model demo-resnet] [--sizes 64 128 256 512 1024 2000]

Prunes one network to 40 % with growing calibration sets, each a prefix of the same balanced order,
and once more with a second set that shares no image with the first. Prints top-1 on the same
unseen test images and the overlap of the removed units; ``--plot`` draws what was measured. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from accuracy_models import MODELS, ROOT, data_of, load
from bench_accuracy import RESULTS, logits
from torch import Tensor

from cswap_deploy.causal.effects import kl_divergence
from cswap_deploy.cli.output import Console
from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration, load_samples
from cswap_deploy.data.sampling import balanced_order
from cswap_deploy.progress import Phases, Silent
from cswap_deploy.pruning.importance import importance_of
from cswap_deploy.pruning.job import Job
from cswap_deploy.pruning.prepare import prepare
from cswap_deploy.pruning.rounds import remove_in_rounds
from cswap_deploy.pruning.state import State
from cswap_deploy.runtime.preprocess import normalise

FIGURE = ROOT / ".github" / "calibration.svg"


@dataclass(frozen=True)
class Config:
    model: str = "demo-resnet"
    ratio: float = 0.4
    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024, 2000)
    overlap: int = 512
    """Images in each of the two disjoint sets."""


@dataclass(frozen=True)
class Row:
    images: int
    top1: float
    agreement: float
    kl: float
    """Mean divergence from the dense network on the test images, nats."""


@dataclass(frozen=True)
class Result:
    model: str
    ratio: float
    ratio_of: str
    top1_dense: float
    rows: tuple[Row, ...]
    overlap_images: int
    overlap: float | None
    """Part of the units removed with one calibration set that the other removes too."""
    torch: str


def main() -> None:
    config, plot = _arguments()
    path = RESULTS.parent / "calibration" / f"{config.model}.json"
    if plot:
        draw(json.loads(path.read_text()))
        return
    with Console(as_json=False, quiet=False).progress() as progress:
        result = measure(config, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=1) + "\n")
    print(json.dumps(asdict(result)))


def measure(config: Config, watcher: Phases) -> Result:
    model = MODELS[config.model]
    loaded = load(model)
    wanted = max(*config.sizes, 2 * config.overlap)
    steps = loaded.spec.preprocessing
    samples = load_samples(data_of(model, wanted), model=loaded.spec, seed=0, progress=Silent())
    images, labels = (
        torch.from_numpy(normalise(samples.calibration.images, steps)),
        torch.from_numpy(samples.calibration.labels),
    )
    tests = torch.from_numpy(normalise(samples.validation.images, steps))
    truth = torch.from_numpy(samples.validation.labels)
    order = torch.from_numpy(balanced_order(labels.numpy()))
    dense = logits(loaded.module, tests)
    asked = PruneConfig(ratio=config.ratio, ratio_of=model.ratio_of, round_to=model.round_to)
    prepared = prepare(loaded.module, images, asked)

    def pruned(rows: Tensor) -> tuple[Row, State]:
        network, state, drawn = prepared.copy(), State(), Calibration(images[rows], labels[rows])
        importance = importance_of(asked.criterion)
        remove_in_rounds(Job(network, drawn, asked, importance, progress=watcher), state)
        found = logits(network.module, tests)
        row = Row(
            images=len(rows),
            top1=float((found.argmax(1) == truth).float().mean()),
            agreement=float((found.argmax(1) == dense.argmax(1)).float().mean()),
            kl=float(kl_divergence(found.double()[None], dense.double()).mean()),
        )
        print(json.dumps(asdict(row)), flush=True)
        return row, state

    half = config.overlap
    _, first = pruned(order[:half])
    _, second = pruned(order[half : 2 * half])
    shared, total = _overlap(first, second)
    print(json.dumps({"removed": total, "removed_by_both": shared}), flush=True)
    rows = tuple(pruned(order[:n])[0] for n in config.sizes if n <= len(order))
    return Result(
        model=config.model,
        ratio=config.ratio,
        ratio_of=model.ratio_of,
        top1_dense=float((dense.argmax(1) == truth).float().mean()),
        rows=rows,
        overlap_images=half,
        overlap=shared / total if total else None,
        torch=torch.__version__,
    )


def draw(result: dict) -> None:  # type: ignore[type-arg]
    """Divergence from the dense network against the number of calibration images.

    Top-1 is in the results: 2,000 test images do not tell its differences from chance.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "calibration", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.subplots()
        sizes = [row["images"] for row in result["rows"]]
        axes.plot(sizes, [row["kl"] for row in result["rows"]], "o-", color="#c2571a")
        axes.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set_xlabel("calibration images")
        axes.set_ylabel("KL to the dense network, nats")
        axes.set_title(
            f"{result['model']}, {result['ratio']:.0%} of {result['ratio_of']} removed", fontsize=9,
            loc="left",
        )  # fmt: skip
        axes.grid(color="#dfe4e8")
        axes.spines[["top", "right"]].set_visible(False)
        FIGURE.parent.mkdir(exist_ok=True)
        figure.savefig(FIGURE, metadata={"Date": None})


def _overlap(first: State, second: State) -> tuple[int, int]:
    both = sum(
        len(np.intersect1d(units, second.removed.get(name, ())))
        for name, units in first.removed.items()
    )
    return both, sum(map(len, first.removed.values()))


def _arguments() -> tuple[Config, bool]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Config()
    parser.add_argument("--model", choices=MODELS, default=default.model)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(default.sizes))
    parser.add_argument("--overlap", type=int, default=default.overlap)
    parser.add_argument("--plot", action="store_true", help="only draw what was measured")
    args = parser.parse_args()
    config = Config(model=args.model, sizes=tuple(args.sizes), overlap=args.overlap)
    return config, bool(args.plot)


if __name__ == "__main__":
    main()
