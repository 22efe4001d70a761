"""Limits held against what is measured here and now.

An interval decides, not a figure: a limit fails when all of the interval lies beyond it. While it
lies inside, more is measured; when time is up it is inconclusive, and ``budgets.toml`` says what
that counts as. What is relative is measured in alternation with what it is relative to, so that it
holds on any machine.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cswap_deploy.errors import MissingDependencyError, UsageError
from cswap_deploy.gate.bench import throughput
from cswap_deploy.gate.budgets import (
    BaselineBudget,
    BudgetResult,
    Budgets,
    Inconclusive,
    LatencyBudget,
    Seen,
    engine_limits,
    exact_limits,
    hold,
)
from cswap_deploy.gate.compare import CompareOptions, compare_accuracy
from cswap_deploy.gate.subjects import Subject, dense_subject, fetched, open_subject
from cswap_deploy.measure.device import describe_device
from cswap_deploy.measure.latency import measure_latency
from cswap_deploy.measure.memory import peak_memory
from cswap_deploy.measure.noise import noise_in
from cswap_deploy.measure.paired import ERROR_RATE, Contender, paired_ratio
from cswap_deploy.measure.statistics import percentile_interval, samples_for
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.bundle import DENSE
from cswap_deploy.records.comparison import Ratio
from cswap_deploy.records.measurements import Latency

_CALLS = 200
_LOOKS = 3
"""At a percentile; each has its part of the error rate."""
_LEVEL = 1 - ERROR_RATE / _LOOKS
PERCENTILE = re.compile(r"p\d+(\.\d+)?_ms")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class FreshOptions:
    """How a bundle is measured."""

    threads: int | None = None
    """Of CPU runtimes; as in the build unless given."""
    at_most: float = 60.0
    """Seconds for each limit that needs timing."""


def check_here(
    bundle: Path, budgets: Budgets, *, near: Path, options: FreshOptions | None = None,
    progress: Progress | None = None,
) -> tuple[BudgetResult, ...]:  # fmt: skip
    """Measure a bundle on this machine and hold it against its budgets.

    Accuracy and parity are the build's own: the files are the same to the last bit. All else is
    measured, each target alone.

    Args:
        bundle: A finished one; its files are held against their digests first.
        budgets: The limits.
        near: Folder from which a baseline's relative path counts.
        options: See :class:`FreshOptions`.
        progress: Told of what takes time.

    Returns:
        One result for each limit, in the order of ``budgets.toml``'s documentation.

    Raises:
        UsageError: The baseline is not there.
        ArtifactError: The bundle or the baseline is damaged, or does not fit this device.
    """
    options = options or FreshOptions()
    progress = progress if progress is not None else Silent()
    with TemporaryDirectory(prefix="cswap-check-") as folder:
        scratch = Path(folder)
        first = open_subject(bundle, scratch)
        assert first.manifest is not None
        results = exact_limits(first.manifest, budgets, budgets.inconclusive)
        base: _Base | None = None
        if budgets.baseline is not None:
            place = budgets.baseline.bundle
            base = _Base(fetched(place, scratch, near=near), place)
        for target, limits in budgets.latency.items():
            progress.stage("check", f"{bundle} on {target}")
            held = _Held(
                first, target, limits, base, scratch, budgets.inconclusive, options, progress
            )
            results += held.results()
            progress.done(f"{len(results)} limits held", reused=False)
        results += engine_limits(first.manifest, budgets)
        if budgets.baseline is not None and base is not None:
            results += _against(first, base, budgets.baseline, scratch, budgets.inconclusive)
    return tuple(results)


@dataclass(frozen=True, slots=True)
class _Base:
    """What a bundle is held against."""

    path: Path
    place: str
    """As the budgets file names it."""

    def opened(self, scratch: Path, *, target: str, batch: int = 1) -> Subject:
        """Its engine for a target."""
        return open_subject(self.path, scratch, target=target, batch=batch, label=self.place)


@dataclass(frozen=True, slots=True)
class _Held:
    """One target's limits, and all that measuring them needs."""

    bundle: Subject
    target: str
    limits: LatencyBudget
    base: _Base | None
    scratch: Path
    inconclusive: Inconclusive
    options: FreshOptions
    progress: Progress

    def results(self) -> Iterator[BudgetResult]:
        """In the order of the table's documentation."""
        try:
            subject = open_subject(self.bundle.path, self.scratch, target=self.target)
            yield from self._measured(subject)
        except (MissingDependencyError, UsageError) as err:
            # The target does not run here, or the bundle lacks it: what cannot be seen fails.
            names = self.limits.model_dump(exclude_none=True, exclude={"batch"})
            for name in names:
                seen = Seen(None, why=str(err).splitlines()[0])
                yield from hold(f"latency.{self.target}.{name}", getattr(self.limits, name), seen)

    def _measured(self, subject: Subject) -> Iterator[BudgetResult]:
        limits, recorded = self.limits, self._recorded(subject)
        batch = limits.batch or (1 if recorded is None else recorded.batch)
        threads = self.options.threads
        if threads is None and recorded is not None:
            threads = recorded.threads
        own = subject.contender(batch=batch, threads=threads)
        where = f"{self.target}, batch {batch}"
        yield from self._percentiles(own, where)
        if limits.memory_max_mib is not None:
            peak = peak_memory(subject.engine, subject.onnx, batch=batch, threads=threads)
            seen = Seen(peak / MIB, f"peak memory ({where})")
            yield from hold(self._name("memory_max_mib"), limits.memory_max_mib, seen)
        if limits.speedup_min is not None:
            yield from self._speedup(subject, own, batch, threads, where)
        if limits.slowdown_max is not None and self.base is not None:
            yield from self._slowdown(own, batch, threads, where)

    def _recorded(self, subject: Subject) -> Latency | None:
        assert subject.manifest is not None
        found = (r.latency for r in subject.manifest.targets if r.engine.target == self.target)
        return next(found, None)

    def _name(self, limit: str) -> str:
        return f"latency.{self.target}.{limit}"

    def _percentiles(self, own: Contender, where: str) -> Iterator[BudgetResult]:
        names = [n for n in type(self.limits).model_fields if PERCENTILE.fullmatch(n)]
        asked = {n: limit for n in names if (limit := getattr(self.limits, n)) is not None}
        if asked or self.limits.throughput_min is not None:
            prefix, least = self._name(""), self.limits.throughput_min
            yield from time_limits(
                own, asked, least, where=where, prefix=prefix, inconclusive=self.inconclusive,
                at_most=self.options.at_most,
            )  # fmt: skip

    def _speedup(
        self, subject: Subject, own: Contender, batch: int, threads: int | None, where: str
    ) -> Iterator[BudgetResult]:
        limit = self.limits.speedup_min
        dense = dense_subject(subject, self.scratch, batch=batch)
        if dense is None:
            why = f"the bundle has no {DENSE}: build it with --with-dense"
            yield from hold(self._name("speedup_min"), limit, Seen(None, why=why))
            return
        other = dense.contender(batch=batch, threads=threads)
        found = self._ratio(own, other, lambda r: r.low >= (limit or 0) or r.high < (limit or 0))
        seen = Seen(found.value, f"speed-up ({where})", "", "", found.low, found.high)
        yield from hold(self._name("speedup_min"), limit, seen, self.inconclusive)

    def _slowdown(
        self, own: Contender, batch: int, threads: int | None, where: str
    ) -> Iterator[BudgetResult]:
        assert self.base is not None
        assert self.limits.slowdown_max is not None
        limit = self.limits.slowdown_max
        base = self.base.opened(self.scratch, target=self.target, batch=batch)
        other = base.contender(batch=batch, threads=threads)
        found = self._ratio(other, own, lambda r: r.high - 1 <= limit or r.low - 1 > limit)
        aside = f" over {self.base.place}"
        if base.manifest is not None and base.manifest.device.cpu != describe_device().cpu:
            aside += f", built on {base.manifest.device.cpu} and measured here"
        low, high = found.low - 1, found.high - 1
        seen = Seen(found.value - 1, f"slowdown ({where})", "", aside, low, high)
        yield from hold(self._name("slowdown_max"), limit, seen, self.inconclusive)

    def _ratio(self, base: Contender, head: Contender, decided: Callable[[Ratio], bool]) -> Ratio:
        at_most = self.options.at_most
        return paired_ratio(base, head, decided=decided, at_most=at_most, progress=self.progress)


def time_limits(
    own: Contender, asked: Mapping[str, float], least: float | None, *, where: str, prefix: str,
    inconclusive: Inconclusive, at_most: float,
) -> list[BudgetResult]:  # fmt: skip
    """Time an engine until its percentiles and its throughput are clear of their limits.

    Args:
        own: The engine.
        asked: ``p95_ms`` and the like -> limit, milliseconds.
        least: Images a second, or no limit.
        where: What is measured, in words.
        prefix: Of the results' names.
        inconclusive: What a limit inside an interval counts as.
        at_most: Seconds, of all calls.
    """
    needed = [samples_for(_percent(name), level=_LEVEL) for name in asked]
    runs, begun = max([_CALLS, *needed]), time.perf_counter()
    session = own.load()
    try:
        for look in range(_LOOKS):
            found = measure_latency(
                {"": session}, images=own.images, runs=runs, data="normal noise"
            )[""]  # fmt: skip
            results = _timed(found, asked, least, where, prefix, inconclusive)
            took = max(time.perf_counter() - begun, 1e-3)
            if not any(r.inconclusive for r in results) or took >= at_most:
                break
            share = (at_most - took) / max(1, _LOOKS - 1 - look)
            runs = max(runs + 1, int(runs * share / took))
    finally:
        session.close()
    return results


def _timed(
    found: Latency, asked: Mapping[str, float], least: float | None, where: str, prefix: str,
    inconclusive: Inconclusive,
) -> list[BudgetResult]:  # fmt: skip
    told = noise_in(found.samples_ms)
    aside = "".join(f"; {words}" for words in told)
    results: list[BudgetResult] = []
    for name, limit in asked.items():
        percent, calls = _percent(name), found.samples_ms
        ends = percentile_interval(calls, percent, level=_LEVEL)
        assert ends is not None, "as many calls were made as it needs"
        what = f"{name.removesuffix('_ms')} ({where}, {len(calls):,} calls)"
        seen = Seen(float(np.percentile(calls, percent)), what, "", aside, *ends)
        results += hold(f"{prefix}{name}", limit, seen, inconclusive)
    if least is not None:
        rate = throughput(found)
        seen = Seen(rate.value, f"throughput ({where})", "", aside, rate.low, rate.high)
        results += hold(f"{prefix}throughput_min", least, seen, inconclusive)
    return results


def _percent(name: str) -> float:
    return float(name.removeprefix("p").removesuffix("_ms"))


def _against(
    bundle: Subject, base: _Base, limits: BaselineBudget, scratch: Path, inconclusive: Inconclusive
) -> Iterator[BudgetResult]:
    """What is relative to the baseline and needs no timing."""
    before = base.opened(scratch, target=bundle.target)
    if limits.top1_drop_max is not None:
        compared = compare_accuracy(before, bundle, CompareOptions())
        seen = Seen(None, why="the baseline's build was tested on other images, or kept none")
        if compared is not None and (change := compared.change) is not None:
            what = f"top-1 drop over {base.place}"
            seen = Seen(change.drop, what, "", "", change.low, change.high)
        yield from hold("baseline.top1_drop_max", limits.top1_drop_max, seen, inconclusive)
    growth = bundle.size_bytes / before.size_bytes - 1
    seen = Seen(growth, f"growth of the {bundle.target} engine over {base.place}")
    yield from hold("baseline.size_growth_max", limits.size_growth_max, seen)
