"""Accuracy kept without training: this package's presets against eleven other importances.

    python benchmarks/bench_accuracy.py --model resnet56 --seeds 5
    python benchmarks/bench_accuracy.py --model demo-vit --methods cswap obs --ratios 0.4
    python benchmarks/bench_accuracy.py --plot       # figures and tables from what was measured
    python benchmarks/bench_accuracy.py --quick      # a minute, keeps nothing

Every method removes the same units of the same network, sees the same calibration images (drawn by
the seed from the training side) and is scored on the same test images, which it never saw. Peers
rank all units once, together; the presets measure again in rounds. Each is scored twice: natively
(what is removed becomes zero, nothing makes up for it) and with the package's closed-form refit.
No weight is changed by a gradient. Where the ratio counts parameters, peers rank in two ways:
plainly, and per parameter saved; the table takes the better one.

Results go to ``benchmarks/results/accuracy/<model>.json``, a row as soon as it is measured. A row
that is there with the same settings and the same code is not measured again. Real networks and
images are read from the folder that ``CSWAP_DATA`` names. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import accuracy_figure
import numpy as np
import peers
import torch
from accuracy_models import MODELS, ROOT, Model, data_of, load
from accuracy_results import Result, code_digest, read_results, write_result
from torch import Tensor, nn

from cswap_deploy.causal.effects import kl_divergence
from cswap_deploy.cli.output import Console
from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration, calibration_set, load_samples
from cswap_deploy.errors import MissingDependencyError
from cswap_deploy.measure.accuracy import accuracy_change, predicted
from cswap_deploy.models.load import LoadedModel
from cswap_deploy.progress import Phases, Progress, Silent
from cswap_deploy.pruning.allocation import Values
from cswap_deploy.pruning.importance import Importance, View, importance_of
from cswap_deploy.pruning.job import Job
from cswap_deploy.pruning.prepare import Prepared, prepare
from cswap_deploy.pruning.rounds import remove_in_rounds
from cswap_deploy.pruning.state import State

RESULTS = ROOT / "benchmarks/results/accuracy"
FIGURES = ROOT / ".github"
PRESETS = ("cswap", "paper")
METHODS = (*PRESETS, *peers.PEERS)
NEAR = 0.02
"""A result counts only if the ratio was met this closely."""
BATCH = 128


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("resnet56",)
    methods: tuple[str, ...] = METHODS
    refits: tuple[bool, ...] = (False, True)
    seeds: tuple[int, ...] = (0,)
    ratios: tuple[float, ...] | None = None
    """The model's own unless said."""
    calibration: int | None = None
    """Images; the model's own unless said."""
    results: Path = RESULTS
    fresh: bool = False


QUICK = Config(
    models=("demo-resnet",), methods=("cswap", "random", "magnitude-l2", "obs"), ratios=(0.4,),
    refits=(True,), calibration=64,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    model: str
    method: str
    refit: bool
    cost_aware: bool
    """Whether effects count per parameter saved."""
    ratio: float
    seed: int

    def __str__(self) -> str:
        how = " per parameter" * (self.cost_aware and self.method not in PRESETS)
        refit = " + refit" * self.refit
        return f"{self.model} {self.method}{how}{refit} {self.ratio:.0%} seed {self.seed}"


class Draw:
    """The images of one seed, and what the dense network says about them."""

    def __init__(self, loaded: LoadedModel, model: Model, calibration: int, seed: int) -> None:
        data, steps = data_of(model, calibration), loaded.spec.preprocessing
        samples = load_samples(data, model=loaded.spec, seed=seed, progress=Silent())
        self.calibration = calibration_set(samples.calibration, steps)
        self.test = calibration_set(samples.validation, steps)
        self.loaded, self.seed = loaded, seed
        self.known: dict[str, Values] = {}
        self.seconds: dict[str, float] = {}

    @cached_property
    def dense(self) -> Tensor:
        """(N, classes) logits of the dense network on the test images."""
        return logits(self.loaded.module, self.test.images)

    def values(self, prepared: Prepared, method: str) -> Values:
        """A peer's importance; computed once for all ratios."""
        if method not in self.known:
            begun = time.perf_counter()
            rng = np.random.default_rng(self.seed)
            view = View(prepared.graph, prepared.groups, self.calibration, rng)
            self.known[method] = peers.PEERS[method].of(view)
            self.seconds[method] = time.perf_counter() - begun
        return self.known[method]


def main() -> None:
    config, shown = _arguments()
    if shown is not None:
        figures = accuracy_figure.publish(config.results, FIGURES, value=shown)
        print(json.dumps({"figures": figures}))
        return
    with Console(as_json=False, quiet=False).progress() as progress:
        measured = [r for name in config.models for r in measure_model(name, config, progress)]
    print(json.dumps({"cores": os.cpu_count(), "results": [asdict(r) for r in measured]}))


def measure_model(name: str, config: Config, progress: Progress) -> Iterator[Result]:
    """Measure what is missing; yields every result asked for, old or new."""
    model = MODELS[name]
    path = config.results / f"{name}.json"
    digests = {m: code_digest(peer=m not in PRESETS) for m in config.methods}
    known = {} if config.fresh else read_results(path)
    calibration = config.calibration or model.calibration
    cases = list(_cases(name, model, config))
    loaded: LoadedModel | None = None
    prepared: dict[tuple[bool, bool], Prepared] = {}
    """By whether whole branches may go, which peers do not rank, and with a refit."""
    draw: Draw | None = None
    refused: set[str] = set()
    for at, case in enumerate(cases, 1):
        if case.method in refused:
            continue
        old = known.get((*_key(case, model), calibration))
        progress.stage(f"[{at}/{len(cases)}]", str(case))
        if old is not None and old.code == digests[case.method]:
            progress.done(_words(old), reused=True)
            yield old
            continue
        if loaded is None:
            loaded = load(model)
        if draw is None or draw.seed != case.seed:
            draw = Draw(loaded, model, calibration, case.seed)
        way = settings(case, model).branches, case.refit
        if way not in prepared:
            least = settings(replace(case, ratio=min(c.ratio for c in cases)), model)
            prepared[way] = prepare(loaded.module, draw.calibration.images, least)
        network = prepared[way]
        try:
            result = measure(case, model, network, draw, digests[case.method], progress)
        except (peers.NotApplicableError, MissingDependencyError) as err:
            progress.note(f"{case.method} left out: {err}")
            refused.add(case.method)
            continue
        if abs(result.removed - case.ratio) > NEAR:
            progress.note(
                f"left out: {result.removed:.1%} removed where {case.ratio:.0%} was asked"
            )
            continue
        write_result(path, result)
        progress.done(_words(result), reused=False)
        yield result


def measure(
    case: Case, model: Model, prepared: Prepared, draw: Draw, code: str, progress: Progress
) -> Result:
    """Prune a copy of the network as one case says, and score it."""
    values = None
    if case.method not in PRESETS:
        values = ranking(draw.values(prepared, case.method), case, model, prepared)
    begun = time.perf_counter()
    pruned, removed = prune_copy(
        prepared, draw.calibration, settings(case, model),
        seed=case.seed, values=values, progress=progress if values is None else Silent(),
    )  # fmt: skip
    seconds = time.perf_counter() - begun + draw.seconds.get(case.method, 0.0)
    after = logits(pruned, draw.test.images)
    before, now = (predicted(said.numpy(), "logits") for said in (draw.dense, after))
    change = accuracy_change(before, now, draw.test.labels.numpy())
    divergence = kl_divergence(after.double()[None], draw.dense.double())
    return Result(
        model=case.model,
        method=case.method,
        refit=case.refit,
        cost_aware=case.cost_aware,
        ratio=case.ratio,
        ratio_of=model.ratio_of,
        removed=round(removed, 4),
        seed=case.seed,
        calibration=len(draw.calibration.images),
        top1=round(change.pruned.top1, 6),
        top1_dense=round(change.dense.top1, 6),
        agreement=round(change.agreement, 6),
        kl=round(float(divergence.mean()), 6),
        images=len(draw.test.labels),
        seconds=round(seconds, 2),
        code=code,
        torch=torch.__version__,
    )


def prune_copy(
    prepared: Prepared,
    calibration: Calibration,
    config: PruneConfig,
    *,
    seed: int,
    values: Values | None,
    progress: Phases,
) -> tuple[nn.Module, float]:
    """Prune as the command does, on a copy: preparing takes seconds and is done once.

    Returns:
        The masked network (the deleted one gives the same outputs), and the fraction removed.
    """
    network = prepared.copy()
    importance = importance_of(config.criterion)
    if values is not None:
        importance = Importance(lambda _: values)
    job = Job(network, calibration, config, importance, seed, progress=progress)
    remove_in_rounds(job, State())
    total = network.dense_size.amount(config.ratio_of)
    return network.module, 1 - network.sizes.size().amount(config.ratio_of) / total


def logits(module: nn.Module, images: Tensor) -> Tensor:
    """(N, classes) float32."""
    with torch.inference_mode():
        return torch.cat([module(part) for part in torch.split(images, BATCH)])


def settings(case: Case, model: Model) -> PruneConfig:
    """What the command would use for a preset; one round and no effects for a peer."""
    asked: dict[str, Any] = {
        "ratio": case.ratio, "ratio_of": model.ratio_of, "round_to": model.round_to,
        "refit": case.refit,
    }  # fmt: skip
    if case.method in PRESETS:
        return PruneConfig(method=case.method, **asked)
    # Natively a peer's units become zero; with the refit they are removed as the package does.
    # A peer ranks units; what it would make of whole branches, nobody has said.
    intervention = "mean" if case.refit else "zero"
    return PruneConfig(intervention=intervention, branches=False, **asked)


def ranking(values: Values, case: Case, model: Model, prepared: Prepared) -> Values:
    """As a case says: the loop divides every value by what it saves."""
    if model.ratio_of == "channels" or case.cost_aware:
        return values
    return peers.plainly(values, prepared, model.ratio_of)


def _cases(name: str, model: Model, config: Config) -> Iterator[Case]:
    """Seed by seed, method by method; every method's plain ranking before the cost-aware one."""
    for seed in config.seeds:
        for method in config.methods:
            if model.ratio_of == "channels":
                ways: tuple[bool, ...] = (False,)
            else:
                ways = (True,) if method in PRESETS else (False, True)
            for refit in config.refits:
                same = method in peers.WEIGHTS_ONLY and not refit and model.one_test_set
                if same and seed != config.seeds[0]:
                    continue  # nothing depends on the seed
                for cost_aware in ways:
                    for ratio in config.ratios or model.ratios:
                        yield Case(name, method, refit, cost_aware, ratio, seed)


def _key(case: Case, model: Model) -> tuple[Any, ...]:
    return (case.method, case.refit, case.cost_aware, case.ratio, model.ratio_of, case.seed)


def _words(result: Result) -> str:
    return (
        f"top-1 {result.top1:.3f} of {result.top1_dense:.3f}, agreement {result.agreement:.3f}, "
        f"KL {result.kl:.3f}, {result.seconds:.1f} s"
    )


def _arguments() -> tuple[Config, accuracy_figure.Value | None]:
    """What to measure; or, with ``--plot``, what the tables show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=MODELS, default=list(Config.models), metavar="NAME",
        help=f"{', '.join(MODELS)}")  # fmt: skip
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"{', '.join(METHODS)}")  # fmt: skip
    add("--refit", choices=("yes", "no", "both"), default="both")
    add("--seeds", type=int, default=1, metavar="N", help="calibration sets")
    add("--ratios", type=float, nargs="+", metavar="R", help="the model's own unless said")
    add("--calibration", type=int, metavar="N", help="images; 512 unless said")
    add("--results", type=Path, default=RESULTS, metavar="DIR")
    add("--fresh", action="store_true", help="measure again what is there")
    add("--plot", action="store_true", help="only draw what is there, and print the tables")
    add("--table", choices=("top1", "agreement"), default="top1", help="what --plot's tables show")
    add("--quick", action="store_true", help="a short run on demo-resnet, nothing kept")
    args = parser.parse_args()
    if args.quick:
        return replace(QUICK, results=Path(tempfile.mkdtemp())), None
    config = Config(
        models=tuple(args.model),
        methods=tuple(args.methods),
        refits={"yes": (True,), "no": (False,), "both": (False, True)}[args.refit],
        seeds=tuple(range(args.seeds)),
        ratios=tuple(args.ratios) if args.ratios else None,
        calibration=args.calibration,
        results=args.results,
        fresh=args.fresh,
    )
    return config, args.table if args.plot else None


if __name__ == "__main__":
    main()
