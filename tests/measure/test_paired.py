"""Two engines in alternation: scripted sessions on a clock of their own, so that nothing is left to
the machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from cswap_deploy.measure import paired
from cswap_deploy.measure.paired import Contender, paired_ratio
from cswap_deploy.records.comparison import Ratio
from cswap_deploy.runtime.session import Floats, Session

IMAGES = np.zeros((1, 1), dtype=np.float32)


class Clock:
    """Nanoseconds that pass only where a script says so."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []
        self.closed = 0


class Scripted(Session):
    """A session whose calls take what a function says, in milliseconds."""

    threads, provider = 1, "script"

    def __init__(self, clock: Clock, name: str, takes: Callable[[int], float]) -> None:
        self._clock, self._name, self._takes = clock, name, takes
        # Where the weights lie: another speed each time.
        self._load = float(RNG.normal(0, 0.01))

    def run(self, images: Floats) -> Floats:
        self._clock.calls.append(self._name)
        self._clock.now += int(1e6 * self._takes(self._clock.now) * math.exp(self._load))
        return images

    def close(self) -> None:
        self._clock.closed += 1


RNG = np.random.default_rng(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    global RNG  # noqa: PLW0603
    RNG = np.random.default_rng(0)
    one = Clock()
    fake = SimpleNamespace(perf_counter=lambda: one.now / 1e9, perf_counter_ns=lambda: one.now)
    monkeypatch.setattr(paired, "time", fake)
    return one


def contender(clock: Clock, name: str, takes: Callable[[int], float]) -> Contender:
    return Contender(name, lambda: Scripted(clock, name, takes), IMAGES)


def never(_: Ratio) -> bool:
    return False


def noisy(ms: float, seed: int = 0) -> Callable[[int], float]:
    """With a machine that is slow for stretches, and calls that are held up."""
    rng = np.random.default_rng(seed)

    def takes(now: int) -> float:
        busy = 1.6 if (now // 300_000_000) % 2 else 1.0
        held_up = 8.0 if rng.random() < 0.1 else 1.0
        return ms * busy * held_up * float(rng.lognormal(0, 0.05))

    return takes


def test_calls_alternate_and_every_epoch_loads_anew(clock: Clock) -> None:
    found = paired_ratio(
        contender(clock, "a", lambda _: 10.0), contender(clock, "b", lambda _: 10.0),
        decided=lambda _: True, at_most=60,
    )  # fmt: skip
    assert len(found.epochs) == paired.LOOKS[0]
    assert clock.closed == 2 * len(found.epochs)
    counted = clock.calls[2 * paired._WARM_CALLS :][:4]
    assert counted == ["a", "b", "b", "a"]
    assert clock.calls.count("a") == clock.calls.count("b")


@pytest.mark.parametrize("ratio", [1.0, 1.05, 0.8])
def test_the_interval_holds_the_truth_on_a_busy_machine(clock: Clock, ratio: float) -> None:
    held = 0
    for seed in range(20):
        found = paired_ratio(
            contender(clock, "a", noisy(5.0, seed)),
            contender(clock, "b", noisy(5.0 * ratio, 100 + seed)), decided=never, at_most=10,
        )  # fmt: skip
        held += found.low <= ratio <= found.high
        assert found.high / found.low < 1.15
    assert held >= 19


def test_time_is_kept_and_a_few_epochs_are_always_made(clock: Clock) -> None:
    found = paired_ratio(
        contender(clock, "a", lambda _: 5.0), contender(clock, "b", lambda _: 5.0),
        decided=never, at_most=10,
    )  # fmt: skip
    assert found.seconds <= 10
    slow = paired_ratio(
        contender(clock, "a", lambda _: 900.0), contender(clock, "b", lambda _: 900.0),
        decided=never, at_most=10,
    )  # fmt: skip
    assert len(slow.epochs) == 3


def test_it_stops_at_the_first_look_that_decides(clock: Clock) -> None:
    looks: list[int] = []

    def decided(found: Ratio) -> bool:
        looks.append(len(found.epochs))
        return len(looks) == 3

    paired_ratio(
        contender(clock, "a", lambda _: 2.0), contender(clock, "b", lambda _: 2.0),
        decided=decided, at_most=600,
    )  # fmt: skip
    assert looks == list(paired.LOOKS[:3])


def test_an_engine_that_fails_gives_both_back(clock: Clock) -> None:
    def fails(now: int) -> float:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        paired_ratio(
            contender(clock, "a", lambda _: 2.0), contender(clock, "b", fails),
            decided=never, at_most=10,
        )  # fmt: skip
    assert clock.closed == 2
