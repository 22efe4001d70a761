"""How many images each class gives."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cswap_deploy.data.sampling import balanced_order, balanced_shares, split_counts, split_shares

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).map(
    lambda v: np.array(v, dtype=np.int64)
)


def test_shares_by_hand() -> None:
    available = np.array([10, 2, 10])
    assert balanced_shares(available, 9, [0, 1, 2]).tolist() == [4, 2, 3]
    assert balanced_shares(available, 9, [2, 1, 0]).tolist() == [3, 2, 4]
    assert balanced_shares(available, 100, [0, 1, 2]).tolist() == [10, 2, 10]
    assert balanced_shares(available, 0, [0, 1, 2]).tolist() == [0, 0, 0]


@settings(max_examples=50)
@given(COUNTS, st.integers(0, 200))
def test_shares_are_as_even_as_they_can_be(available: np.ndarray, count: int) -> None:
    shares = balanced_shares(available, count, list(range(len(available))))
    assert shares.sum() == min(count, available.sum())
    assert (shares <= available).all()
    open_classes = shares[shares < available]
    if open_classes.size:
        assert shares.max() - open_classes.min() <= 1


@settings(max_examples=50)
@given(COUNTS, st.integers(1, 100), st.integers(1, 100))
def test_split_is_disjoint_and_validation_sees_every_class(
    available: np.ndarray, calibration: int, validation: int
) -> None:
    order = list(range(len(available)))
    first, second = split_shares(
        available, calibration=calibration, validation=validation, order=order
    )
    assert (first + second <= available).all()
    assert first.sum() == min(calibration, available.sum())
    if calibration <= ((available + 1) // 2).sum() and validation >= len(available):
        assert (second[available >= 2] > 0).all()


def test_split_counts() -> None:
    assert split_counts(3000, calibration=512, validation=2000) == (512, 2000)
    assert split_counts(2000, calibration=512, validation=2000) == (512, 1488)
    assert split_counts(600, calibration=512, validation=2000) == (300, 300)
    assert split_counts(1000, calibration=900, validation=200) == (800, 200)


def test_every_prefix_of_the_order_is_balanced() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [10, 10, 10]))
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(30))
    for n in range(3, 31):
        counts = np.bincount(labels[order[:n]], minlength=3)
        assert counts.max() - counts.min() <= 1
