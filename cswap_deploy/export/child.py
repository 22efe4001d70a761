"""Native code that may crash, hang or eat memory, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from cswap_deploy.config import ExportConfig

# The first lines of a child: what it may take, and that it ends when this process does.
_PRELUDE = """
import ctypes, os, resource, signal, sys
parent, memory = int(sys.argv.pop(1)), int(sys.argv.pop(1))
if hasattr(ctypes.CDLL(None), "prctl"):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    sys.exit("the process that wanted this is gone")
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
memory = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
"""
NO_MEMORY = ("MemoryError", "bad_alloc", "failed to map segment", "Cannot allocate memory")
"""How Python and native code say that there is none."""


@dataclass(frozen=True, slots=True)
class ChildLimits:
    """What a child may take."""

    seconds: float | None
    """As long as it takes, where it is ``None``."""
    memory_bytes: int | None = None
    """Of address space; as much as this machine has memory unless said."""

    @classmethod
    def of(cls, config: ExportConfig) -> ChildLimits:
        """Those of a build."""
        return cls(config.child_seconds, config.child_memory)

    @property
    def memory(self) -> int:
        """In bytes."""
        return self.memory_bytes or int(psutil.virtual_memory().total)


UNLIMITED = ChildLimits(seconds=None)


def run_child(code: str, arguments: Sequence[object], limits: ChildLimits) -> str:
    """Run Python code with texts as ``sys.argv[1:]``.

    Returns:
        Why it failed, in a line; empty where it did not.
    """
    command = [
        # -P: a module of the same name in the working directory is not what is meant.
        sys.executable, "-P", "-c", _PRELUDE + code, str(os.getpid()), str(limits.memory),
        *map(str, arguments),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False,
            timeout=limits.seconds,
            # onnxruntime else writes a usage database into the home folder.
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it did not end within {limits.seconds:g} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    if any(words in line for line in lines for words in NO_MEMORY):
        return f"it needs more than {limits.memory / 2**20:,.0f} MiB of memory"
    if done.returncode < 0:
        return f"it crashed ({signal.Signals(-done.returncode).name})"
    return lines[-1] if lines else f"it ended with {done.returncode}"
