"""What comparing two engines, or measuring several, came to."""

from __future__ import annotations

from typing import Literal

from cswap_deploy.records.measurements import AccuracyChange, Device, Latency
from cswap_deploy.records.value import Value

Verdict = Literal["better", "same", "worse", "inconclusive"]


class Ratio(Value):
    """Head over base; a confidence interval with it, all looks at it counted."""

    value: float
    low: float
    high: float
    epochs: tuple[float, ...] = ()
    """Medians of the calls between two loadings, in order; none for what is no time."""
    calls: int = 0
    """Of each."""
    seconds: float = 0.0


class Compared(Value):
    """One property of two engines."""

    what: str
    """``latency``, ``accuracy``, ``size``."""
    verdict: Verdict
    text: str
    """The same for people."""
    ratio: Ratio | None = None
    """Of latencies or sizes."""
    change: AccuracyChange | None = None
    """Of accuracy: ``dense`` is the base here, ``pruned`` the head."""
    p_value: float | None = None
    """McNemar's exact test that both are right equally often."""


class Comparison(Value):
    """``cswap-deploy compare BASE HEAD``."""

    schema_version: Literal[1] = 1
    created: str
    tool_version: str
    base: str
    head: str
    target: str
    batch: int
    threads: int | None
    min_effect: float
    """Fraction of the latency that counts."""
    max_drop: float
    """Fraction of top-1 that counts."""
    parts: tuple[Compared, ...]
    device: Device

    @property
    def verdict(self) -> Verdict:
        """Of all parts: worse where one is; else inconclusive where one is."""
        found = {part.verdict for part in self.parts}
        order: tuple[Verdict, ...] = ("worse", "inconclusive", "better", "same")
        return next(each for each in order if each in found)


class BenchRow(Value):
    """One engine at one batch."""

    label: str
    target: str
    latency: Latency
    ratio: Ratio
    """To the first of its batch."""
    throughput: Ratio
    """Images a second, all calls counted; an interval as of a ratio."""
    noise: tuple[str, ...]
    """What disturbed it, in words."""


class Bench(Value):
    """``cswap-deploy bench``."""

    schema_version: Literal[1] = 1
    created: str
    tool_version: str
    rows: tuple[BenchRow, ...]
    device: Device


class SelfTest(Value):
    """``cswap-deploy bench --self-test``: an engine with itself."""

    schema_version: Literal[1] = 1
    created: str
    ratio: Ratio
    spread: float
    """Standard deviation of the logarithms of the epochs' ratios: this machine's noise."""
    smallest: float
    """Effect that a comparison of the same length tells from none, a fraction."""
    device: Device
