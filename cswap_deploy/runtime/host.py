"""The device's cores, and whether its GPU works."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may use: those it may be scheduled on, within its CPU quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(cores, _cpu_quota())))


def _cpu_quota(groups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores of a container's CPU quota; infinite where there is none.

    Source:
        Linux kernel documentation, "Control Group v2", ``cpu.max``: the quota and its period.
    """
    try:
        inner = own.read_text().rpartition("::/")[2].strip()
        words = [(groups / at / "cpu.max").read_text().split() for at in {"", inner}]
    except OSError:  # not Linux, an older kernel, or a group that is not shown here
        return math.inf
    return min(math.inf if quota == "max" else int(quota) / int(period) for quota, period in words)


def share_cores() -> None:
    """Let what computes with OpenMP in this process leave cores to others while it waits.

    Threads that spin while they wait take the time of whoever has work: two builds on two cores
    then run five to ten times slower than one after the other. To be called before torch is
    loaded; what the user has set stays.

    Source:
        OpenMP 5.2 specification, environment variables ``OMP_WAIT_POLICY``, ``OMP_NUM_THREADS``.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def cuda_problem() -> str:
    """Why no CUDA work can run here, in the driver's words; empty where it can.

    Source:
        CUDA driver API: ``cuInit``, ``cuDeviceGetCount``, ``cuGetErrorString``.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as err:
        return f"no NVIDIA driver: {err}"
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        words = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(words))
        return f"the NVIDIA driver does not start: {(words.value or b'').decode()} ({status})"
    return "" if count.value else "the NVIDIA driver finds no GPU"


def compute_capability(device: int = 0) -> str:
    """A GPU's compute capability, for example ``8.9``; empty where no GPU works.

    Source:
        CUDA driver API: ``cuDeviceGetAttribute``, attributes 75 and 76.
    """
    if cuda_problem():
        return ""
    driver = ctypes.CDLL("libcuda.so.1")
    numbers = [ctypes.c_int(0), ctypes.c_int(0)]
    for attribute, number in zip((75, 76), numbers, strict=True):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return ".".join(str(number.value) for number in numbers)
