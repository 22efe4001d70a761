"""Times a kit of graphs on a device: ``cswap-run --profile KIT -o device.json``."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.runtime.bundle import read_verified
from cswap_deploy.runtime.documents import parse, read_regular
from cswap_deploy.runtime.host import compute_capability, usable_cores
from cswap_deploy.runtime.node_times import (
    Graph,
    GraphNode,
    GraphTimes,
    time_in_onnxruntime,
    time_in_openvino,
)
from cswap_deploy.runtime.onnx_session import import_onnxruntime
from cswap_deploy.runtime.openvino_cpu import import_openvino
from cswap_deploy.runtime.tensorrt_session import MODULES, import_tensorrt
from cswap_deploy.runtime.tensorrt_times import time_in_tensorrt

KIT = "kit.json"
TIMERS: dict[str, Callable[..., list[GraphTimes]]] = {
    "onnxruntime": time_in_onnxruntime, "openvino": time_in_openvino,
    **{target: partial(time_in_tensorrt, target=target) for target in MODULES},
}  # fmt: skip
"""Runtime -> what times its nodes."""
_PACKAGES: dict[str, Callable[[], Any]] = {
    "onnxruntime": import_onnxruntime, "openvino": import_openvino,
    **{target: partial(import_tensorrt, *names) for target, names in MODULES.items()},
}  # fmt: skip
_RUNS = 100
_MOST_BYTES = 64 << 20
"""Of ``kit.json``."""
_MOST_VALUES = 2**28
"""Of the input: a GiB."""


def profile(folder: Path, *, target: str, threads: int | None) -> dict[str, Any]:
    """Time the graphs of a kit and their nodes, in turn.

    Args:
        folder: What ``cswap-deploy profile-kit`` left.
        target: ``onnxruntime`` or ``openvino`` on the CPU, ``tensorrt`` or ``tensorrt-rtx`` on the
            GPU.
        threads: Of the runtime; the process's cores unless given.

    Returns:
        Plain data, as ``records.latency.LatencyTable`` reads it.

    Raises:
        UsageError: The runtime has no profiler that is known here.
        MissingDependencyError: The runtime is not installed.
        ArtifactError: The kit is damaged.
    """
    if target not in TIMERS:
        raise UsageError(
            f"nodes cannot be timed in {target}", fix=f"--target {' or --target '.join(TIMERS)}"
        )
    package = _PACKAGES[target]()
    kit = _read(folder)
    try:
        graphs = [
            Graph(
                _inside(folder, each), [GraphNode(*node) for node in each["nodes"]],
                {str(k): [int(n) for n in v] for k, v in each["shapes"].items()},
            )
            for each in kit["graphs"]
        ]  # fmt: skip
        widths = [dict(each["widths"]) for each in kit["graphs"]]
        shape = (int(kit["batch"]), *map(int, kit["input_size"]))
        if min(shape) < 1 or math.prod(shape) > _MOST_VALUES:
            raise ValueError(f"inputs of shape {shape}")
        model = str(kit["model"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as err:
        raise _damaged(folder, f"{type(err).__name__}: {err}") from err
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    times = TIMERS[target](graphs, images, threads=threads, runs=_RUNS)
    device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if target in MODULES:
        device += f", GPU of compute capability {compute_capability()}"
    return {
        "schema_version": 1, "model": model,
        "runtime": f"{target} {package.__version__}",
        "device": device,
        "threads": threads or usable_cores(), "batch": shape[0],
        "graphs": [
            {"widths": left, "nodes": [list(node) for node in found.nodes], "ms": found.ms}
            for left, found in zip(widths, times)  # noqa: B905 Python 3.9 has no strict
        ],
    }  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    path = folder / KIT
    if not path.exists():
        raise ArtifactError(
            f"{folder} is no kit: it has no {KIT}",
            fix="`cswap-deploy profile-kit MODEL -o KIT` makes one",
        )
    try:
        kit = parse(read_regular(path, within=folder, most=_MOST_BYTES))
    except (OSError, ValueError) as err:
        raise _damaged(folder, str(err)) from err
    if not isinstance(kit, dict) or kit.get("schema_version") != 1:
        raise _damaged(folder, "not of schema version 1")
    return kit


def _inside(folder: Path, graph: dict[str, Any]) -> Path:
    """A graph's file, of the digest that the kit has."""
    name = str(graph["file"])
    if name != os.path.basename(name) or "\0" in name:
        raise _damaged(folder, f"{name!r} is outside")
    read_verified(folder / name, str(graph["sha256"]), fix="copy the kit again", within=folder)
    return folder / name


def _damaged(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{folder / KIT} is damaged: {why}", fix="copy the kit again")
