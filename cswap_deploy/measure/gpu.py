"""The GPU while it is timed: clocks, power, temperature, and what holds the clocks down.

Asking NVML takes a few milliseconds. Done during a timed call it would lengthen that call, since a
second thread holds the interpreter when the first wants to go on; done while nothing runs it would
show a GPU that is going to sleep. So the timing loop stops, a thread takes the sample, and untimed
calls keep the GPU as busy as it is being measured until the thread is done.
"""

from __future__ import annotations

import ctypes
import importlib
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, Self

from cswap_deploy.errors import missing
from cswap_deploy.records.measurements import GpuState, Spread
from cswap_deploy.runtime.host import cuda_problem

INTERVAL = 0.1
"""Seconds between samples; more where a sample takes over a tenth of that."""
_JETSON = Path("/etc/nv_tegra_release")
_REASONS = {
    0x1: "GPU idle",
    0x2: "application clocks",
    0x4: "power cap (software)",
    0x8: "slowdown (hardware)",
    0x10: "sync boost",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake (hardware)",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
"""Bits of NVML's mask: ``nvmlClocksEventReason…``, before driver 535 ``nvmlClocksThrottleReason…``;
``nvml.h`` says what each means."""
_COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}


class GpuMonitor:
    """Samples the GPU that CUDA calls device 0; whatever NVML does not tell becomes a note.

    Source:
        NVML API reference; the package ``nvidia-ml-py``.
    """

    def __init__(self, *, interval: float = INTERVAL) -> None:
        """Ask nothing yet; ``interval`` is the shortest time between samples (seconds)."""
        self._interval = interval
        self._nvml: Any = None
        self._handle: Any = None
        self._facts: dict[str, Any] = {}
        self._readings: dict[str, list[float]] = {}
        self._throttling: Counter[str] | None = None
        self._notes: dict[str, str] = {}
        self._samples = 0
        self._due = 0.0

    def __enter__(self) -> Self:
        """Find the GPU."""
        if problem := self._find():
            self._note("GPU state", problem)
        return self

    def _find(self) -> str:
        """Why there is no asking; empty once the GPU is found and described."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as err:
            state = str(missing("pynvml", "gpu", err)).splitlines()[0]
            return f"{state}; fix: pip install nvidia-ml-py"
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as err:
            jetson = "; Jetson boards have none, tegrastats tells the same"
            return f"NVML does not start: {err}{jetson if _JETSON.exists() else ''}"
        self._nvml = nvml
        bus = cuda_pci_bus_id(0)
        if not bus:
            return cuda_problem() or "CUDA does not tell the PCI address of device 0"
        try:
            # NVML counts all GPUs of the machine by their slots, CUDA the visible ones.
            self._handle = nvml.nvmlDeviceGetHandleByPciBusId(bus)
        except nvml.NVMLError as err:
            return f"NVML does not know the GPU at {bus}: {err}"
        self._describe(bus)
        return ""

    def __exit__(self, *_: object) -> None:
        """Let NVML go."""
        self._handle = None
        if self._nvml is not None:
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError as err:
                self._note("shutdown", str(err))

    def between(self, work: Callable[[], object]) -> None:
        """Take a sample if one is due; called between timed calls."""
        if self._handle is not None and time.perf_counter() >= self._due:
            self.sample(work)

    def sample(self, work: Callable[[], object]) -> None:
        """Take a sample now; ``work``, called again and again, keeps the GPU busy meanwhile."""
        if self._handle is None:
            return
        start = time.perf_counter()
        reader = Thread(target=self._read, name="nvml")
        reader.start()
        try:
            while reader.is_alive():
                work()
        finally:
            reader.join()
        end = time.perf_counter()
        self._due = end + max(self._interval, 9 * (end - start))

    def state(self) -> GpuState:
        """What was found so far."""
        readings = {
            name: Spread(min=min(values), median=statistics.median(values), max=max(values))
            for name, values in self._readings.items()
        }
        return GpuState(
            **self._facts | readings,
            samples=self._samples,
            throttling=None if self._throttling is None else dict(self._throttling),
            notes=tuple(self._notes.values()),
        )

    def _describe(self, bus: str) -> None:
        """What does not change while it is timed."""
        gpu, clock = (self._handle,), (self._handle, self._nvml.NVML_CLOCK_SM)
        told = {
            "name": self._ask("name", "nvmlDeviceGetName", gpu),
            "uuid": self._ask("UUID", "nvmlDeviceGetUUID", gpu),
            "driver": self._ask("driver version", "nvmlSystemGetDriverVersion", ()),
            "persistence_mode": self._ask("persistence mode", "nvmlDeviceGetPersistenceMode", gpu),
            "compute_mode": self._ask("compute mode", "nvmlDeviceGetComputeMode", gpu),
            "sm_clock_max_mhz": self._ask("highest SM clock", "nvmlDeviceGetMaxClockInfo", clock),
            "power_limit_w": self._ask("power limit", "nvmlDeviceGetEnforcedPowerLimit", gpu),
        }
        known = {name: _converted(name, value) for name, value in told.items() if value is not None}
        self._facts = {"pci_bus_id": bus, **known}

    def _read(self) -> None:
        """One sample, in the thread."""
        nvml, handle = self._nvml, self._handle
        sm, memory = (handle, nvml.NVML_CLOCK_SM), (handle, nvml.NVML_CLOCK_MEM)
        sensor = (handle, nvml.NVML_TEMPERATURE_GPU)
        told = {
            "sm_clock_mhz": self._ask("SM clock", "nvmlDeviceGetClockInfo", sm),
            "memory_clock_mhz": self._ask("memory clock", "nvmlDeviceGetClockInfo", memory),
            "power_w": self._ask("power", "nvmlDeviceGetPowerUsage", (handle,)),
            "temperature_c": self._ask(
                "temperature", "nvmlDeviceGetTemperatureV", sensor, "nvmlDeviceGetTemperature"
            ),
        }
        for name, value in told.items():
            if value is not None:
                self._readings.setdefault(name, []).append(float(_converted(name, value)))
        mask = self._ask(
            "throttle reasons", "nvmlDeviceGetCurrentClocksEventReasons", (handle,),
            "nvmlDeviceGetCurrentClocksThrottleReasons",
        )  # fmt: skip
        if mask is not None:
            self._throttling = self._throttling or Counter()
            self._throttling.update(throttle_reasons(mask))
        self._samples += 1

    def _ask(self, what: str, function: str, arguments: tuple[Any, ...], older: str = "") -> Any:
        """The function's answer, or the older one's: newer packages and drivers rename some."""
        names = [function, older] if older else [function]
        words = f"this nvidia-ml-py has no {' or '.join(names)}"
        for name in names:
            found = getattr(self._nvml, name, None)
            if found is None:
                continue
            try:
                return found(*arguments)
            except self._nvml.NVMLError as err:
                words = str(err)
        self._note(what, words)
        return None

    def _note(self, what: str, words: str) -> None:
        self._notes.setdefault(what, f"{what} not known: {words}")


def throttle_reasons(mask: int) -> tuple[str, ...]:
    """What holds the clocks down, by NVML's bit mask; a bit without a name is shown as it is."""
    bits = [1 << k for k in range(mask.bit_length()) if mask >> k & 1]
    return tuple(_REASONS.get(bit, f"bit {bit:#x}") for bit in bits)


def cuda_pci_bus_id(device: int = 0) -> str:
    """Where CUDA's GPU of this number sits, for example ``0000:3B:00.0``; empty without one.

    Source:
        CUDA driver API: ``cuDeviceGet``, ``cuDeviceGetPCIBusId``.
    """
    if cuda_problem():
        return ""
    driver = ctypes.CDLL("libcuda.so.1")
    handle, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    status = driver.cuDeviceGet(ctypes.byref(handle), device) or driver.cuDeviceGetPCIBusId(
        text, len(text), handle
    )
    return "" if status else text.value.decode()


def _converted(name: str, told: Any) -> Any:
    """What NVML told, as :class:`GpuState` has it."""
    if name == "persistence_mode":
        return bool(told)
    if name == "compute_mode":
        return _COMPUTE_MODES.get(told, f"mode {told}")
    return told / 1000 if name in ("power_limit_w", "power_w") else told  # milliwatts
