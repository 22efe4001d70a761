"""Labels that meet leave together; worked by hand on a few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from cswap_deploy.network.coupling import Coupling, Value


def axis(coupling: Coupling, name: str, shape: tuple[int, ...], dim: int) -> Value:
    """Labels along one dimension of a value."""
    labels = coupling.axis(name, 0, shape[dim])
    return Value(labels.view([-1 if d == dim else 1 for d in range(len(shape))]), shape)


def units(coupling: Coupling, *values: Value) -> list[list[int]]:
    """For each value the unit of each label, numbered from 0 in order of appearance."""
    found = coupling.resolve()
    numbers: dict[int, int] = {}
    every = [found.unit[v.labels].flatten().tolist() for v in values]
    return [[numbers.setdefault(unit, len(numbers)) for unit in one] for one in every]


def blocked(coupling: Coupling, value: Value) -> list[bool]:
    found = coupling.resolve()
    return [unit in found.reasons for unit in found.unit[value.labels].flatten().tolist()]


def test_added_channels_leave_together() -> None:
    c = Coupling()
    a, b = axis(c, "a", (2, 3, 8, 8), 1), axis(c, "b", (2, 3, 8, 8), 1)
    c.meet([a, b])
    assert units(c, a, b) == [[0, 1, 2], [0, 1, 2]]


def test_a_constant_of_one_channel_couples_nothing() -> None:
    """A spatial gate (N, 1, H, W) is spread over all channels: it stays, and they stay free."""
    c = Coupling()
    x, gate = axis(c, "x", (2, 3, 8, 8), 1), axis(c, "gate", (2, 1, 8, 8), 1)
    out = c.meet([x, gate])
    assert out.shape == (2, 3, 8, 8)
    assert units(c, x, out) == [[0, 1, 2], [0, 1, 2]]
    assert blocked(c, gate) == [True]
    assert blocked(c, x) == [False] * 3


def test_channels_that_meet_a_fixed_size_stay() -> None:
    c = Coupling()
    x = axis(c, "x", (2, 3, 8, 8), 1)
    c.meet([x, Value.fixed((2, 3, 8, 8))])
    assert blocked(c, x) == [True] * 3
    assert c.resolve().reasons == dict.fromkeys(
        c.resolve().unit[x.labels].flatten().tolist(), "meets values whose size is fixed"
    )


def test_an_element_for_each_token_and_channel_follows_the_channel() -> None:
    """A position embedding (1, T, C): its rows differ, and each follows the channels."""
    c = Coupling()
    x, positions = axis(c, "x", (2, 5, 3), 2), c.cell("positions", (1, 5, 3))
    c.meet([x, positions])
    assert units(c, x, positions) == [[0, 1, 2], [0, 1, 2] * 5]


def test_what_all_heads_share_does_not_couple_them() -> None:
    """Rotary sines (T, D) are the same for every head: heads can go, dimensions cannot."""
    c = Coupling()
    q = Value.of(c.axis("q", 0, 6).view(1, 2, 1, 3).expand(2, 2, 4, 3))
    k = Value.of(c.axis("k", 0, 6).view(1, 2, 1, 3).expand(2, 2, 4, 3))
    sines = c.cell("sines", (4, 3))
    turned = c.meet([q, sines])
    c.contract([turned, k], ["bhtd", "bhsd"], "bhts")
    assert units(c, q, k) == [[0] * 3 + [1] * 3] * 2
    assert blocked(c, q) == [False] * 6
    assert all(blocked(c, sines))


def test_attention_couples_whole_heads() -> None:
    c = Coupling()
    qkv = Value.of(c.axis("qkv", 0, 12).view(1, 1, 3, 2, 2).expand(2, 5, 3, 2, 2))
    q, k, v = (Value.of(qkv.full[:, :, i].transpose(1, 2)) for i in range(3))
    scores = c.contract([q, k], ["bhtd", "bhsd"], "bhts")
    assert scores.labels.shape == (1, 2, 1, 1)
    c.contract([scores, v], ["bhts", "bhsd"], "bhtd")
    assert units(c, qkv) == [[0, 0, 1, 1] * 3]


def test_a_gate_for_each_head_goes_with_the_head() -> None:
    """The gate (N, H, 1, 1) is repeated along a head's dimensions: once heads are known, it is
    coupled."""
    c = Coupling()
    v = Value.of(c.axis("v", 0, 6).view(1, 2, 1, 3).expand(2, 2, 4, 3))
    gate = axis(c, "gate", (2, 2, 1, 1), 1)
    c.meet([v, gate])
    c.tie(v, [3], "a head is whole")
    assert units(c, v, gate) == [[0, 0, 0, 1, 1, 1], [0, 1]]


def test_a_shuffle_keeps_its_groups_equal() -> None:
    """(2, 4) channels seen as two groups of four: one slot leaves both."""
    c = Coupling()
    x = c.axis("x", 0, 8)
    c.boxes.append(x.view(1, 2, 4))
    assert units(c, Value.of(x)) == [[0, 1, 2, 3, 0, 1, 2, 3]]


def test_a_pixel_shuffle_takes_all_that_makes_one_channel() -> None:
    c = Coupling()
    x = c.axis("x", 0, 8)  # two channels of 2 x 2
    picture = torch.pixel_shuffle(x.view(1, 8, 1, 1).expand(1, 8, 3, 3).contiguous(), 2)
    c.boxes.append(picture)
    assert units(c, Value.of(x)) == [[0, 0, 0, 0, 1, 1, 1, 1]]


def test_what_is_added_up_leaves_together() -> None:
    c = Coupling()
    branches: Tensor = c.axis("x", 0, 6).view(1, 2, 3)
    summed = c.tie(Value.of(branches), [1], "sum joins its channels")
    assert summed.labels.shape == (1, 1, 3)
    assert units(c, Value.of(branches)) == [[0, 1, 2, 0, 1, 2]]
    assert set(c.resolve().tied.values()) == {"sum joins its channels"}


def test_a_box_with_a_fixed_row_comes_to_an_end() -> None:
    """Every column meets what is fixed, so only the other row as a whole could go."""
    c = Coupling()
    x = c.axis("x", 0, 6)
    c.boxes.append(torch.stack([x[:3], torch.zeros(3, dtype=torch.int64)]))
    assert units(c, Value.of(x)) == [[0, 0, 0, 1, 2, 3]]


def test_blocked_labels_in_a_box_come_to_an_end() -> None:
    c = Coupling()
    x = c.axis("x", 0, 6)
    c.block(x[:1], "for a test")
    c.boxes.append(x.view(2, 3))
    assert blocked(c, Value.of(x)) == [True, False, False, True, False, False]
