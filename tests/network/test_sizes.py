"""Sizes are foretold from what is left, in any order, back and forth."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cswap_deploy.network.deletion import remove_units
from cswap_deploy.network.graph import trace
from cswap_deploy.network.groups import find_groups
from cswap_deploy.network.sizes import SizeModel, smallest
from cswap_deploy.network.units import Group

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Plain, depthwise, grouped and coupled layers; both sides of most of them shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 6, 3, padding=1, groups=3, bias=False)
        self.back = nn.Conv2d(6, 8, 1)
        self.hidden = nn.Linear(8, 10)
        self.classifier = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.depthwise(F.relu(self.wide(x))))
        x = F.avg_pool2d(x, 2) + self.back(F.relu(self.grouped(y)))
        return self.classifier(F.relu(self.hidden(x.mean((2, 3)))))


@cache
def mixed() -> tuple[nn.Module, tuple[Group, ...]]:
    torch.manual_seed(0)
    module = Mixed().eval()
    return module, find_groups(trace(module, EXAMPLE)).groups


@st.composite
def removals(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Units to remove, in a random order; every group keeps one."""
    chosen = []
    for group in mixed()[1]:
        units = draw(st.sets(st.integers(0, group.units - 1), max_size=group.units - 1))
        chosen += [(group.name, unit) for unit in sorted(units)]
    return draw(st.permutations(chosen))


def by_hand(gone: dict[str, int]) -> tuple[int, int]:
    """Parameters and MACs of ``Mixed`` with this many channels less, written out."""
    stem, hidden = 8 - gone["stem"], 10 - gone["hidden"]
    wide, grouped = 12 - 3 * gone["wide"], 6 - 3 * gone["grouped"]
    params = (
        27 * stem + 2 * stem + (stem * wide + wide) + (9 * wide + wide)
        + 9 * wide // 3 * grouped + (grouped * stem + stem)
        + (stem * hidden + hidden) + (hidden * 4 + 4)
    )  # fmt: skip
    macs = (
        64 * 27 * stem + 64 * stem * wide + 16 * 9 * wide + 16 * 9 * wide // 3 * grouped
        + 16 * grouped * stem + stem * hidden + hidden * 4
    )  # fmt: skip
    return params, macs


def test_groups_are_the_four_expected() -> None:
    assert {g.name: g.units for g in mixed()[1]} == {
        "stem": 8, "wide": 4, "grouped": 2, "hidden": 10,
    }  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(order=removals())
def test_sizes_are_those_written_out_by_hand(order: list[tuple[str, int]]) -> None:
    module, groups = mixed()
    sizes = SizeModel(module, EXAMPLE, groups)
    for name, unit in order:
        sizes.remove(name, [unit])
    gone = {g.name: sum(name == g.name for name, _ in order) for g in groups}
    found = sizes.size()
    assert (found.params, found.macs) == by_hand(gone)
    assert found.units == 24 - len(order)


@settings(max_examples=30, deadline=None)
@given(order=removals(), data=st.data())
def test_removing_and_restoring_leaves_the_size(order: Any, data: st.DataObject) -> None:
    module, groups = mixed()
    sizes = SizeModel(module, EXAMPLE, groups)
    start = sizes.size()
    other = sizes.copy()
    for name, unit in order:
        sizes.remove(name, [unit])
    end = sizes.size()
    assert (end == start) == (not order)
    assert other.size() == start, "a copy has its own counts"
    for name, unit in data.draw(st.permutations(order)):
        sizes.restore(name, [unit])
    assert sizes.size() == start
    for name, unit in data.draw(st.permutations(order)):
        sizes.remove(name, [unit])
    assert sizes.size() == end, "the order does not matter"


@settings(max_examples=20, deadline=None)
@given(order=removals())
def test_saving_is_the_difference_it_makes(order: list[tuple[str, int]]) -> None:
    module, groups = mixed()
    sizes = SizeModel(module, EXAMPLE, groups)
    for name, unit in order:
        before = sizes.size()
        foretold = {of: sizes.saving(name, [unit], of) for of in ("params", "macs", "channels")}
        assert sizes.size() == before, "asking changes nothing"
        sizes.remove(name, [unit])
        after = sizes.size()
        for of, saved in foretold.items():
            assert before.amount(of) - after.amount(of) == saved > 0


@settings(max_examples=8, deadline=None)
@given(order=removals())
def test_foretold_size_is_the_deleted_networks(order: list[tuple[str, int]]) -> None:
    module, groups = mixed()
    sizes = SizeModel(module, EXAMPLE, groups)
    removed: dict[str, list[int]] = {}
    for name, unit in order:
        sizes.remove(name, [unit])
        removed.setdefault(name, []).append(unit)
    smaller = copy.deepcopy(module)
    remove_units(smaller, removed, groups)
    assert sizes.size().params == sum(p.numel() for p in smaller.parameters())
    assert sizes.size().macs == SizeModel(smaller, EXAMPLE, ()).size().macs
    smaller(EXAMPLE)


def test_smallest_is_every_group_at_its_floor_and_leaves_the_model() -> None:
    module, groups = mixed()
    sizes = SizeModel(module, EXAMPLE, groups)
    before = sizes.size()
    floors = {"stem": 2, "wide": 1, "grouped": 1, "hidden": 4}
    params, macs = by_hand({"stem": 6, "wide": 3, "grouped": 1, "hidden": 6})
    found = smallest(sizes, groups, floors)
    assert (found.units, found.params, found.macs) == (8, params, macs)
    assert sizes.size() == before


@pytest.mark.parametrize("of", ["params", "channels", "macs"])
def test_amount_is_the_quantity_named(of: Any) -> None:
    size = SizeModel(mixed()[0], EXAMPLE, mixed()[1]).size()
    wanted = {"params": size.params, "channels": size.units, "macs": size.macs}
    assert len(set(wanted.values())) == 3
    assert size.amount(of) == wanted[of]
