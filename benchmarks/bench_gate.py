"""Whether the gate can be trusted: false alarms and slowdowns found, while other jobs come and go.

    python benchmarks/bench_gate.py --bundle demo-bundles/demo-resnet --json gate.json
    python benchmarks/bench_gate.py --quick                # ten comparisons of each kind

Processes that load every core start and stop at random. Beside them an engine is compared with
itself, and with itself behind a session that burns 5 % or 2 % more of each call, as `compare` does.
The same runs are judged by what many gates do instead: one p99 of 200 calls against a limit 10 %
above the one of a quiet machine. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from cswap_deploy.api import build
from cswap_deploy.gate.compare import CompareOptions, compare_latency
from cswap_deploy.gate.subjects import open_subject
from cswap_deploy.measure.device import describe_device
from cswap_deploy.measure.paired import Contender
from cswap_deploy.runtime.host import usable_cores
from cswap_deploy.runtime.session import CallTimes, Floats, Session

P99_CALLS, P99_MARGIN = 200, 1.10


@dataclass(frozen=True)
class Result:
    """Comparisons with one planted slowdown."""

    planted: float
    """Fraction of a call."""
    comparisons: int
    worse: int
    better: int
    same: int
    inconclusive: int
    seconds_median: float
    seconds_most: float
    p99_alarms: int
    """Of the check of one p99 against a fixed limit."""


class Slowed(Session):
    """An engine whose calls take longer by a fraction."""

    threads, provider = 1, "slowed"

    def __init__(self, inner: Session, by: float) -> None:
        self._inner, self._by = inner, by

    def run(self, images: Floats) -> Floats:
        begun = time.perf_counter_ns()
        found = self._inner.run(images)
        now = time.perf_counter_ns()
        ends = now + (now - begun) * self._by
        while time.perf_counter_ns() < ends:
            pass
        return found

    def timed(self, images: Floats) -> tuple[Floats, CallTimes | None]:
        return self.run(images), None

    def close(self) -> None:
        self._inner.close()


def slowed(one: Contender, by: float) -> Contender:
    return replace(one, label=f"{by:.0%} slower", load=lambda: Slowed(one.load(), by))


def job(seed: int) -> None:
    """Loads a core for some seconds, then rests, again and again: products, memory, Python."""
    rng = random.Random(seed)
    a = np.random.default_rng(seed).standard_normal((384, 384))
    big = np.zeros(1 << 22)
    while True:
        time.sleep(rng.expovariate(1 / 3.0))
        ends, kind = time.perf_counter() + rng.expovariate(1 / 3.0), rng.randrange(3)
        while time.perf_counter() < ends:
            if kind == 0:
                a @ a
            elif kind == 1:
                big += 1.0
            else:
                sum(range(20_000))


@contextmanager
def loaded(jobs: int) -> Iterator[None]:
    """Processes that start and stop loading the machine at random."""
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=job, args=(seed,), daemon=True) for seed in range(jobs)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def p99(one: Contender) -> float:
    """Of a few hundred calls, milliseconds: all that a simple gate looks at."""
    session = one.load()
    times = []
    for _ in range(P99_CALLS):
        begun = time.perf_counter()
        session.run(one.images)
        times.append(1e3 * (time.perf_counter() - begun))
    session.close()
    return float(np.percentile(times, 99))


def run(
    one: Contender, by: float, count: int, *, jobs: int, limit: float, options: CompareOptions
) -> Result:
    """Compare an engine with a slower one of itself, so many times."""
    other = slowed(one, by) if by else replace(one, label="itself")
    verdicts: Counter[str] = Counter()
    seconds, alarms = [], 0
    with loaded(jobs):
        for at in range(count):
            found = compare_latency(one, other, options)
            assert found.ratio is not None
            verdicts[found.verdict] += 1
            seconds.append(found.ratio.seconds)
            alarms += p99(other) > limit
            print(
                f"{by:.0%} {at + 1:3}: {found.verdict:12} {found.ratio.value:.4f} "
                f"({found.ratio.low:.4f} to {found.ratio.high:.4f}), {found.ratio.seconds:.1f} s, "
                f"{len(found.ratio.epochs)} epochs",
                flush=True,
            )
    return Result(
        planted=by, comparisons=count, worse=verdicts["worse"], better=verdicts["better"],
        same=verdicts["same"], inconclusive=verdicts["inconclusive"],
        seconds_median=round(statistics.median(seconds), 1),
        seconds_most=round(max(seconds), 1), p99_alarms=alarms,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, help="demo-resnet, dense, built here unless given")
    add("--counts", type=int, nargs=3, default=[200, 100, 50], metavar="N", help="0, 5 and 2 %%")
    add("--jobs", type=int, default=usable_cores(), metavar="N")
    add("--json", type=Path, metavar="FILE")
    add("--quick", action="store_true")
    args = parser.parse_args()
    counts = [10, 10, 10] if args.quick else args.counts
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bundle = args.bundle
        if bundle is None:
            bundle = build("demo-resnet", ratio=0.0, output=scratch / "dense").path
        one = open_subject(bundle, scratch).contender(batch=1, threads=1)
        limit = P99_MARGIN * statistics.median(p99(one) for _ in range(5))
        options = CompareOptions(threads=1)
        results = [
            run(one, by, count, jobs=args.jobs, limit=limit, options=options)
            for by, count in zip((0.0, 0.05, 0.02), counts, strict=True)
        ]
    for r in results:
        print(
            f"{r.planted:.0%} slower: {r.worse} of {r.comparisons} worse, {r.better} better, "
            f"{r.same} same, {r.inconclusive} inconclusive; median {r.seconds_median} s, at most "
            f"{r.seconds_most} s; a fixed limit on one p99 fails {r.p99_alarms}"
        )
    told = {
        "results": [asdict(r) for r in results], "jobs": args.jobs, "p99_limit_ms": limit,
        "device": describe_device().model_dump(mode="json"),
    }  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
