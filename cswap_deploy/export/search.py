"""The fewest layers to leave out so that a network predicts as before."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

Passes = Callable[[frozenset[str]], bool]


def smallest_set(candidates: Sequence[str], passes: Passes, *, tests: int) -> frozenset[str]:
    """A set that passes, and from which nothing can be dropped one by one.

    Delta debugging: the set is cut into parts; a part that passes alone, or the rest without it,
    takes the set's place; where neither does, the parts are halved.

    Args:
        candidates: All together pass.
        passes: Whether leaving exactly these alone is enough.
        tests: Largest number of calls of ``passes``; when they are spent the set reached is
            returned, which passes but may hold too much.

    Source:
        Zeller and Hildebrandt 2002, "Simplifying and Isolating Failure-Inducing Input", ddmin.
    """
    left, parts = list(candidates), 2
    while len(left) > 1 and tests > 0:
        size = -(-len(left) // parts)
        chunks = [left[i : i + size] for i in range(0, len(left), size)]
        trials = [(chunk, 2) for chunk in chunks]
        if len(chunks) > 2:
            rests = [[name for name in left if name not in chunk] for chunk in chunks]
            trials += [(rest, max(parts - 1, 2)) for rest in rests]
        for trial, then in trials:
            if tests <= 0:
                return frozenset(left)
            tests -= 1
            if passes(frozenset(trial)):
                left, parts = trial, then
                break
        else:
            if size == 1:
                break
            parts = min(2 * parts, len(left))
    return frozenset(left)


def shortest_prefix(ranked: Sequence[str], passes: Passes) -> frozenset[str]:
    """The fewest of the first that pass, by bisection: all do, and more is taken to be no worse."""
    sizes = range(len(ranked))
    return frozenset(
        ranked[: bisect_left(sizes, True, key=lambda size: passes(frozenset(ranked[:size])))]
    )
