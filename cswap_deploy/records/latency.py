"""What the nodes of a network take on a device, and what is needed to find out."""

from __future__ import annotations

from typing import Literal

from cswap_deploy.records.value import Value
from cswap_deploy.runtime.node_times import GraphNode, NodeTime


class TimedGraph(Value):
    """A network at one width, on the device."""

    widths: dict[str, int]
    """Group -> units that are left."""
    nodes: tuple[NodeTime, ...]
    ms: float
    """Of the whole call, without a profiler."""


class LatencyTable(Value):
    """A network at several widths on one device, the dense one first."""

    schema_version: Literal[1] = 1
    model: str
    runtime: str
    """With its version."""
    device: str
    threads: int
    batch: int
    graphs: tuple[TimedGraph, ...]


class KitGraph(Value):
    """A graph that is to be timed."""

    file: str
    """In the kit's folder."""
    sha256: str
    widths: dict[str, int]
    nodes: tuple[GraphNode, ...]
    shapes: dict[str, tuple[int, ...]]
    """Tensor -> its shape at the kit's batch, where it is known."""


class ProfileKit(Value):
    """``kit.json``: what ``cswap-run --profile`` times on a device."""

    schema_version: Literal[1] = 1
    model: str
    batch: int
    input_size: tuple[int, int, int]
    graphs: tuple[KitGraph, ...]
