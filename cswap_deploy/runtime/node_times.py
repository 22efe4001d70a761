"""What each node of a graph takes in ONNX Runtime, by the runtime's own profiler.

Source: ONNX Runtime documentation, "Profiling tools": ``SessionOptions.enable_profiling`` writes
one event for each node of each call, in whole microseconds.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cswap_deploy.runtime.onnx_session import import_onnxruntime, session_options
from cswap_deploy.runtime.session import Floats

_KERNEL = "_kernel_time"
_WARM = 5
"""Calls that are not counted."""


class NodeTime(NamedTuple):
    """One node of the graph that the runtime made of a model."""

    name: str
    op: str
    ms: float
    """Mean of the quicker half of its calls."""
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    """Shapes."""


class GraphTimes(NamedTuple):
    """One graph on this machine."""

    nodes: Sequence[NodeTime]
    """In the order in which they run; each name once."""
    ms: float
    """Of a call without the profiler: mean of the quicker half."""


def time_graphs(
    graphs: Sequence[Path | bytes], images: Floats, *, threads: int | None, runs: int = 60
) -> list[GraphTimes]:
    """Time graphs and their nodes on the CPU, in turn, so that all see the same machine.

    Args:
        graphs: ONNX files, or serialised models.
        images: (B, C, H, W), the batch of every call.
        threads: Of an operator; the process's cores unless given.
        runs: Calls of each that count, with and without the profiler.
    """
    ort = import_onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for graph in graphs:
            source = graph if isinstance(graph, bytes) else os.fspath(graph)
            pair = []
            for profiled in (False, True):
                options, _ = session_options(ort, threads)
                options.enable_profiling = profiled
                options.profile_file_prefix = os.path.join(folder, "profile")
                providers = ["CPUExecutionProvider"]
                pair.append(ort.InferenceSession(source, options, providers=providers))
            pairs.append(pair)
        given = {pairs[0][0].get_inputs()[0].name: images}
        times: list[list[float]] = [[] for _ in pairs]
        for _ in range(_WARM + runs):
            for (plain, profiled), took in zip(pairs, times, strict=True):
                begun = time.perf_counter()
                plain.run(None, given)
                took.append(1e3 * (time.perf_counter() - begun))
                profiled.run(None, given)
        events = [json.loads(Path(p.end_profiling()).read_text()) for _, p in pairs]
    return [
        GraphTimes(_nodes(found), _typical(took[_WARM:]))
        for found, took in zip(events, times, strict=True)
    ]


def _nodes(events: list[dict[str, Any]]) -> list[NodeTime]:
    times: dict[str, list[float]] = defaultdict(list)
    last: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            name = event["name"].removesuffix(_KERNEL)
            times[name].append(event["dur"] / 1e3)
            last[name] = event["args"]
    return [
        NodeTime(
            name, str(args["op_name"]), _typical(times[name][_WARM:] or times[name]),
            _shapes(args["input_type_shape"]), _shapes(args["output_type_shape"]),
        )
        for name, args in last.items()
    ]  # fmt: skip


def _shapes(typed: list[dict[str, list[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for each in typed for shape in each.values())


def _typical(times: list[float]) -> float:
    quicker = sorted(times)[: (len(times) + 1) // 2]
    return sum(quicker) / len(quicker)
