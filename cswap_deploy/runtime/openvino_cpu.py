"""OpenVINO on the CPU: the package, its core, and how graphs are compiled for latency."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from typing import Any, cast

from cswap_deploy.errors import missing
from cswap_deploy.runtime.host import usable_cores


def import_openvino() -> Any:
    """The package, with its telemetry off; :class:`MissingDependencyError` without it."""
    return import_quietly("openvino")


@functools.cache
def openvino_core() -> Any:
    """One for the process, kept.

    Each brings a CPU plugin that gives the thread a signal stack and puts the former one back when
    it goes. Two that go in the order they came leave one that is freed, and the next signal,
    Ctrl-C for one, ends the process (OpenVINO 2026.4). NNCF's own come and go in pairs.
    """
    return import_openvino().Core()


def cpu_options(threads: int | None) -> dict[str, Any]:
    """How a graph is compiled; threads are at most the process's cores.

    Source:
        OpenVINO documentation, "CPU Device", "Precision Control", "Performance Hints".
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads or usable_cores(),
        # A thread that may not leave a busy core makes all wait: two threads, one of two cores
        # busy, ResNet-20 at 28 px: 7.3 ms against 2.5 ms; on idle cores the same.
        "ENABLE_CPU_PINNING": False,
    }


def import_quietly(module: str) -> Any:
    """One of OpenVINO's packages, without what their imports do to the process and the user.

    Both send usage data unless a file in the user's home forbids it, and leave an identifier there.
    They do without where ``openvino_telemetry`` is not installed, which is how it looks to them
    here. NNCF also makes its own class that of every logger made later.
    """
    cast("dict[str, Any]", sys.modules)["openvino_telemetry"] = None
    loggers = logging.getLoggerClass()
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise missing(module, "openvino", err) from err
    finally:
        logging.setLoggerClass(loggers)
