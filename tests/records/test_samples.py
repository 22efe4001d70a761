"""Raw samples are kept to the last digit, and take little room."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cswap_deploy.records.samples import Samples
from cswap_deploy.records.value import Value


class Kept(Value):
    samples: Samples


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=50))
def test_any_numbers_come_back_as_they_were(numbers: list[float]) -> None:
    kept = Kept(samples=tuple(numbers))
    assert Kept.model_validate_json(kept.model_dump_json()).samples == tuple(numbers)


def test_timings_take_half_of_their_text() -> None:
    rng = np.random.default_rng(0)
    calls = tuple(int(ns) / 1e6 for ns in 1e6 * rng.lognormal(1, 0.02, size=400))
    text = Kept(samples=calls).model_dump_json()
    assert len(text) < len(",".join(map(str, calls))) * 0.6
    assert Kept.model_validate_json(text).samples == calls


def test_lists_of_older_versions_are_read() -> None:
    assert Kept.model_validate_json('{"samples": [1.5, 2]}').samples == (1.5, 2.0)


@pytest.mark.parametrize(
    "text", ["", "zlib-ns:!", "zlib-ns:%%%", "zlib-ns:AAAA", "other:AAAA", "zlib-f64:" + "A" * 40]
)
def test_what_is_damaged_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Kept.model_validate({"samples": text})


def test_a_few_bytes_do_not_fill_memory() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(100 << 20), 9)).decode()
    with pytest.raises(ValidationError, match="more samples"):
        Kept.model_validate({"samples": f"zlib-f64:{bomb}"})
