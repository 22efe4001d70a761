"""Latency of loaded engines: interleaved, raw samples kept."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cswap_deploy.artifacts import Latency
from cswap_deploy.targets import Session

WINDOW = 10
"""Rounds whose medians are compared to decide that a session is warm."""
SETTLED = 0.05
"""Largest relative change of that median in a warm session."""
WARMUP_LIMIT = 5
"""Warm-up ends at this many times the requested rounds, warm or not."""


def measure_latency(
    sessions: Mapping[str, Session],
    *,
    images: npt.NDArray[np.float32],
    runs: int,
    warmup: int = 20,
) -> dict[str, Latency]:
    """Time engines in one loop, A B A B, so that what disturbs the machine disturbs all of them.

    Warm-up: at least ``warmup`` rounds (a round is one call of every session), then on until the
    median of every session's last 10 calls is within 5 % of that of the 10 before, at most
    5 × ``warmup`` rounds. Python's garbage collector is off meanwhile.

    Args:
        sessions: Name -> loaded engine.
        images: (B, C, H, W) float32, the batch that every call gets.
        runs: Timed calls of each session.
        warmup: Smallest number of warm-up rounds.

    Returns:
        For each name the samples (milliseconds, host wall clock, in the order taken), their
        percentiles (linear interpolation), and the warm-up rounds really run.
    """
    if runs < 1 or warmup < 0:
        raise ValueError(f"runs must be 1 or more and warmup 0 or more: {runs}, {warmup}")
    batch = np.ascontiguousarray(images, dtype=np.float32)
    warm: dict[str, list[float]] = {name: [] for name in sessions}
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        rounds = 0
        while rounds < warmup or (
            rounds < WARMUP_LIMIT * warmup and not all(_settled(t) for t in warm.values())
        ):
            _round(sessions, batch, warm)
            rounds += 1
        for _ in range(runs):
            _round(sessions, batch, samples)
    finally:
        if collecting:
            gc.enable()
    return {
        name: _summarise(samples[name], session, batch=len(batch), warmup=rounds)
        for name, session in sessions.items()
    }


def _round(
    sessions: Mapping[str, Session],
    images: npt.NDArray[np.float32],
    times: dict[str, list[float]],
) -> None:
    for name, session in sessions.items():
        start = time.perf_counter_ns()
        session.run(images)
        times[name].append((time.perf_counter_ns() - start) / 1e6)


def _settled(times: list[float]) -> bool:
    if len(times) < 2 * WINDOW:
        return False
    before = statistics.median(times[-2 * WINDOW : -WINDOW])
    now = statistics.median(times[-WINDOW:])
    return abs(now - before) <= SETTLED * before


def _summarise(times: list[float], session: Session, *, batch: int, warmup: int) -> Latency:
    p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    return Latency(
        batch=batch,
        samples_ms=tuple(times),
        warmup=warmup,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=float(np.mean(times)),
        threads=session.threads,
        provider=session.provider,
    )
