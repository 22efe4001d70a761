"""Stand-ins for hardware that is absent here: a session with CUDA events, and NVML."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cswap_deploy.measure import gpu
from cswap_deploy.runtime.session import CallTimes, Session

PCI = "0000:3B:00.0"


class FakeGpuSession(Session):
    """Stands in for an engine on a GPU: its events tell what the script says (milliseconds)."""

    threads = 1
    provider = "tensorrt 10.16.1.11, NVIDIA L4 (sm 8.9)"
    batch_min, batch_max = 1, 8
    on_gpu = True

    def __init__(self, compute: list[float] | None = None, *, cuda_graph: bool = False) -> None:
        self.script = compute or [2.0]
        self.settings: dict[str, Any] = {
            "input": "input", "streams": 1, "cuda_graph": cuda_graph, "transfers": True,
            "host_memory": "pinned", "synchronisation": "automatic",
        }  # fmt: skip
        self.timed_calls = self.untimed_calls = 0
        self.batches: list[int] = []
        self.closed = False

    def run(self, images: np.ndarray) -> np.ndarray:
        self.untimed_calls += 1
        return images.reshape(len(images), -1)[:, :3]

    def timed(self, images: np.ndarray) -> tuple[np.ndarray, CallTimes]:
        compute = self.script[min(self.timed_calls, len(self.script) - 1)]
        self.timed_calls += 1
        self.batches.append(len(images))
        return images.reshape(len(images), -1)[:, :3], CallTimes(0.25, compute, 0.125)

    def close(self) -> None:
        self.closed = True


class FakeNvmlError(Exception):
    """As ``pynvml.NVMLError``."""


class FakeNvml(ModuleType):
    """Stands in for ``pynvml`` on a machine with two GPUs; the second one is CUDA's device 0."""

    NVMLError = FakeNvmlError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NAMES = {"0000:17:00.0": "NVIDIA A2", PCI: "NVIDIA L4"}  # noqa: RUF012

    def __init__(self, *, refuse: tuple[str, ...] = (), lacks: tuple[str, ...] = ()) -> None:
        """``refuse``: functions that raise; ``lacks``: those of another version."""
        super().__init__("pynvml")
        self.refuse, self.lacks = refuse, lacks
        self.asked: list[str] = []
        self.power = iter([60_000, 72_500, *[70_000] * 10_000])
        self.answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetHandleByPciBusId": self.handle,
            "nvmlDeviceGetName": self.NAMES.__getitem__,
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
            "nvmlSystemGetDriverVersion": lambda: "570.124.06",
            "nvmlDeviceGetPersistenceMode": lambda handle: 1,
            "nvmlDeviceGetComputeMode": lambda handle: 3,
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 2040}[kind],
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 72_000,
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1740, 2: 6251}[kind],
            "nvmlDeviceGetPowerUsage": lambda handle: next(self.power),
            "nvmlDeviceGetTemperatureV": lambda handle, sensor: 61,
            "nvmlDeviceGetTemperature": lambda handle, sensor: 60,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x24,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x40,
        }

    def handle(self, bus: str) -> str:
        if bus not in self.NAMES:
            raise FakeNvmlError("Not Found")
        return bus

    def __getattr__(self, name: str) -> Any:
        if name in self.lacks or name not in self.answers:
            raise AttributeError(name)

        def ask(*arguments: Any) -> Any:
            self.asked.append(name)
            if name in self.refuse:
                raise FakeNvmlError("Not Supported")
            return self.answers[name](*arguments)

        return ask


def plant(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, *, bus: str = PCI) -> FakeNvml:
    """Let the monitor find this NVML, and CUDA's device 0 at this address."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu, "cuda_pci_bus_id", lambda device: bus)
    return nvml
