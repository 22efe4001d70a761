"""The pruning plan: what is removed, why, and what measuring it took."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cswap_deploy.records.value import Value

RatioOf = Literal["params", "channels", "macs"]

Verdict = Literal["critical", "neutral", "detrimental"]


class UnitEffect(Value):
    """One unit's last measurement before it was removed or kept for good."""

    unit: int
    true_class: float
    """Mean over images of (p_masked - p) / p."""
    harm: float = 0.0
    """Nats; what ranks units by ``true-class``; see :func:`causal.effects.likely_harm`."""
    kl: float
    """Mean over images of KL(p || p_masked), nats."""
    low: float
    """Lower end of the interval of ``true_class``."""
    high: float
    verdict: Verdict
    round: int
    """The round in which this was measured, from 1; 0 where it was not."""
    serves: tuple[int, ...] = ()
    """Classes that removing the unit significantly hurts, strongest first."""
    harms: tuple[int, ...] = ()
    """Classes that removing it significantly helps, strongest first."""
    images: int | None = None
    """On how many the effect was measured, where the plan says; for the others it was estimated."""


class GroupPlan(Value):
    """What happens to the units of one coupled set of layers."""

    name: str
    """Name of the group's root layer."""
    kind: Literal["channels", "heads", "neurons"]
    units: int
    kept: tuple[int, ...]
    """Indices of the units that stay, ascending, in the dense model's numbering."""
    effects: tuple[UnitEffect, ...] = ()


class Size(Value):
    """How large a network is."""

    units: int
    params: int
    macs: int
    """Multiply-accumulates for one image."""


class RoundLog(Value):
    """One round of measure-and-remove."""

    round: int
    measured: int
    """Units whose effect was measured."""
    forwards: int = 0
    """Masked forwards that this took: one for each unit and image."""
    forwards_exact: int = 0
    """Those of measuring the same units on every image."""
    removed: int
    """Units removed in this round."""
    params: int
    """Parameters left."""
    order: str = "effect"
    """Which order gave the set that was removed."""
    kl: float | None = None
    """That set's own effect once the network had taken over: mean KL divergence from the dense
    network (nats), on calibration images that it was not solved on."""
    ridge: float | None = None
    """Of the layers solved again in this round."""
    seconds: float


class ScoringCost(Value):
    """What measuring the effects took, over all rounds."""

    measuring: str
    """``exact``, ``adaptive`` or ``bf16``."""
    images: int
    """On which each unit's effect is known in a round."""
    forwards: int
    """Masked forwards in float32, one for each unit and image."""
    forwards_exact: int
    """What measuring the same units on all of these images would have taken."""


class PrunePlan(Value):
    """Everything that turns the dense network into the pruned one, except the weights."""

    schema_version: Literal[1] = 1
    criterion: str
    """``cswap`` or a baseline's name."""
    settings: dict[str, Any]
    ratio_requested: float
    ratio_of: RatioOf
    dense: Size
    pruned: Size
    groups: tuple[GroupPlan, ...]
    excluded: dict[str, str] = Field(default_factory=dict)
    """Root layer -> why its units cannot be removed."""
    biased: tuple[str, ...] = ()
    """Layers that gained a bias to hold what was folded into them."""
    refitted: tuple[str, ...] = ()
    """Layers whose weights were solved again."""
    producers: tuple[str, ...] = ()
    """Layers whose remaining units took over, by solution, what the removed ones carried."""
    rounds: tuple[RoundLog, ...] = ()
    alpha: float = 0.05
    """False-discovery rate of the verdicts."""

    @property
    def scoring(self) -> ScoringCost | None:
        """What measuring took; ``None`` where nothing was measured."""
        forwards = sum(r.forwards for r in self.rounds)
        if not forwards:
            return None
        return ScoringCost(
            measuring=str(self.settings.get("measuring", "exact")),
            images=int(self.settings["scoring_samples"]),
            forwards=forwards,
            forwards_exact=sum(r.forwards_exact for r in self.rounds),
        )

    def effective(self, of: RatioOf) -> float:
        """The fraction really removed."""
        total = {
            "params": (self.dense.params, self.pruned.params),
            "channels": (self.dense.units, self.pruned.units),
            "macs": (self.dense.macs, self.pruned.macs),
        }[of]
        return 1.0 - total[1] / total[0] if total[0] else 0.0
