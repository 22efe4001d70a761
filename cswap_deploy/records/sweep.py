"""A sweep: one network at several sizes, and others beside it, measured in one loop."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cswap_deploy.config import RatioOf
from cswap_deploy.records.measurements import Accuracy, AccuracyChange, Device, Latency
from cswap_deploy.records.value import Fraction, Value


class SweepPoint(Value):
    """One network of a sweep."""

    label: str
    """What was asked, as ``1.5x`` or ``0.4``; ``dense``; or another network's name."""
    kind: Literal["dense", "pruned", "other"]
    bundle: str = ""
    """Folder in the sweep's; empty where it was not kept."""
    params: int
    macs: int
    accuracy: Accuracy | None = None
    """Top-1 of the engine; ``None`` for a task without classes."""
    change: AccuracyChange | None = None
    """Against the dense network; ``None`` also for other networks."""
    error_db: float | None = None
    """Without classes: the worst output's error."""
    latency: Latency | None = None
    """``None`` where the engine does not run on this machine."""
    speedup: float | None = None
    """Over the dense network: median of the pairs of calls that alternated; its 95 % interval."""
    speedup_low: float | None = None
    speedup_high: float | None = None

    @property
    def agreement(self) -> Fraction | None:
        """Share of the images that get the dense network's class."""
        return None if self.change is None else self.change.agreement


class Sweep(Value):
    """What a sweep found."""

    schema_version: Literal[1] = 1
    created: str
    """ISO 8601, UTC."""
    tool_version: str
    model: str
    target: str
    """Whose engines were compared."""
    ratio_of: RatioOf
    points: tuple[SweepPoint, ...]
    """The dense network, what it was pruned to, from the largest on, and the others."""
    missed: dict[str, str] = Field(default_factory=dict)
    """What was asked and could not be had -> why."""
    pick: str = ""
    """The condition that one of the points was picked by."""
    picked: str = ""
    """Its label."""
    settings: dict[str, Any]
    """Of the build, by name."""
    device: Device
    seconds: float
    """That the whole sweep took."""

    def point(self, label: str) -> SweepPoint:
        """The point of a label."""
        return next(point for point in self.points if point.label == label)
