"""Two engines against each other on this machine: paired calls, stopped as soon as they can tell.

Calls alternate in the order A B B A, so that drift and the order of calls cancel; of the two calls
of each the quicker counts, since one of them may be held up by something else. They come in
*epochs*. Each epoch loads both engines anew, because where an engine's weights happen to lie in
memory moves its speed by a percent for as long as it is loaded. An epoch's value is the median of
the logarithms of its ratios: whatever disturbs the machine for longer than a few calls disturbs
both.

The interval of the mean over epochs is Student's, and may be looked at a few times: each look has
its part of the error rate (Bonferroni), so that stopping early costs nothing of it.

Source:
    Georges, Buytaert & Eeckhout 2007, "Statistically rigorous Java performance evaluation", OOPSLA,
    section 3 (start-up noise is between invocations, not within them). Kalibera & Jones 2013,
    "Rigorous benchmarking in reasonable time", ISMM, section 6.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from cswap_deploy.measure.latency import no_collecting
from cswap_deploy.measure.statistics import mean_interval
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.comparison import Ratio
from cswap_deploy.runtime.session import Floats, Session

ERROR_RATE = 0.05
"""Of all looks together: how often an interval may miss the truth."""
LOOKS = (6, 9, 13, 19, 28, 40, 57, 80)
"""Epochs after which the interval is looked at; once more when time is up."""
_EPOCHS = LOOKS[-1]
_FEWEST_EPOCHS = 3
_EPOCH_SECONDS = 0.5
"""At least, of calls that are short; those of long calls are longer, as time allows."""
_LEAST_CALLS = 24
"""Of each engine in an epoch."""
_WARM_CALLS = 5


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine that can be loaded again and again."""

    label: str
    load: Callable[[], Session]
    images: Floats
    """(B, C, H, W), the batch of every call."""


def paired_ratio(
    base: Contender, head: Contender, *, decided: Callable[[Ratio], bool], at_most: float = 60.0,
    progress: Progress | None = None,
) -> Ratio:  # fmt: skip
    """What a call of one engine takes, of what one of another does.

    Args:
        base: The engine that is divided by.
        head: The other.
        decided: Whether an interval is narrow enough to stop.
        at_most: Seconds; a look that has begun is ended.
        progress: Told of the epochs.

    Returns:
        Head over base, at the last look; above one, head is slower.
    """
    progress = progress if progress is not None else Silent()
    begun = time.perf_counter()
    epochs: list[float] = []
    calls = 0
    progress.begin(f"comparing {head.label} with {base.label}", _EPOCHS)
    with no_collecting():
        while True:
            value, count = _epoch(base, head, swapped=len(epochs) % 2 == 1)
            epochs.append(value)
            calls += count
            progress.advance(1)
            elapsed = time.perf_counter() - begun
            one = elapsed / len(epochs)
            over = elapsed + one > at_most or len(epochs) == _EPOCHS
            if not (over or len(epochs) in LOOKS) or len(epochs) < _FEWEST_EPOCHS:
                continue
            found = _looked(epochs, calls, elapsed)
            if over or decided(found):
                progress.end()
                return found


def _looked(epochs: Sequence[float], calls: int, seconds: float) -> Ratio:
    level = 1 - ERROR_RATE / (len(LOOKS) + 1)
    low, high = mean_interval(epochs, level=level)
    return Ratio(
        value=math.exp(statistics.fmean(epochs)), low=math.exp(low), high=math.exp(high),
        epochs=tuple(math.exp(each) for each in epochs), calls=calls, seconds=round(seconds, 3),
    )  # fmt: skip


def _epoch(base: Contender, head: Contender, *, swapped: bool) -> tuple[float, int]:
    """Median of log(head / base), and how many calls of each it is of."""
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for which in ("head", "base") if swapped else ("base", "head"):
            session = (head if which == "head" else base).load()
            stack.callback(session.close)
            sessions[which] = session
        first, second = sessions["base"], sessions["head"]
        for _ in range(_WARM_CALLS):
            first.run(base.images)
            second.run(head.images)
        ratios: list[float] = []
        ends = time.perf_counter() + _EPOCH_SECONDS
        while 2 * len(ratios) < _LEAST_CALLS or time.perf_counter() < ends:
            a, b = _timed(first, base.images), _timed(second, head.images)
            d, c = _timed(second, head.images), _timed(first, base.images)
            ratios.append(math.log(min(b, d) / min(a, c)))
    return statistics.median(ratios), 2 * len(ratios)


def _timed(session: Session, images: Floats) -> float:
    begun = time.perf_counter_ns()
    session.timed(images)
    return float(max(1, time.perf_counter_ns() - begun))
