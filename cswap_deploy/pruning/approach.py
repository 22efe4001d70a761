"""From networks that were timed to the one that is timed next, so that a latency is really met.

The device's model says what a ranking has to remove; a small network's time has steps that it does
not know. So targets close in on the latency from both sides, and where a single step leads past it,
that step waits and others go in its place. At last one step of one group goes or comes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cswap_deploy.pruning.allocation import Removal
from cswap_deploy.pruning.candidates import Choice

_PARTS = (1 / 2, 1 / 4, 3 / 4, 1 / 8, 7 / 8)
"""Where between two targets others are looked for."""
_FURTHER = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
"""How far past a target that was to be enough others are, as a fraction of it."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A candidate, and what a call of its network takes of the dense one's time."""

    choice: Choice
    fraction: float
    predicted: float
    """The same by the device's model."""


def next_to_time(tried: Sequence[Timed], wanted: float) -> Choice | None:
    """A candidate that may be nearer to a latency than those that were timed.

    Args:
        tried: At least one, in order; the last one is gone on with.
        wanted: What a call should take, of what one of the dense network does.

    Returns:
        One of other widths than all of them; ``None`` where there is none.
    """
    last = tried[-1].choice
    if last.stepped:
        return _a_step_away(tried, wanted)
    known = [_widths(each.choice) for each in tried]
    alike = [each for each in tried if each.choice.goal.limits is last.goal.limits]
    slow, fast = _next_to(wanted, alike, _target)
    rescaled = last.goal.target * wanted / tried[-1].fraction
    if (choice := _first_new(last, _targets(rescaled, slow, fast), known)) is not None:
        return choice
    if slow is not None and fast is not None:
        waiting = _without_the_step(slow, fast)
        rescaled = slow.choice.goal.target * wanted / slow.fraction
        if (choice := _first_new(waiting, _targets(rescaled, slow, None), known)) is not None:
            return choice
    return _a_step_away(tried, wanted)


def _without_the_step(slow: Timed, fast: Timed) -> Choice:
    """Nothing is left between the two: groups that only the quicker one takes more of wait."""
    goal = slow.choice.goal
    floors = {**goal.limits.floors}
    for group in goal.groups:
        gone = slow.choice.gone.get(group.name, [])
        if len(fast.choice.gone.get(group.name, [])) > len(gone):
            floors[group.name] = len(goal.remaining(group)) - len(gone)
    return replace(slow.choice, goal=replace(goal, limits=replace(goal.limits, floors=floors)))


def _a_step_away(tried: Sequence[Timed], wanted: float) -> Choice | None:
    """Where the ranking has nothing: one step of one group from the nearest that were timed.

    What the model says that such a step changes is believed more than what it says of networks.
    """
    slow, fast = _next_to(wanted, tried, _fraction)
    found: list[tuple[float, Choice]] = []
    if slow is not None:
        on = slow.choice.goal.one_step_on(slow.choice.gone, slow.choice.ranking)
        found += _stepped(slow, on, wanted)
    if fast is not None:
        found += _stepped(fast, fast.choice.goal.one_step_back(fast.choice.gone), wanted)
    known = [_widths(each.choice) for each in tried]
    new = [each for each in found if _widths(each[1]) not in known]
    return min(new, key=lambda each: each[0])[1] if new else None


def _stepped(
    timed: Timed, removals: Iterator[Removal], wanted: float
) -> Iterator[tuple[float, Choice]]:
    """Those that change the time by the model, each with how far from what is wanted it may be."""
    goal = timed.choice.goal
    now = goal.without(timed.choice.gone).amount(goal.of)
    for gone in removals:
        then = goal.without(gone).amount(goal.of)
        if then != now:
            off = abs(math.log(timed.fraction * then / now / wanted))
            yield off, replace(timed.choice, gone=gone, stepped=True)


def _next_to(
    wanted: float, timed: Sequence[Timed], key: Callable[[Timed], float]
) -> tuple[Timed | None, Timed | None]:
    """The nearest that is slower than wanted, and the nearest that is not."""
    slow = min((each for each in timed if each.fraction > wanted), key=key, default=None)
    return slow, max((each for each in timed if each.fraction <= wanted), key=key, default=None)


def _first_new(choice: Choice, targets: Iterator[float], known: Sequence[object]) -> Choice | None:
    """The first that has other widths than those that are known."""
    candidates = (choice.at(target) for target in targets)
    return next((each for each in candidates if _widths(each) not in known), None)


def _targets(rescaled: float, slow: Timed | None, fast: Timed | None) -> Iterator[float]:
    """Targets to try, the likeliest first: within the two that were timed, or past the one."""
    if slow is not None and fast is not None:
        low, high = _target(fast), _target(slow)
        if low < rescaled < high:
            yield rescaled
        yield from (low + part * (high - low) for part in _PARTS if low < high)
    elif slow is not None:
        yield from (min(rescaled, _target(slow)) * part for part in _FURTHER)
    elif fast is not None:
        yield from (max(rescaled, _target(fast)) / part for part in _FURTHER)


def _widths(choice: Choice) -> dict[str, int]:
    """What decides its time: how many units of each group go."""
    return {name: len(units) for name, units in choice.gone.items() if units}


def _target(timed: Timed) -> float:
    return timed.choice.goal.target


def _fraction(timed: Timed) -> float:
    return timed.fraction
