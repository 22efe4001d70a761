"""What each node of a graph takes in a runtime, by the runtime's own profiler.

Graphs are timed in turn, with the profiler and without it, so that all see the same machine. Needs
NumPy and the runtime alone: it runs on devices.

Source:
    ONNX Runtime documentation, "Profiling tools": ``SessionOptions.enable_profiling`` writes one
    event for each node of each call, in whole microseconds. OpenVINO documentation, "Profiling":
    ``PERF_COUNT`` and ``InferRequest.profiling_info``; the compiled graph says which layers of the
    model each of its nodes was made of.
"""

# ruff: noqa: B905 - Python 3.9, as devices have it, knows no strict
from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cswap_deploy.runtime.onnx_session import import_onnxruntime, session_options
from cswap_deploy.runtime.openvino_cpu import cpu_options, import_openvino, openvino_core
from cswap_deploy.runtime.session import Floats

WARM = 5
"""Calls that are not counted."""
_KERNEL = "_kernel_time"
_BLOCKED = "_nchwc"
"""What ONNX Runtime appends to tensors in its own layout, and names their convolutions after."""
_WITHOUT_BIAS = "/WithoutBiases"
"""What OpenVINO appends to a product whose bias it adds apart."""


class GraphNode(NamedTuple):
    """A node of an ONNX graph."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Tensors."""


class Graph(NamedTuple):
    """An ONNX file and what is in it."""

    path: Path
    nodes: Sequence[GraphNode]
    shapes: Mapping[str, Sequence[int]]
    """Tensor -> its shape at the batch that is timed, where it is known."""


class NodeTime(NamedTuple):
    """One node of the graph that the runtime made of a model."""

    name: str
    """It starts with the dotted name of the module that the node belongs to, ``layer1.0/Relu``, and
    does not depend on what else is in a graph."""
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


def time_in_onnxruntime(
    graphs: Sequence[Graph], images: Floats, *, threads: int | None, runs: int
) -> list[GraphTimes]:
    """Time graphs and their nodes in ONNX Runtime on the CPU.

    Args:
        graphs: To be timed in turn.
        images: (B, C, H, W), the batch of every call.
        threads: Of an operator; the process's cores unless given.
        runs: Calls of each that count, with and without the profiler.
    """
    ort = import_onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for graph in graphs:
            pair = []
            for profiled in (False, True):
                options, _ = session_options(ort, threads)
                options.enable_profiling = profiled
                options.profile_file_prefix = os.path.join(folder, "profile")
                providers = ["CPUExecutionProvider"]
                path = os.fspath(graph.path)
                pair.append(ort.InferenceSession(path, options, providers=providers))
            pairs.append(pair)
        given = {pairs[0][0].get_inputs()[0].name: images}
        calls = [[partial(session.run, None, given) for session in pair] for pair in pairs]
        took = time_in_turn(calls, runs)
        events = [json.loads(Path(p.end_profiling()).read_text()) for _, p in pairs]
    nodes = [_of_events(found) for found in events]
    return [
        GraphTimes(_named(found, graph.nodes), ms) for graph, found, ms in zip(graphs, nodes, took)
    ]


def time_in_openvino(
    graphs: Sequence[Graph], images: Floats, *, threads: int | None, runs: int
) -> list[GraphTimes]:
    """The same in OpenVINO on the CPU, in float32, for batches of just this size."""
    import_openvino()
    core, calls, profiled = openvino_core(), [], []
    for graph in graphs:
        model = core.read_model(os.fspath(graph.path))
        model.reshape(list(images.shape))
        options = cpu_options(threads)
        plain, counting = (
            core.compile_model(model, "CPU", {**options, "PERF_COUNT": on}) for on in (False, True)
        )
        counted: dict[str, list[float]] = defaultdict(list)
        calls.append(
            (
                partial(plain.create_infer_request().infer, [images], share_inputs=True),
                partial(_infer_and_count, counting.create_infer_request(), images, counted),
            )
        )
        profiled.append((counting, counted))
    took = time_in_turn(calls, runs)
    return [
        GraphTimes(_of_compiled(compiled.get_runtime_model(), counted, graph.nodes), ms)
        for graph, (compiled, counted), ms in zip(graphs, profiled, took)
    ]


def time_in_turn(calls: Sequence[Sequence[Callable[[], Any]]], runs: int) -> list[float]:
    """Plain and profiled calls of each graph, alternating; milliseconds of the plain ones."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(WARM + runs):
        for (plain, profiled), took in zip(calls, times):
            begun = time.perf_counter()
            plain()
            took.append(1e3 * (time.perf_counter() - begun))
            profiled()
    return [typical(took[WARM:]) for took in times]


def _of_events(events: list[dict[str, Any]]) -> list[NodeTime]:
    """Nodes of ONNX Runtime's profile, under the runtime's names."""
    times: dict[str, list[float]] = defaultdict(list)
    last: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            name = event["name"][: -len(_KERNEL)]
            times[name].append(event["dur"] / 1e3)
            last[name] = event["args"]
    return [
        NodeTime(
            name, str(args["op_name"]), typical(times[name][WARM:] or times[name]),
            _shapes(args["input_type_shape"]), _shapes(args["output_type_shape"]),
        )
        for name, args in last.items()
    ]  # fmt: skip


def _shapes(typed: list[dict[str, list[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for each in typed for shape in each.values())


def _named(nodes: Sequence[NodeTime], graph: Sequence[GraphNode]) -> list[NodeTime]:
    """ONNX Runtime's nodes under names that do not depend on what else is in a graph.

    A node of the graph has its own. One that the runtime made of several has that of the one that
    does its work, as a convolution's with what was fused behind it; and what it put between them is
    named after the node before.
    """
    own = {node.name for node in graph}
    makes = {output: node for node in graph for output in node.outputs}
    found: list[NodeTime] = []
    before = "start"
    for node in nodes:
        tensor = node.name[: -len(_BLOCKED)] if node.name.endswith(_BLOCKED) else node.name
        last = makes.get(tensor)
        if node.name in own or "/" in node.name:
            name = before = node.name
        elif last is not None:
            first: GraphNode | None = last
            while first is not None and first.op != node.op:
                first = next((makes[i] for i in first.inputs if i in makes), None)
            name = before = (last if first is None else first).name
        else:
            name = f"{before}>{node.op}"
        found.append(node._replace(name=name))
    return once(found)


def _infer_and_count(request: Any, images: Floats, into: dict[str, list[float]]) -> None:
    """A call of OpenVINO, and what its nodes took, in whole microseconds.

    A node whose mean over all calls falls below one is then said not to have run.
    """
    request.infer([images], share_inputs=True)
    for node in request.profiling_info:
        into[node.node_name].append(1e3 * node.real_time.total_seconds())


def _of_compiled(
    model: Any, counted: dict[str, list[float]], graph: Sequence[GraphNode]
) -> list[NodeTime]:
    """Nodes of OpenVINO's compiled graph, by what they were made of; others as above."""
    own = {node.name for node in graph}
    found: list[NodeTime] = []
    before = "start"
    of_images: set[str] = set()
    for node in model.get_ordered_ops():
        times, info = counted.get(node.friendly_name, ()), node.rt_info
        sources = {i.get_source_output().get_node().friendly_name for i in node.inputs()}
        op = str(info["layerType"].astype(str))
        if op == "Input" or sources & of_images:
            of_images.add(node.friendly_name)
        # What is made of weights alone is none of a call's; what was optimised away never ran.
        if not sources & of_images or not any(times):
            continue
        made_of = (str(info[key].astype(str)) for key in ("originalLayersNames",) if key in info)
        names = (name.replace(_WITHOUT_BIAS, "") for each in made_of for name in each.split(","))
        name = next((name for name in names if name in own), None)
        before, name = (name, name) if name is not None else (before, f"{before}>{op}")
        found.append(
            NodeTime(
                name, op, typical(list(times)[WARM:]),
                tuple(tuple(i.get_partial_shape().to_shape()) for i in node.inputs()),
                tuple(tuple(o.get_partial_shape().to_shape()) for o in node.outputs()),
            )
        )  # fmt: skip
    return once(found)


def once(nodes: Sequence[NodeTime]) -> list[NodeTime]:
    """A name that comes again is numbered."""
    seen: dict[str, int] = defaultdict(int)
    found = []
    for node in nodes:
        seen[node.name] += 1
        number = seen[node.name]
        found.append(node if number == 1 else node._replace(name=f"{node.name}#{number}"))
    return found


def typical(times: list[float]) -> float:
    """Mean of the quicker half."""
    quicker = sorted(times)[: (len(times) + 1) // 2]
    return sum(quicker) / len(quicker)
