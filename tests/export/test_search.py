from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cswap_deploy.export.search import shortest_prefix, smallest_set

NAMES = [f"layer{i}" for i in range(40)]


@given(st.sets(st.sampled_from(NAMES), min_size=1, max_size=6))
def test_exactly_the_culprits_are_found(culprits: set[str]) -> None:
    calls = []

    def passes(kept: frozenset[str]) -> bool:
        calls.append(kept)
        return culprits <= kept

    assert smallest_set(NAMES, passes, tests=1000) == culprits
    assert len(calls) <= 1000


def test_one_culprit_of_many_takes_few_tests() -> None:
    names = [str(i) for i in range(256)]
    calls = []

    def passes(kept: frozenset[str]) -> bool:
        calls.append(kept)
        return "137" in kept

    assert smallest_set(names, passes, tests=1000) == {"137"}
    assert len(calls) <= 2 * 8


def test_when_the_tests_are_spent_what_is_left_still_passes() -> None:
    culprits = {"layer3", "layer30"}
    found = smallest_set(NAMES, lambda kept: culprits <= kept, tests=9)
    assert culprits <= found
    assert len(found) < len(NAMES)


def test_either_of_two_is_enough() -> None:
    assert len(smallest_set(NAMES, lambda kept: bool({"layer5", "layer6"} & kept), tests=99)) == 1


@pytest.mark.parametrize("needed", [0, 1, 7, 40])
def test_the_shortest_prefix(needed: int) -> None:
    calls = []

    def passes(kept: frozenset[str]) -> bool:
        calls.append(kept)
        return len(kept) >= needed

    assert shortest_prefix(NAMES, passes) == set(NAMES[:needed])
    assert len(calls) <= 6
