"""What disturbed a measurement, in words: a busy machine, drift, two speeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cswap_deploy.records.amounts import percent

_SLOW = 2.0
"""Calls that take so many medians were held up by something else."""
_BUSY = 0.01
_DRIFT = 0.05
_CERTAIN = 1e-3
"""Of the rank correlation that calls drift."""
_BLOCKS = 20
_APART = 0.08
"""Relative distance of two speeds that are told apart."""
_SHARE = 0.15
"""Of the calls, in the lesser of two speeds."""
_VALLEY = 0.5
"""Density between two speeds, of that at the lower of both."""
_FEW = 60
"""Calls below which nothing is said but of the busy."""


def noise_in(samples_ms: Sequence[float]) -> tuple[str, ...]:
    """Sentences on what disturbed calls, in the order taken; none where nothing did.

    * *busy*: over 1 % of the calls took over twice the median.
    * *drift*: the last third differs from the first by over 5 %, and time and rank go together
      (Kendall's tau over blocks, p < .001).
    * *two speeds*: the density of the calls has two peaks over 8 % apart, each with over 15 % of
      them, and less than half of the lower one's height between them.
    """
    times = np.asarray(samples_ms, dtype=float)
    median = float(np.median(times))
    told = []
    slow = float((times > _SLOW * median).mean())
    if slow > _BUSY:
        told.append(
            f"the machine was busy: {percent(slow, 0)} of the calls took over twice the median"
        )
    if len(times) >= _FEW:
        told += [words for words in (_drift(times), _two_speeds(times, median)) if words]
    return tuple(told)


def _drift(times: np.ndarray) -> str:
    from scipy.stats import kendalltau

    blocks = [float(np.median(part)) for part in np.array_split(times, _BLOCKS)]
    third = len(times) // 3
    change = float(np.median(times[-third:]) / np.median(times[:third]) - 1)
    if abs(change) < _DRIFT or kendalltau(range(_BLOCKS), blocks).pvalue > _CERTAIN:
        return ""
    how = "slower" if change > 0 else "faster"
    return f"calls drifted: the last third is {percent(abs(change), 0)} {how} than the first"


def _two_speeds(times: np.ndarray, median: float) -> str:
    from scipy.signal import argrelmax
    from scipy.stats import gaussian_kde

    logs = np.log(times[times < _SLOW * median])
    if np.ptp(logs) == 0:
        return ""
    grid = np.linspace(logs.min() - 0.05, logs.max() + 0.05, 512)
    # Scott's rule is for one peak; half of it keeps two apart.
    density = gaussian_kde(logs, bw_method=0.5 * len(logs) ** -0.2)(grid)
    peaks = sorted(argrelmax(density)[0], key=lambda at: -density[at])[:2]
    if len(peaks) < 2:
        return ""
    first, last = sorted(peaks)
    valley = first + int(density[first : last + 1].argmin())
    lower = float((logs < grid[valley]).mean())
    apart = float(np.exp(grid[last] - grid[first]) - 1)
    deep = density[valley] < _VALLEY * min(density[first], density[last])
    if not deep or apart < _APART or min(lower, 1 - lower) < _SHARE:
        return ""
    return (
        f"calls have two speeds: {percent(lower, 0)} around {np.exp(grid[first]):.3g} ms, the "
        f"others around {np.exp(grid[last]):.3g} ms"
    )
