"""Latency of loaded engines: interleaved, raw samples kept, by the host's clock and the GPU's."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cswap_deploy.measure.gpu import GpuMonitor
from cswap_deploy.records.measurements import DeviceTimes, GpuState, Latency
from cswap_deploy.runtime.session import CallTimes, Floats, Session

WINDOW = 10
"""Rounds whose medians are compared to decide that a session is warm."""
SETTLED = 0.05
"""Largest relative change of that median in a warm session."""
WARMUP_LIMIT = 5
"""Warm-up ends at this many times the requested rounds, warm or not."""


@dataclass(slots=True)
class _Times:
    """What one session's calls took (milliseconds)."""

    host: list[float] = field(default_factory=list)
    to_device: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    from_device: list[float] = field(default_factory=list)

    def add(self, host: float, parts: CallTimes | None) -> None:
        self.host.append(host)
        if parts is not None:
            self.to_device.append(parts.host_to_device)
            self.compute.append(parts.compute)
            self.from_device.append(parts.device_to_host)

    def settled(self) -> bool:
        return _settled(self.host) and (not self.compute or _settled(self.compute))


def measure_latency(
    sessions: Mapping[str, Session],
    *,
    images: Floats | Mapping[str, Floats],
    runs: int,
    warmup: int = 20,
    data: str = "real images",
    seconds: float | None = None,
) -> dict[str, Latency]:
    """Time engines in one loop, A B A B, so that what disturbs the machine disturbs all of them.

    Warm-up: at least ``warmup`` rounds (a round is one call of every session), then on until the
    median of every session's last 10 calls is within 5 % of that of the 10 before, by the host's
    clock and by the GPU's, at most 5 × ``warmup`` rounds. Python's garbage collector is off
    meanwhile.

    Sessions on a GPU are also timed by their CUDA events where they have some. These are recorded
    in every call; reading them adds some microseconds to the host's figure. NVML's readings of the
    GPU are kept (see :mod:`cswap_deploy.measure.gpu`).

    Args:
        sessions: Name -> loaded engine.
        images: (B, C, H, W) float32, the batch that every call gets, or each name's own, of one
            length. No zeros: a GPU draws less power on them, and so clocks higher.
        runs: Timed calls of each session, at least.
        warmup: Smallest number of warm-up rounds.
        data: What the images are, in words.
        seconds: Goes on until so many have passed, all calls together.

    Returns:
        For each name the samples (milliseconds, in the order taken), their percentiles (linear
        interpolation), the warm-up rounds really run, and under ``settings`` how it was measured.
    """
    if runs < 1 or warmup < 0:
        raise ValueError(f"runs must be 1 or more and warmup 0 or more: {runs}, {warmup}")
    given = images if isinstance(images, Mapping) else dict.fromkeys(sessions, images)
    batches = {name: np.ascontiguousarray(given[name], dtype=np.float32) for name in sessions}
    warm = {name: _Times() for name in sessions}
    times = {name: _Times() for name in sessions}

    def untimed() -> None:
        for name, session in sessions.items():
            session.run(batches[name])

    on_gpu = any(session.on_gpu for session in sessions.values())
    with no_collecting(), GpuMonitor() if on_gpu else nullcontext() as gpu:
        rounds = 0
        while rounds < warmup or (
            rounds < WARMUP_LIMIT * warmup and not all(t.settled() for t in warm.values())
        ):
            _round(sessions, batches, warm)
            rounds += 1
        ends = time.perf_counter() + (seconds or 0.0)
        done = 0
        while done < runs or (seconds is not None and time.perf_counter() < ends):
            if gpu is not None:
                gpu.between(untimed)
            _round(sessions, batches, times)
            done += 1
        if gpu is not None:
            gpu.sample(untimed)
    state = None if gpu is None else gpu.state()
    common = {
        "data": data, "runs": done, "warmup_asked": warmup, "warmup": rounds,
        "interleaved": list(sessions),
    }  # fmt: skip
    found = {}
    for name, session in sessions.items():
        shape = list(batches[name].shape)
        settings = common | {"batch": shape[0], "shape": shape}
        settings["warmup_ms"] = round(sum(warm[name].host), 3)
        gpu_state = state if session.on_gpu else None
        found[name] = _summarise(times[name], session, settings=settings, gpu=gpu_state)
    return found


@contextmanager
def no_collecting() -> Iterator[None]:
    """Without Python's garbage collector."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _round(
    sessions: Mapping[str, Session], images: Mapping[str, Floats], times: dict[str, _Times]
) -> None:
    for name, session in sessions.items():
        start = time.perf_counter_ns()
        parts = session.timed(images[name])[1]
        times[name].add((time.perf_counter_ns() - start) / 1e6, parts)


def _settled(times: list[float]) -> bool:
    if len(times) < 2 * WINDOW:
        return False
    before = statistics.median(times[-2 * WINDOW : -WINDOW])
    now = statistics.median(times[-WINDOW:])
    return abs(now - before) <= SETTLED * before


def _summarise(
    times: _Times, session: Session, *, settings: dict[str, Any], gpu: GpuState | None
) -> Latency:
    settings = settings | dict(session.settings)
    if times.compute:
        settings["device_clock"] = "CUDA events"
    elif session.on_gpu:
        settings["device_clock"] = "none: this runtime's sessions record no CUDA events"
    return Latency(
        batch=settings["batch"], samples_ms=tuple(times.host), warmup=settings["warmup"],
        **_percentiles(times.host), threads=session.threads, provider=session.provider,
        device=_device_times(times) if times.compute else None, gpu=gpu, settings=settings,
    )  # fmt: skip


def _device_times(times: _Times) -> DeviceTimes:
    return DeviceTimes(
        host_to_device_ms=tuple(times.to_device),
        compute_ms=tuple(times.compute),
        device_to_host_ms=tuple(times.from_device),
        **_percentiles(times.compute),
        host_to_device_p50_ms=float(np.median(times.to_device)),
        device_to_host_p50_ms=float(np.median(times.from_device)),
    )


def _percentiles(times: list[float]) -> dict[str, Any]:
    """With the mean, as the records name them."""
    p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": float(np.mean(times))}
