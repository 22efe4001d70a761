"""The machine that a measurement is taken on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from cswap_deploy.records.measurements import Device
from cswap_deploy.runtime.host import usable_cores


def describe_device() -> Device:
    """The processor, the cores this process may use, the machine's memory and NVIDIA GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        cpu=_cpu_model(), cores=usable_cores(), memory_mib=memory // 2**20, gpus=list_gpus(),
        platform=platform.platform(),
    )  # fmt: skip


def list_gpus() -> tuple[str, ...]:
    """Name, driver and memory of each NVIDIA GPU, by ``nvidia-smi``; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if answer.returncode != 0:
        return ()
    rows = (map(str.strip, line.rsplit(",", 2)) for line in answer.stdout.splitlines())
    return tuple(f"{name} (driver {driver}, {memory})" for name, driver, memory in rows)


def _cpu_model() -> str:
    """The processor's name; on boards whose ``/proc/cpuinfo`` has none, the board's."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
        return Path("/proc/device-tree/model").read_text().strip("\0 \n")
    except OSError:
        return platform.processor() or platform.machine()
