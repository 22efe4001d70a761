"""What each layer of a TensorRT engine takes, on the GPU that it is for.

Engines are built here, from the graphs, and timed in turn with TensorRT's profiler and without it.
An engine's layer covers one node of its graph or many; what it takes counts to the products among
them, in proportion to their multiply-accumulates, or to the first where there is none.

Source:
    TensorRT documentation, ``IProfiler`` and ``IExecutionContext.enqueue_emits_profile``: layers
    report their time after each call, which then waits for the GPU. "Engine Inspector": with
    detailed verbosity a layer's ``Metadata`` names the ONNX nodes that it was made of.
"""

# ruff: noqa: B905 - Python 3.9, as devices have it, knows no strict
from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from cswap_deploy.errors import StageError
from cswap_deploy.runtime.bundle import EngineFile
from cswap_deploy.runtime.node_times import (
    WARM,
    Graph,
    GraphNode,
    GraphTimes,
    NodeTime,
    once,
    time_in_turn,
    typical,
)
from cswap_deploy.runtime.session import Floats
from cswap_deploy.runtime.tensorrt_session import (
    MODULES,
    TensorRtSession,
    import_tensorrt,
    make_logger,
)

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_REGION = re.compile(r"\{ForeignNode\[(.+?)\.\.\.(.+?)\]\}")
"""What TensorRT calls layers that its graph compiler made of all between two nodes."""


def time_in_tensorrt(
    graphs: Sequence[Graph], images: Floats, *, threads: int | None, runs: int, target: str
) -> list[GraphTimes]:
    """Time graphs and their nodes as float32 engines of just this batch.

    Args:
        graphs: To be timed in turn, with the shapes of their tensors.
        images: (B, C, H, W), the batch of every call.
        threads: Not used: the GPU's work is one stream.
        runs: Calls of each that count, with and without the profiler.
        target: ``tensorrt`` or ``tensorrt-rtx``.

    Raises:
        MissingDependencyError: The package, pycuda, the driver or a GPU is not there.
        StageError: The package builds no engine of a graph.
    """
    trt = import_tensorrt(*MODULES[target])
    file = EngineFile(target=target, path="", version=str(trt.__version__))
    calls, sessions, profiled = [], [], []
    try:
        for graph in graphs:
            plan = _build(trt, graph, images.shape)
            plain, counting = TensorRtSession(plan, file), TensorRtSession(plan, file)
            sessions += [plain, counting]
            times: dict[str, list[float]] = {}
            origins = _origins(counting.profile(times))
            calls.append((partial(plain.run, images), partial(counting.run, images)))
            profiled.append((times, origins))
        took = time_in_turn(calls, runs)
    finally:
        for session in reversed(sessions):
            session.close()
    return [
        GraphTimes(of_layers(times, origins, graph), ms)
        for graph, (times, origins), ms in zip(graphs, profiled, took)
    ]


def of_layers(
    times: Mapping[str, Sequence[float]], origins: Mapping[str, str], graph: Graph
) -> list[NodeTime]:
    """An engine's layers as nodes of its graph.

    Args:
        times: Layer -> what each call took, ms, in the order in which they run.
        origins: Layer -> its ``Metadata``; those that have none are known by their names.
        graph: With shapes.
    """
    place = {node.name: at for at, node in enumerate(graph.nodes)}
    found: list[NodeTime] = []
    before = "start"
    for layer, each in times.items():
        ms = typical(list(each)[WARM:] or list(each))
        held = [graph.nodes[at] for at in sorted(_covered(layer, origins.get(layer, ""), place))]
        if not held:
            found.append(NodeTime(f"{before}>{_plain(layer)}", _plain(layer), ms, (), ()))
            continue
        products = [node for node in held if node.op in _PRODUCTS] or held[:1]
        work = [_macs(node, graph) for node in products]
        for node, macs in zip(products, work):
            share = macs / sum(work) if sum(work) else 1 / len(products)
            found.append(
                NodeTime(
                    node.name, node.op, ms * share, _shapes(node.inputs, graph),
                    _shapes(node.outputs, graph),
                )
            )  # fmt: skip
        before = products[-1].name
    return once(found)


def _covered(layer: str, origin: str, place: Mapping[str, int]) -> set[int]:
    """Which of a graph's nodes a layer was made of."""
    named = _ORIGIN.findall(origin) or layer.split(" + ")
    held = {place[name] for name in named if name in place}
    for first, last in _REGION.findall(layer) if not held else ():
        ends = [place[name] for name in (first, last) if name in place]
        if ends:
            held |= set(range(min(ends), max(ends) + 1))
    return held


def _plain(layer: str) -> str:
    """A layer's name without what differs from engine to engine."""
    return re.sub(r"\d+", "", layer.partition(" + ")[0])


def _macs(node: GraphNode, graph: Graph) -> float:
    """Multiply-accumulates of a product; zero where shapes are not known."""
    inputs, outputs = _shapes(node.inputs, graph), _shapes(node.outputs, graph)
    if len(inputs) < 2 or not inputs[0] or not inputs[1] or not outputs:
        return 0.0
    if "Conv" in node.op:
        # A transposed one's filter has its inputs first: each input meets all the rest of it.
        base = inputs[0] if node.op == "ConvTranspose" else outputs[0]
        return float(prod(base) * prod(inputs[1][1:]))
    return float(prod(outputs[0]) * inputs[0][-1])


def _shapes(tensors: Sequence[str], graph: Graph) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(graph.shapes[name]) for name in tensors if name in graph.shapes)


def _build(trt: Any, graph: Graph, shape: Sequence[int]) -> bytes:
    """A float32 engine of a graph for one shape of its input."""
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    with open(os.fspath(graph.path), "rb") as file:
        parsed = parser.parse(file.read())
    plan = None
    if parsed:
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        profile = builder.create_optimization_profile()
        exact = tuple(int(size) for size in shape)
        profile.set_shape(network.get_input(0).name, exact, exact, exact)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise StageError(
            f"{trt.__name__} {trt.__version__} builds no engine of {graph.path}: {log.words()}",
            log=tuple(log.errors),
        )
    return bytes(plan)


def _origins(information: str) -> dict[str, str]:
    """Layer -> its metadata, of what an engine's inspector tells in JSON."""
    layers = json.loads(information).get("Layers", [])
    return {
        str(layer["Name"]): str(layer.get("Metadata", ""))
        for layer in layers
        if isinstance(layer, dict) and "Name" in layer
    }
