"""The device's cores, and whether its GPU works."""

from __future__ import annotations

import ctypes
import os


def usable_cores() -> int:
    """Cores that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
