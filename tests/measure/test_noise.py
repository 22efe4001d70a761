"""What disturbed a measurement, in words."""

from __future__ import annotations

import numpy as np

from cswap_deploy.measure.noise import noise_in

RNG = np.random.default_rng(0)
QUIET = 5.0 * RNG.lognormal(0, 0.02, size=400)


def test_quiet_calls_have_nothing_to_tell() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        assert noise_in(5.0 * rng.lognormal(0, 0.03, size=400)) == ()
        assert noise_in(5.0 + rng.exponential(0.3, size=400)) == ()
    assert noise_in([3.0] * 200) == ()
    assert noise_in([1.0, 1.1]) == ()


def test_a_busy_machine() -> None:
    calls = QUIET.copy()
    calls[::6] *= 2.5
    assert noise_in(calls) == ("the machine was busy: 17% of the calls took over twice the median",)


def test_drift() -> None:
    (words,) = noise_in(QUIET * np.linspace(1, 1.3, 400))
    assert words.startswith("calls drifted: the last third is ")
    assert words.endswith("% slower than the first")
    (words,) = noise_in(QUIET * np.linspace(1.3, 1, 400))
    assert words.endswith("% faster than the first")


def test_two_speeds() -> None:
    calls = QUIET * np.where(np.random.default_rng(1).random(400) < 0.4, 1.25, 1.0)
    (words,) = noise_in(calls)
    assert words.startswith("calls have two speeds: ")
    assert "around 4.99 ms" in words
    assert "around 6.2" in words
