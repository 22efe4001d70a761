"""How the loop measures and removes, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cswap_deploy.causal.interventions import Intervention
from cswap_deploy.network.units import Group
from cswap_deploy.pruning.trials import FIRST_RIDGE
from cswap_deploy.records.plan import RatioOf, RoundLog, Verdict


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure and remove. Defaults are the command's; see ``config.BuildConfig``."""

    ratio: float
    ratio_of: RatioOf = "params"
    rounds: int = 4
    scoring_samples: int = 128
    effect: Literal["kl", "true-class"] = "kl"
    intervention: Intervention = "predicted"
    alpha: float = 0.05
    min_effect: float = 0.01
    refit: bool = True
    refit_producers: bool = True
    mix: bool = True
    select: Literal["set", "unit"] = "set"
    measuring: Literal["exact", "bf16", "adaptive"] = "exact"
    error_rate: float = 0.05
    most_forwards: int | None = None
    """Of adaptive measuring in the first round; later ones may take ``cost.LATER_ROUNDS`` of it."""
    seed: int = 0


@dataclass(slots=True)
class Measurement:
    """A unit's latest effect."""

    true_class: float
    harm: float
    kl: float
    low: float
    high: float
    verdict: Verdict
    round: int
    serves: tuple[int, ...] = ()
    harms: tuple[int, ...] = ()
    images: int | None = None
    """On how many it was measured; ``None`` in records that do not say."""


@dataclass(slots=True)
class State:
    """Where the loop stands; enough, with the module's weights, to go on after an interruption."""

    round: int = 0
    removed: dict[str, list[int]] = field(default_factory=dict)
    measured: dict[str, dict[int, Measurement]] = field(default_factory=dict)
    rounds: list[RoundLog] = field(default_factory=list)
    refitted: tuple[str, ...] = ()
    not_refitted: tuple[str, ...] = ()
    producers: tuple[str, ...] = ()
    """Layers whose units took over what others carried."""
    ridge: float = FIRST_RIDGE
    """Of the last round's refit."""

    def costs(self, group: Group, settings: Settings) -> np.ndarray:
        """(units,) the latest costs; zero where nothing was measured yet."""
        latest = self.measured.get(group.name)
        if latest is None:
            return np.zeros(group.units)
        kl = settings.effect == "kl"
        return np.array([latest[u].kl if kl else latest[u].harm for u in range(group.units)])
