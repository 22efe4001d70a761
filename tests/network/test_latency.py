"""The latency model: what it makes of nodes whose law is known, and of widths it never saw."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cswap_deploy.network.latency import LatencyModel, fit_latency
from cswap_deploy.network.units import Emptied, Group, Member, Reader
from cswap_deploy.records.latency import TimedGraph
from cswap_deploy.runtime.node_times import NodeTime

OVERHEAD = 0.003


def group(name: str, units: int, *, reader: str, branch: bool = False) -> Group:
    return Group(
        name, "branch" if branch else "channels",
        root_indices=tuple((u,) for u in range(units)),
        consumers=(Reader(reader, tuple((u,) for u in range(units))),),
        members=(Member(f"{name}.weight", 0, tuple((u,) for u in range(units))),),
        emptied=(Emptied(name, nothing=False),) if branch else (),
    )  # fmt: skip


GROUPS = [
    group("block1.conv1", 64, reader="block1.conv2"),
    group("block2.conv1", 64, reader="block2.conv2"),
    group("block2", 1, reader="block2.conv2", branch=True),
]


def conv(name: str, read: int, made: int, *, padded: int) -> NodeTime:
    """A 3x3 convolution at 8x8, by a law: launch, arithmetic, and half as much again if odd."""
    made = padded * math.ceil(made / padded)
    macs = made * 64 * read * 9
    ms = 0.01 + 2e-7 * macs * (1.5 if read % 8 else 1.0)
    shapes = ((1, read, 8, 8), (made, read, 3, 3)), ((1, made, 8, 8),)
    return NodeTime(name, "Conv", ms, *shapes)


def device(first: int, second: int, *, there: bool = True, padded: int = 16) -> TimedGraph:
    nodes = [
        conv("block1.conv1/Conv", 32, first, padded=padded),
        conv("block1.conv2/Conv", first, 32, padded=padded),
    ]
    if there:
        nodes += [
            conv("block2.conv1/Conv", 32, second, padded=padded),
            conv("block2.conv2/Conv", second, 32, padded=padded),
        ]
    nodes.append(NodeTime("pool/ReduceMean", "ReduceMean", 0.02, ((1, 32, 8, 8),), ((1, 32),)))
    widths = {"block1.conv1": first, "block2.conv1": second, "block2": int(there)}
    # The profiler costs each node something, which a plain call does not take.
    profiled = [node._replace(ms=node.ms + OVERHEAD) for node in nodes]
    ms = sum(node.ms for node in nodes)
    return TimedGraph(widths=widths, nodes=tuple(profiled), ms=ms)


@pytest.fixture(scope="module")
def model() -> LatencyModel:
    seen = [(64, 64), (40, 20), (16, 56), (28, 36), (8, 12), (52, 44)]
    return fit_latency([device(*widths) for widths in seen], GROUPS)


@pytest.mark.parametrize("widths", [(32, 48), (20, 60), (64, 8), (12, 12)])
def test_widths_it_never_saw(model: LatencyModel, widths: tuple[int, int]) -> None:
    wanted = device(*widths)
    assert model.ms(wanted.widths) == pytest.approx(wanted.ms, rel=0.03)


def test_a_branch_takes_its_nodes_along(model: LatencyModel) -> None:
    wanted = device(40, 64, there=False)
    assert model.ms(wanted.widths) == pytest.approx(wanted.ms, rel=0.03)


def test_a_step_that_padding_hides_saves_nothing_of_the_node_that_makes_it(
    model: LatencyModel,
) -> None:
    at = {name: i for i, name in enumerate(model.names)}
    full = model.each({"block1.conv1": 64, "block2.conv1": 64, "block2": 1})
    less = model.each({"block1.conv1": 56, "block2.conv1": 64, "block2": 1})
    makes, reads = at["block1.conv1/Conv"], at["block1.conv2/Conv"]
    assert less[makes] == pytest.approx(full[makes])
    assert less[reads] < 0.95 * full[reads]
    assert np.allclose(less[[at[n] for n in at if n.startswith("block2")]],
                       full[[at[n] for n in at if n.startswith("block2")]])  # fmt: skip


def test_odd_inputs_are_told_to_be_slow(model: LatencyModel) -> None:
    even = {"block1.conv1": 32, "block2.conv1": 64, "block2": 1}
    assert model.ms(even | {"block1.conv1": 28}) > model.ms(even)
