"""Latency of loaded engines: interleaved, raw samples kept, by the host's clock and the GPU's."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cswap_deploy.measure.gpu import GpuMonitor
from cswap_deploy.records.measurements import DeviceTimes, GpuState, Latency
from cswap_deploy.targets import Session

if TYPE_CHECKING:
    from cswap_deploy.runtime.tensorrt_session import CallTimes

Images = npt.NDArray[np.float32]
WINDOW = 10
"""Rounds whose medians are compared to decide that a session is warm."""
SETTLED = 0.05
"""Largest relative change of that median in a warm session."""
WARMUP_LIMIT = 5
"""Warm-up ends at this many times the requested rounds, warm or not."""
_PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class _Times:
    """What one session's calls took (milliseconds)."""

    host: list[float] = field(default_factory=list)
    to_device: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    from_device: list[float] = field(default_factory=list)

    def settled(self) -> bool:
        return _settled(self.host) and (not self.compute or _settled(self.compute))


def measure_latency(
    sessions: Mapping[str, Session],
    *,
    images: Images,
    runs: int,
    warmup: int = 20,
    data: str = "real images",
) -> dict[str, Latency]:
    """Time engines in one loop, A B A B, so that what disturbs the machine disturbs all of them.

    Warm-up: at least ``warmup`` rounds (a round is one call of every session), then on until the
    median of every session's last 10 calls is within 5 % of that of the 10 before, by the host's
    clock and by the GPU's, at most 5 × ``warmup`` rounds. Python's garbage collector is off
    meanwhile.

    A session that has ``timed(images) -> (logits, CallTimes)`` is timed by its CUDA events too.
    They are recorded in every call; reading them adds some microseconds to the host's figure. Of
    a session on a GPU, NVML's readings are kept (see :mod:`cswap_deploy.measure.gpu`).

    Args:
        sessions: Name -> loaded engine.
        images: (B, C, H, W) float32, the batch that every call gets. Real ones: a GPU draws less
            power on zeros, and so clocks higher.
        runs: Timed calls of each session.
        warmup: Smallest number of warm-up rounds.
        data: What the images are, for the record.

    Returns:
        For each name the samples (milliseconds, in the order taken), their percentiles (linear
        interpolation), the warm-up rounds really run, and under ``settings`` how it was measured.
    """
    if runs < 1 or warmup < 0:
        raise ValueError(f"runs must be 1 or more and warmup 0 or more: {runs}, {warmup}")
    batch = np.ascontiguousarray(images, dtype=np.float32)
    calls = {name: _call(session) for name, session in sessions.items()}
    warm = {name: _Times() for name in sessions}
    times = {name: _Times() for name in sessions}

    def untimed() -> None:
        for session in sessions.values():
            session.run(batch)

    on_gpu = any(_on_gpu(session) for session in sessions.values())
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with GpuMonitor() if on_gpu else nullcontext() as gpu:
            rounds = 0
            while rounds < warmup or (
                rounds < WARMUP_LIMIT * warmup and not all(t.settled() for t in warm.values())
            ):
                _round(calls, batch, warm)
                rounds += 1
            for _ in range(runs):
                if gpu is not None:
                    gpu.between(untimed)
                _round(calls, batch, times)
            if gpu is not None:
                gpu.sample(untimed)
    finally:
        if collecting:
            gc.enable()
    state = None if gpu is None else gpu.state()
    common = {
        "batch": len(batch), "shape": list(batch.shape), "data": data, "runs": runs,
        "warmup_asked": warmup, "warmup": rounds, "interleaved": list(sessions),
    }  # fmt: skip
    return {
        name: _summarise(
            times[name],
            session,
            settings=common | {"warmup_ms": round(sum(warm[name].host), 3)} | _ways(session),
            gpu=state if _on_gpu(session) else None,
        )
        for name, session in sessions.items()
    }


def sweep(
    load: Callable[[bool], Mapping[str, Session]],
    *,
    images: Images,
    runs: int,
    warmup: int = 20,
    batches: tuple[int, ...] = (1, 8, 64),
    graphs: tuple[bool, ...] = (False, True),
    data: str = "real images",
) -> dict[tuple[int, bool], dict[str, Latency]]:
    """Time engines at several batch sizes, with and without CUDA graphs.

    Args:
        load: Given whether to replay a CUDA graph, loads the engines that are timed in one loop.
            They are closed afterwards, where they can be.
        images: (N, C, H, W) float32; the batches are its first images, repeated where N is less.
        runs: Timed calls of each session at each point.
        warmup: Smallest number of warm-up rounds at each point.
        batches: Batch sizes (samples); those outside the profile of one of the engines are left
            out.
        graphs: ``(False,)`` for a runtime without CUDA graphs.
        data: What the images are, for the record.

    Returns:
        (batch, CUDA graph) -> name -> latency.

    Raises:
        ValueError: No batch is inside all profiles.
    """
    found = {}
    for graph in graphs:
        sessions = load(graph)
        try:
            low = max(getattr(s, "batch_min", 1) for s in sessions.values())
            high = min(getattr(s, "batch_max", max(batches)) for s in sessions.values())
            inside = [size for size in batches if low <= size <= high]
            if not inside:
                raise ValueError(f"no batch of {batches} is inside the profile, {low} to {high}")
            for size in inside:
                rows = np.arange(size) % len(images)
                found[size, graph] = measure_latency(
                    sessions, images=images[rows], runs=runs, warmup=warmup, data=data
                )
        finally:
            for session in sessions.values():
                if hasattr(session, "close"):
                    session.close()
    return found


def _call(session: Session) -> Callable[[Images], CallTimes | None]:
    timed: Any = getattr(session, "timed", None)

    def by_the_host(images: Images) -> None:
        session.run(images)

    def by_events_too(images: Images) -> CallTimes:
        parts: CallTimes = timed(images)[1]
        return parts

    return by_the_host if timed is None else by_events_too


def _round(
    calls: Mapping[str, Callable[[Images], CallTimes | None]],
    images: Images,
    times: dict[str, _Times],
) -> None:
    for name, call in calls.items():
        start = time.perf_counter_ns()
        parts = call(images)
        end = time.perf_counter_ns()
        into = times[name]
        into.host.append((end - start) / 1e6)
        if parts is not None:
            into.to_device.append(parts.host_to_device)
            into.compute.append(parts.compute)
            into.from_device.append(parts.device_to_host)


def _settled(times: list[float]) -> bool:
    if len(times) < 2 * WINDOW:
        return False
    before = statistics.median(times[-2 * WINDOW : -WINDOW])
    now = statistics.median(times[-WINDOW:])
    return abs(now - before) <= SETTLED * before


def _on_gpu(session: Session) -> bool:
    return hasattr(session, "timed") or session.provider.startswith("CUDA")


def _ways(session: Session) -> dict[str, Any]:
    """How the session makes a call, by its own account."""
    ways = dict(getattr(session, "settings", {}))
    if hasattr(session, "timed"):
        ways["device_clock"] = "CUDA events"
    elif _on_gpu(session):
        ways["device_clock"] = "none: this runtime's sessions record no CUDA events"
    return ways


def _summarise(
    times: _Times, session: Session, *, settings: dict[str, Any], gpu: GpuState | None
) -> Latency:
    p50, p90, p99 = _percentiles(times.host)
    return Latency(
        batch=settings["batch"],
        samples_ms=tuple(times.host),
        warmup=settings["warmup"],
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=float(np.mean(times.host)),
        threads=session.threads,
        provider=session.provider,
        device=_device_times(times) if times.compute else None,
        gpu=gpu,
        settings=settings,
    )


def _device_times(times: _Times) -> DeviceTimes:
    p50, p90, p99 = _percentiles(times.compute)
    return DeviceTimes(
        host_to_device_ms=tuple(times.to_device),
        compute_ms=tuple(times.compute),
        device_to_host_ms=tuple(times.from_device),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=float(np.mean(times.compute)),
        host_to_device_p50_ms=float(np.median(times.to_device)),
        device_to_host_p50_ms=float(np.median(times.from_device)),
    )


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    p50, p90, p99 = (float(value) for value in np.percentile(times, _PERCENTILES))
    return p50, p90, p99
