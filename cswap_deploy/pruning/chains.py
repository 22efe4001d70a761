"""Chains: a layer, what happens to each of its outputs by itself, and the layer that reads them.

That is where a producer can be reconstructed (:mod:`pruning.producers`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.graph import Graph
from cswap_deploy.network.nodes import ancestors, descendants, input_of, opname, shape_in
from cswap_deploy.network.offsets import needs_bias
from cswap_deploy.network.units import depthwise

_POINTWISE = frozenset(
    {"relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "gelu", "silu", "mish", "sigmoid"}
    | {"tanh", "elu", "leaky_relu", "dropout", "clone", "contiguous"}
)


@dataclass(frozen=True, slots=True)
class Chain:
    """A layer, what happens to each of its outputs by itself, and the one layer that reads them."""

    producer: fx.Node
    producer_layer: str
    path: tuple[fx.Node, ...]
    """Between the two, in order."""
    consumer: fx.Node
    consumer_layer: str

    @property
    def gates(self) -> tuple[fx.Node, ...]:
        """Those of the path that scale each unit by a number for each image."""
        return tuple(node for node in self.path if gate_of(node) is not None)


def gate_of(node: fx.Node) -> fx.Node | None:
    """What a product scales each channel of an image (N, C, H, W) by; (N, C, 1, 1)."""
    if opname(node) != "mul" or len(node.all_input_nodes) != 2:
        return None
    value, gate = node.all_input_nodes
    shapes = [shape_in(v) for n in (value, gate) if isinstance(v := n.meta.get("val"), Tensor)]
    if node.args[0] is not value or len(shapes) != 2 or len(shapes[0]) != 4:
        return None
    return gate if shapes[1] == (*shapes[0][:2], 1, 1) else None


def _one_for_one(layer: nn.Module) -> bool:
    return depthwise(layer) and layer.in_channels == getattr(layer, "out_channels", None)


def find_chains(graph: Graph, consumers: Iterable[str]) -> list[Chain]:
    """The chains that end in some layers; layers that other things feed have none."""
    layers = {node: name for name in graph.layers() for node in graph.readers(name)}
    found = []
    for name in consumers:
        consumer = graph.readers(name)[0]
        path: list[fx.Node] = []
        node = input_of(consumer)
        while node not in layers and (_by_itself(node) or gate_of(node) is not None):
            path.insert(0, node)
            node = input_of(node)
        if node not in layers or not _read_by_nothing_else(graph, (node, *path, consumer)):
            continue
        producer, layer = layers[node], graph.layer(layers[node])
        if (
            len(graph.readers(producer)) == 1
            and (getattr(layer, "groups", 1) == 1 or _one_for_one(layer))
            and not depthwise(graph.layer(name))
            and not needs_bias(graph, producer)
        ):
            found.append(Chain(node, producer, tuple(path), consumer, name))
    return found


def _read_by_nothing_else(graph: Graph, steps: tuple[fx.Node, ...]) -> bool:
    """Whether each step is read by the next alone, and by what makes the gates of later ones."""
    gates = [gate for node in steps[1:-1] if (gate := gate_of(node)) is not None]
    makes = {node for gate in gates for node in ancestors(gate)} & {
        *descendants(graph.nodes, [steps[0]])
    }
    return all({*node.users} <= makes | {*steps[1:]} for node in {*steps[:-1], *makes})


def _by_itself(node: fx.Node) -> bool:
    """Whether each output depends on the input at its own place only."""
    return is_norm(node) or (
        node.op == "call_function" and len(node.all_input_nodes) == 1 and opname(node) in _POINTWISE
    )


def is_norm(node: fx.Node) -> bool:
    """Whether a node is a batch norm."""
    return node.target is torch.ops.aten.batch_norm.default
