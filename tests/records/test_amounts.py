"""Numbers as people read them: what is not zero does not read as zero."""

from __future__ import annotations

import math

import pytest

from cswap_deploy.records.amounts import exact, fixed, mebibytes, percent, speed


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (1.234, 2, "1.23"), (0.0, 2, "0.00"), (0.004, 2, "0.004"), (0.0001, 3, "0.0001"),
        (-0.00012, 2, "-0.00012"), (1.23456e-9, 2, "0.0000000012"), (0.006, 2, "0.01"),
        (1e6, 1, "1000000.0"), (0.4, 0, "0.4"), (math.inf, 2, "inf"),
    ],
)  # fmt: skip
def test_fixed(value: float, decimals: int, text: str) -> None:
    assert fixed(value, decimals) == text


def test_signs() -> None:
    assert [fixed(v, 1, sign="+") for v in (0.001, -0.001, 2.0, 0.0)] == [
        "+0.001", "-0.001", "+2.0", "+0.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0001, "0.0001"), (5.0, "5.000"), (5.0004, "5.0004"), (1e9, "1000000000.000"), (0, "0.000"),
     (0.1 + 0.2, "0.300"), (1e-7, "0.0000001")],
)  # fmt: skip
def test_what_someone_chose_has_all_its_digits(value: float, text: str) -> None:
    assert exact(value, 3) == text


def test_units() -> None:
    assert percent(0.4, 2) == "40.00%"
    assert percent(0.00001, 1) == "0.001%"
    assert mebibytes(669_312) == "0.64 MiB"
    assert mebibytes(900) == "0.00086 MiB"


@pytest.mark.parametrize(
    ("measured", "faster", "text"),
    [
        ((1.36, 1.3, 1.4), True, "1.36x"),
        ((1.36, None, None), True, "1.36x"),
        ((0.98, None, None), False, "not faster: 0.98x"),
        ((0.9, 0.85, 0.95), False, "not faster: 0.90x"),
        ((1.0, None, None), False, "not faster: 1.00x"),
        ((1.02, 0.99, 1.05), False, "not faster: 1.02x, within the noise: 0.99x to 1.05x"),
        ((0.99, 0.95, 1.02), False, "not faster: 0.99x, within the noise: 0.95x to 1.02x"),
    ],
)
def test_a_network_that_is_not_faster(
    measured: tuple[float, float | None, float | None], faster: bool, text: str
) -> None:
    assert speed(*measured) == (faster, text)
