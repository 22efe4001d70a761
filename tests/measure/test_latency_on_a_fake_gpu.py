"""Latency of a session with CUDA events. No GPU is here: session and NVML are stand-ins."""

from __future__ import annotations

import gc
import json
import sys

import numpy as np
import pytest
from gpu_stand_ins import FakeGpuSession, FakeNvml, plant

from cswap_deploy.errors import StageError
from cswap_deploy.measure.latency import WARMUP_LIMIT, measure_latency
from cswap_deploy.records.manifest import TargetResult
from cswap_deploy.records.measurements import Latency
from cswap_deploy.runtime.session import Session


def images(count: int = 2) -> np.ndarray:
    return np.arange(count * 12, dtype=np.float32).reshape(count, 3, 2, 2)


class HostSession(Session):
    """A session without events, as ONNX Runtime's."""

    threads = 1

    def __init__(self, *, on_gpu: bool) -> None:
        self.provider, self.on_gpu = "host", on_gpu

    def run(self, batch: np.ndarray) -> np.ndarray:
        return batch.reshape(len(batch), -1)[:, :3]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return plant(monkeypatch, FakeNvml())


def test_device_samples_are_kept_and_reduced(nvml: FakeNvml) -> None:
    """Times that grow by 1 ms a call never settle: exactly 100 rounds of warm-up."""
    session = FakeGpuSession([float(k) for k in range(1, 201)])
    latency = measure_latency({"pruned": session}, images=images(), runs=100, warmup=20)["pruned"]
    device = latency.device
    assert device is not None
    assert device.compute_ms == tuple(float(k) for k in range(101, 201))
    assert (device.p50_ms, device.p90_ms, device.p99_ms) == pytest.approx((150.5, 190.1, 199.01))
    assert device.mean_ms == pytest.approx(150.5)
    assert device.host_to_device_ms == (0.25,) * 100
    assert device.device_to_host_ms == (0.125,) * 100
    assert (device.host_to_device_p50_ms, device.device_to_host_p50_ms) == (0.25, 0.125)
    assert device.clock == "CUDA events"


def test_the_headline_is_the_hosts_clock(nvml: FakeNvml) -> None:
    latency = measure_latency({"a": FakeGpuSession()}, images=images(), runs=30)["a"]
    assert latency.clock == "host wall clock"
    assert len(latency.samples_ms) == 30
    assert latency.p50_ms == pytest.approx(float(np.percentile(latency.samples_ms, 50)))
    assert latency.p50_ms != latency.device.p50_ms  # type: ignore[union-attr]


def test_warm_up_waits_for_the_gpus_own_times(nvml: FakeNvml) -> None:
    """The host's times stand still; the GPU's halve after 40 calls, as clocks rise."""
    ramp = [4.0 - 0.05 * k for k in range(40)]
    session = FakeGpuSession([*ramp, 2.0])
    latency = measure_latency({"a": session}, images=images(), runs=5, warmup=20)["a"]
    assert latency.warmup >= 40
    never = FakeGpuSession([4.0 * 0.97**k for k in range(1000)])
    assert measure_latency({"a": never}, images=images(), runs=5, warmup=20)["a"].warmup == 100


def test_calls_alternate_and_nvml_is_asked_between_rounds(nvml: FakeNvml) -> None:
    """Before the first timed round, after the last, never inside a call."""
    order: list[str] = []

    class Recorder(FakeGpuSession):
        def timed(self, batch: np.ndarray):  # type: ignore[no-untyped-def]
            assert not gc.isenabled()
            before = len(nvml.asked)
            answer = super().timed(batch)
            assert len(nvml.asked) == before
            order.append("dense" if self is dense else "pruned")
            return answer

    dense, pruned = Recorder(), Recorder()
    found = measure_latency({"dense": dense, "pruned": pruned}, images=images(), runs=50)
    assert order == ["dense", "pruned"] * (len(order) // 2)
    warmup = found["dense"].warmup
    assert len(order) == 2 * (50 + warmup)
    assert 20 <= warmup <= 20 * WARMUP_LIMIT
    for latency in found.values():
        assert latency.gpu is not None
        assert latency.gpu.samples >= 2
        assert latency.gpu.throttling == {
            "power cap (software)": latency.gpu.samples,
            "temperature (software)": latency.gpu.samples,
        }
    assert dense.untimed_calls == pruned.untimed_calls
    assert gc.isenabled()


def test_how_it_was_measured_is_recorded(nvml: FakeNvml) -> None:
    session = FakeGpuSession(cuda_graph=True)
    latency = measure_latency({"a": session}, images=images(), runs=7, warmup=3)["a"]
    told = dict(latency.settings)
    assert told.pop("warmup_ms") > 0
    assert told == {
        "batch": 2,
        "shape": [2, 3, 2, 2],
        "data": "real images",
        "runs": 7,
        "warmup_asked": 3,
        "warmup": latency.warmup,
        "interleaved": ["a"],
        "input": "input",
        "streams": 1,
        "cuda_graph": True,
        "transfers": True,
        "host_memory": "pinned",
        "synchronisation": "automatic",
        "device_clock": "CUDA events",
    }


def test_onnxruntime_on_cuda_has_host_times_only(nvml: FakeNvml) -> None:
    cuda = measure_latency({"a": HostSession(on_gpu=True)}, images=images(), runs=5)
    assert cuda["a"].device is None
    assert cuda["a"].gpu is not None
    assert cuda["a"].gpu.name == "NVIDIA L4"
    assert cuda["a"].settings["device_clock"] == (
        "none: this runtime's sessions record no CUDA events"
    )


def test_a_cpu_session_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = plant(monkeypatch, FakeNvml())
    cpu = measure_latency({"a": HostSession(on_gpu=False)}, images=images(), runs=5)
    assert (cpu["a"].device, cpu["a"].gpu, nvml.asked) == (None, None, [])
    assert "device_clock" not in cpu["a"].settings


def test_without_nvml_it_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    session = FakeGpuSession()
    latency = measure_latency({"a": session}, images=images(), runs=5)["a"]
    assert latency.device is not None
    assert latency.gpu is not None
    assert "pip install nvidia-ml-py" in latency.gpu.notes[0]
    assert session.untimed_calls == 0


def test_a_manifest_of_an_older_version_still_reads(nvml: FakeNvml) -> None:
    latency = measure_latency({"a": FakeGpuSession()}, images=images(), runs=5)["a"]
    assert Latency.model_validate_json(latency.canonical_json()) == latency
    older = json.loads(latency.canonical_json())
    for name in ("clock", "device", "gpu", "settings"):
        del older[name]
    read = Latency.model_validate(older)
    assert read.samples_ms == latency.samples_ms
    assert (read.clock, read.device, read.gpu, read.settings) == ("host wall clock", None, None, {})
    assert TargetResult.model_fields["latency"].annotation == Latency | None


def test_a_refused_call_ends_it(nvml: FakeNvml) -> None:
    class Failing(FakeGpuSession):
        def timed(self, batch: np.ndarray):  # type: ignore[no-untyped-def]
            raise StageError("refused")

    with pytest.raises(StageError, match="refused"):
        measure_latency({"a": Failing()}, images=images(), runs=3)
    assert gc.isenabled()
    assert nvml.asked[-1] == "nvmlShutdown"
