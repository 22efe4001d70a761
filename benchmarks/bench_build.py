"""What pruning costs and gives, against another commit of this package, in turn in one run.

    python benchmarks/bench_build.py --against v0.2          # both demo networks
    python benchmarks/bench_build.py --models resnet56 tf_efficientnet_lite0 --against 898d1ca
    python benchmarks/bench_build.py --quick                 # demo-resnet, this version alone

Each pruning has a process of its own, with the settings that a build has by default. Time is also
told in *passes*: seconds over the seconds of one dense forward pass of the calibration set, in the
same process, before and after. Accuracy is that of the pruned module on test images that it never
saw; its parameters are counted, not believed. Real networks and images are read from the folder
that ``CSWAP_DATA`` names. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 64
"""Images of one forward pass."""
RATIOS = {"tf_efficientnet_lite0": 0.3}
"""0.4 unless said."""
IMAGES = {"tf_efficientnet_lite0": 300}
"""To prune on; 1,024, as a build has, unless said."""


@dataclass(frozen=True)
class Result:
    """One pruning."""

    model: str
    version: str
    """``here``, or the commit."""
    seed: int
    images: int
    seconds: float
    pass_seconds: float
    passes: float
    removed: float
    """Of the quantity that the model's ratio counts."""
    top1_dense: float
    top1: float
    agreement: float
    kl: float
    """Mean divergence from the dense network on the test images, nats."""
    peak_mib: float
    """Largest resident memory of the process, network and images included."""


def network_and_images(name: str, seed: int) -> tuple[Any, Any, Any]:
    """A network, and the images to prune it on and to test it on."""
    from accuracy_models import MODELS, data_of, load

    from cswap_deploy.data import calibration_set, load_samples
    from cswap_deploy.progress import Silent

    model, loaded = MODELS[name], load(MODELS[name])
    data = data_of(model, IMAGES.get(name, 1024))
    samples = load_samples(data, model=loaded.spec, seed=seed, progress=Silent())
    calibration, test = (
        calibration_set(part, loaded.spec.preprocessing)
        for part in (samples.calibration, samples.validation)
    )
    return loaded, calibration, test


def outputs(module: Any, images: Any) -> Any:
    """(N, classes) of all images, some at a time."""
    import torch

    with torch.inference_mode():
        return torch.cat([module(part) for part in torch.split(images, CHUNK)])


def what_is_kept(dense: Any, pruned: Any, test: Any) -> dict[str, float]:
    """Top-1 of both networks, agreement and mean divergence, on the test images."""
    import torch

    before, after = (outputs(module, test.images).double() for module in (dense, pruned))
    chosen, said, labels = after.argmax(1), before.argmax(1), test.labels
    divergence = torch.nn.functional.kl_div(
        after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="none"
    )
    return {
        "top1_dense": round(float((said == labels).double().mean()), 4),
        "top1": round(float((chosen == labels).double().mean()), 4),
        "agreement": round(float((chosen == said).double().mean()), 4),
        "kl": round(float(divergence.sum(1).mean()), 5),
    }


def prune_once(name: str, seed: int, version: str) -> Result:
    """In this process, with whatever ``cswap_deploy`` it imports."""
    from accuracy_models import MODELS

    import cswap_deploy

    model = MODELS[name]
    loaded, calibration, test = network_and_images(name, seed)

    def one_pass() -> float:
        begun = time.perf_counter()
        outputs(loaded.module, calibration.images)
        return time.perf_counter() - begun

    one_pass()
    before = min(one_pass() for _ in range(3))
    begun = time.perf_counter()
    pruned = cswap_deploy.prune(
        loaded.module, (calibration.images, calibration.labels), ratio=RATIOS.get(name, 0.4),
        ratio_of=model.ratio_of, round_to=model.round_to, seed=seed,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    passing = (before + min(one_pass() for _ in range(3))) / 2
    counted = sum(p.numel() for p in pruned.module.parameters())
    assert counted == pruned.plan.pruned.params
    return Result(
        model=name, version=version, seed=seed, images=len(calibration.images),
        seconds=round(seconds, 2), pass_seconds=round(passing, 4),
        passes=round(seconds / passing, 1),
        removed=round(pruned.plan.effective(model.ratio_of), 4),
        **what_is_kept(loaded.module, pruned.module, test),
        peak_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    )  # fmt: skip


def in_a_process(name: str, seed: int, version: str, tree: Path) -> Result:
    """With the package of a tree, from the tree's own benchmarks' table of models."""
    path = os.pathsep.join([str(tree), str(tree / "benchmarks")])
    done = subprocess.run(
        [sys.executable, __file__, "--once", name, "--seeds", str(seed), "--version", version],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
        cwd=tree,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} with {version} failed:\n{done.stderr}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """The files of a commit, for as long as they are needed."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["demo-resnet", "demo-vit"], metavar="NAME")
    add("--against", metavar="COMMIT", help="the version to compare with")
    add("--seeds", type=int, default=1, metavar="N", help="calibration sets")
    add("--quick", action="store_true")
    add("--once", metavar="NAME", help=argparse.SUPPRESS)
    add("--version", default="here", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(asdict(prune_once(args.once, args.seeds, args.version))))
        return
    if args.quick:
        args.models, args.against = ["demo-resnet"], None
    results = []
    with tree_of(args.against) if args.against else nullcontext() as other:
        versions = {"here": ROOT} | ({args.against: other} if other else {})
        for name in args.models:
            for seed in range(args.seeds):
                for version, tree in versions.items():
                    r = in_a_process(name, seed, version, tree)
                    results.append(r)
                    print(
                        f"{r.model:22} {r.version:8} seed {r.seed}: {r.passes:.0f} passes, "
                        f"{r.seconds:.0f} s, removed {r.removed:.1%}, top-1 {r.top1_dense:.2%} -> "
                        f"{r.top1:.2%}, agreement {r.agreement:.2%}, KL {r.kl:.4f}, "
                        f"{r.peak_mib:.0f} MiB",
                        flush=True,
                    )
    print(json.dumps({"cores": os.cpu_count(), "results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
