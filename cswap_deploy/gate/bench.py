"""Several engines in one loop on this machine, and what the machine itself can tell apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cswap_deploy import __version__
from cswap_deploy.errors import UsageError
from cswap_deploy.gate.subjects import Subject, open_subject
from cswap_deploy.measure.device import describe_device
from cswap_deploy.measure.latency import measure_latency
from cswap_deploy.measure.noise import noise_in
from cswap_deploy.measure.paired import Contender, paired_ratio
from cswap_deploy.measure.statistics import mean_interval, ratio_interval
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.comparison import Bench, BenchRow, Ratio, SelfTest
from cswap_deploy.records.measurements import Latency
from cswap_deploy.records.value import now
from cswap_deploy.runtime.session import Session

_BLOCKS = 20


def bench(
    paths: Sequence[Path], *, targets: Sequence[str] = (), batches: Sequence[int] = (1,),
    threads: int | None = None, runs: int, seconds: float | None = None,
    progress: Progress | None = None,
) -> Bench:  # fmt: skip
    """Time engines in one loop, batch by batch.

    Args:
        paths: Bundles and ONNX files.
        targets: Runtimes; those that a bundle has and that ran where it was built, unless given,
            and ``onnxruntime`` for ONNX files.
        batches: Images a call.
        threads: Of CPU runtimes; the process's cores unless given.
        runs: Calls of each, at least.
        seconds: Of timing, all batches together.
        progress: Told of the batches.

    Raises:
        UsageError: A path or a number is wrong.
        CswapError: As loading an engine may.
    """
    progress = progress if progress is not None else Silent()
    if not paths or any(b < 1 for b in batches) or not batches or runs < 1:
        raise UsageError("bench needs a bundle or an ONNX file, batches and calls above zero")
    rows: list[BenchRow] = []
    with TemporaryDirectory(prefix="cswap-bench-") as folder:
        for batch in batches:
            subjects = [
                each for path in paths for each in _engines(path, Path(folder), targets, batch)
            ]
            progress.stage("bench", f"{len(subjects)} engines, batch {batch}")
            rows += _timed(
                subjects, batch=batch, threads=threads, runs=runs,
                seconds=None if seconds is None else seconds / len(batches),
            )  # fmt: skip
            progress.done(f"{len(rows[-1].latency.samples_ms):,} calls of each", reused=False)
    return Bench(
        created=now(), tool_version=__version__,
        rows=tuple(rows), device=describe_device(),
    )  # fmt: skip


def self_test(
    path: Path, *, target: str | None = None, batch: int = 1, threads: int | None = None,
    seconds: float = 60.0, progress: Progress | None = None,
) -> SelfTest:  # fmt: skip
    """Compare an engine with itself: what this machine calls a difference where there is none.

    Raises:
        CswapError: As :func:`bench`.
    """
    progress = progress if progress is not None else Silent()
    with TemporaryDirectory(prefix="cswap-bench-") as folder:
        subject = open_subject(path, Path(folder), target=target, batch=batch)
        one = subject.contender(batch=batch, threads=threads)
        progress.stage("self-test", f"{path} with itself, {seconds:g} s")
        found = self_compared(one, seconds=seconds, progress=progress)
        progress.done(f"tells {found.smallest:.1%}", reused=False)
    return found


def self_compared(one: Contender, *, seconds: float, progress: Progress | None = None) -> SelfTest:
    """The same of an engine that is at hand."""
    other = replace(one, label="itself")
    ratio = paired_ratio(one, other, decided=lambda _: False, at_most=seconds, progress=progress)
    spread = statistics.stdev(map(float, np.log(ratio.epochs)))
    half = max(ratio.value / ratio.low, ratio.high / ratio.value) - 1
    return SelfTest(
        created=now(), ratio=ratio, spread=spread, smallest=2 * half, device=describe_device()
    )


def _engines(path: Path, scratch: Path, targets: Sequence[str], batch: int) -> list[Subject]:
    if targets or not path.is_dir():
        wanted: Sequence[str | None] = list(targets) or [None]
        return [open_subject(path, scratch, target=t, batch=batch) for t in wanted]
    first = open_subject(path, scratch, batch=batch)
    assert first.manifest is not None
    ran = [r.engine.target for r in first.manifest.targets if r.engine.runnable]
    rest = [open_subject(path, scratch, target=t, batch=batch) for t in ran if t != first.target]
    return [first, *rest]


def _timed(
    subjects: Sequence[Subject], *, batch: int, threads: int | None, runs: int,
    seconds: float | None,
) -> list[BenchRow]:  # fmt: skip
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for at, subject in enumerate(subjects):
            sessions[str(at)] = session = subject.load(threads=threads, batch=batch)
            stack.callback(session.close)
        found = measure_latency(
            sessions, images={str(at): s.images(batch) for at, s in enumerate(subjects)},
            runs=runs, data="normal noise", seconds=seconds,
        )  # fmt: skip
    first = found["0"].samples_ms
    return [
        BenchRow(
            label=subject.label, target=subject.target, latency=found[str(at)],
            ratio=_ratio(found[str(at)].samples_ms, first), throughput=throughput(found[str(at)]),
            noise=noise_in(found[str(at)].samples_ms),
        )
        for at, subject in enumerate(subjects)
    ]  # fmt: skip


def _ratio(samples: Sequence[float], first: Sequence[float]) -> Ratio:
    value, low, high = ratio_interval(samples, first)
    return Ratio(value=value, low=low, high=high, calls=len(samples))


def throughput(latency: Latency) -> Ratio:
    """Images a second with its 95 % interval: by the mean of all calls, not by the median."""
    parts = np.array_split(np.asarray(latency.samples_ms), min(_BLOCKS, len(latency.samples_ms)))
    means = [float(part.mean()) for part in parts]
    low, high = mean_interval(means) if len(means) > 1 else (means[0], means[0])
    a_second = [1e3 * latency.batch / ms for ms in (statistics.fmean(means), high, max(low, 1e-9))]
    value, least, most = a_second
    return Ratio(value=value, low=least, high=most, calls=len(latency.samples_ms))
