"""Which few of many layers must be left alone for a network to predict as before."""

from __future__ import annotations

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

    Returns:
        In no order; empty only where ``candidates`` is.

    Source:
        Zeller and Hildebrandt 2002, "Simplifying and Isolating Failure-Inducing Input", ddmin.
    """
    left, parts = list(candidates), 2
    while len(left) > 1 and tests > 0:
        size = -(-len(left) // parts)
        chunks = [left[i : i + size] for i in range(0, len(left), size)]
        trials = [(chunk, 2) for chunk in chunks]
        if len(chunks) > 2:
            trials += [
                ([name for name in left if name not in set(chunk)], max(parts - 1, 2))
                for chunk in chunks
            ]
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
    """The fewest of the first that pass, by bisection.

    Args:
        ranked: What matters most comes first; all together pass.
        passes: As for :func:`smallest_set`; more left alone is taken to be no worse.

    Returns:
        The prefix.
    """
    low, high = 0, len(ranked)  # high passes
    while low < high:
        middle = (low + high) // 2
        if passes(frozenset(ranked[:middle])):
            high = middle
        else:
            low = middle + 1
    return frozenset(ranked[:high])
