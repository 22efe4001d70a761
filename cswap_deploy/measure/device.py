"""The machine that a measurement is taken on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from cswap_deploy.records.measurements import Device
from cswap_deploy.runtime.host import usable_cores


def describe_device() -> Device:
    """The processor, the cores this process may use, the memory and the NVIDIA GPUs.

    Returns:
        ``memory_mib`` is what the machine has, not what a container is granted; ``gpus`` is empty
        where ``nvidia-smi`` is absent or finds no driver.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        cpu=_cpu_model(),
        cores=usable_cores(),
        memory_mib=memory // 2**20,
        gpus=list_gpus(),
        platform=platform.platform(),
    )


def list_gpus() -> tuple[str, ...]:
    """Name, driver and memory of each NVIDIA GPU, by ``nvidia-smi``; empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if answer.returncode != 0:
        return ()
    gpus = []
    for line in answer.stdout.splitlines():
        name, driver, memory = (part.strip() for part in line.rsplit(",", 2))
        gpus.append(f"{name} (driver {driver}, {memory})")
    return tuple(gpus)


def _cpu_model() -> str:
    """The processor's name; on boards whose ``/proc/cpuinfo`` has none, the board's."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
        return Path("/proc/device-tree/model").read_text().strip("\0 \n")
    except OSError:
        return platform.processor() or platform.machine()
