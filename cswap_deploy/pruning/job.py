"""One pruning: what it works on, with which settings, and where effects are measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cswap_deploy.causal.cost import (
    FEWEST_IMAGES,
    MOST_IMAGES,
    affordable_forwards,
    affordable_images,
    budgets,
    loop_macs,
)
from cswap_deploy.causal.measurement import LocalMeasurement, MeasurementFactory
from cswap_deploy.causal.memory import Budget
from cswap_deploy.config import PruneConfig
from cswap_deploy.data.calibration import Calibration
from cswap_deploy.progress import Phases, Silent
from cswap_deploy.pruning.importance import Importance
from cswap_deploy.pruning.prepare import Prepared
from cswap_deploy.pruning.timing import TimedDevice


@dataclass(frozen=True, slots=True)
class Backend:
    """Where effects are measured: this process or workers."""

    measurements: MeasurementFactory = LocalMeasurement
    budget: Budget = field(default_factory=Budget.of)
    """Memory; a third of what is free unless said."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What ``auto`` comes to for one network and calibration set."""

    path: tuple[float, ...]
    """The ratio that each round ends at, to the one that is asked for."""
    scoring_samples: int
    """Images that each unit's effect is known on, in each round."""
    measuring: Literal["exact", "bf16", "adaptive"]
    most_forwards: int | None
    """Masked forwards of the first round, one for each unit and image; later rounds may take
    ``cost.LATER_ROUNDS`` of it. ``None``: no limit."""

    @property
    def rounds(self) -> int:
        """How many there are."""
        return len(self.path)

    def called(self, number: int) -> str:
        """What a round is called, ``round 2/4``."""
        return f"round {number}/{self.rounds}"


def ratios_by_round(config: PruneConfig, rounds: int) -> tuple[float, ...]:
    """The ratio that each round ends at: even steps to the first result, then one for each."""
    first, *others = config.waypoints or (config.ratio,)
    steps = max(1, rounds - len(others))
    return (*(first * ((done + 1) / steps) for done in range(steps)), *others)


@dataclass(frozen=True, slots=True)
class Job:
    """What one pruning works with, in all of its rounds."""

    network: Prepared
    """Used up: its units are masked and its sizes counted down."""
    calibration: Calibration
    config: PruneConfig
    importance: Importance
    """Ranks the units; :func:`importance.importance_of` the criterion, or another."""
    seed: int = 0
    backend: Backend = field(default_factory=Backend)
    progress: Phases = field(default_factory=Silent)
    device: TimedDevice | None = None
    """Where latency is the aim: measures what rounds have come to."""
    resolved: Resolved = field(init=False)

    @property
    def compares(self) -> bool:
        """Whether rounds try several candidates; without images there is one."""
        return self.importance.needs_images and self.config.select == "set"

    def finishes(self, number: int) -> bool:
        """Whether what a round leaves is a result: the last one's, and those of waypoints."""
        return self.resolved.path[number - 1] in (*self.config.waypoints, self.config.ratio)

    def __post_init__(self) -> None:
        found = resolve(self.config, self.network, len(self.calibration.images), self.importance)
        object.__setattr__(self, "resolved", found)


def resolve(
    config: PruneConfig, network: Prepared, images: int, importance: Importance
) -> Resolved:
    """Fill in what was left to the package, from what measuring costs on so many images."""
    graph, groups = network.graph, network.groups
    path = ratios_by_round(config, config.rounds if importance.needs_images else 1)
    rounds = len(path)
    path = path[: path.index(config.ratio) + 1]
    if config.scoring_samples != "auto":
        count = config.scoring_samples
    elif config.measuring == "exact":
        count = affordable_images(graph, groups, rounds=rounds)
    else:  # every round on other images, as far as there are enough
        count = min(MOST_IMAGES, max(FEWEST_IMAGES, images // rounds))
    count = min(count, images)
    if config.measuring != "auto":
        return Resolved(path, count, config.measuring, None)
    exact, adaptive = budgets(graph, images=images)
    if loop_macs(graph, groups, images=count, rounds=rounds) <= exact:
        return Resolved(path, count, "exact", None)
    most = affordable_forwards(graph, groups, rounds=rounds, macs=adaptive)
    return Resolved(path, count, "adaptive", most)
