"""The pruning plan: what is removed, why, and what it took to measure that."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cswap_deploy.config import RatioOf, Task
from cswap_deploy.records.value import Fraction, Value

Verdict = Literal["critical", "neutral", "detrimental"]


class UnitEffect(Value):
    """One unit's latest effect before it was removed or kept for good."""

    unit: int
    true_class: float | None
    """Mean over images of (p_masked - p) / p; ``None``, as the interval and the verdict, for a
    task without classes."""
    harm: float = 0.0
    """Nats; ranks with ``--effect true-class``; see :func:`causal.effects.likely_harm`."""
    kl: float
    """Mean over images of the effect on the outputs: KL(p || p_masked) in nats, or what
    ``causal.tasks`` says of the plan's task."""
    low: float | None
    """Lower end of the interval of ``true_class``."""
    high: float | None
    verdict: Verdict | None
    round: int
    """The round in which this was measured, from 1; 0 where it was not."""
    serves: tuple[int, ...] = ()
    """Classes that removing the unit significantly hurts, strongest first."""
    harms: tuple[int, ...] = ()
    """Classes that removing it significantly helps, strongest first."""
    images: int | None = None
    """On how many the effect was measured; on the round's other images it was estimated."""


class GroupPlan(Value):
    """What happens to the units of one coupled set of layers."""

    name: str
    """Name of the group's root layer."""
    kind: Literal["channels", "heads", "neurons", "branch"]
    units: int
    kept: tuple[int, ...]
    """Indices of the units that stay, ascending, in the dense model's numbering."""
    effects: tuple[UnitEffect, ...] = ()
    attributes: tuple[str, ...] = ()
    """Numbers in the network's modules that count these units, ``blocks.0.attn.num_heads``."""

    @model_validator(mode="after")
    def _among_the_units(self) -> Self:
        ends = (-1, *self.kept, self.units)
        if not all(one < after for one, after in pairwise(ends)):
            raise ValueError(f"{self.name}: what is kept is not among its {self.units} units")
        return self


class Size(Value):
    """How large a network is."""

    units: int
    params: int
    macs: int
    """Multiply-accumulates for one image."""
    latency_ms: float | None = None
    """Of a call on the device that was aimed at, as its latency model says; ``None`` without."""

    def amount(self, of: RatioOf) -> float:
        """The quantity a ratio speaks of."""
        found = {
            "params": self.params, "channels": self.units, "macs": self.macs,
            "latency": self.latency_ms,
        }[of]  # fmt: skip
        assert found is not None, "no latency model"
        return found


class LayerTime(Value):
    """What a layer takes of a call, as the latency model says."""

    layer: str
    """Dotted name of the module that its nodes belong to, or of a node that belongs to none."""
    dense_ms: float
    pruned_ms: float


class LatencyByLayer(Value):
    """Where the time of a call went, where latency was an aim."""

    layers: tuple[LayerTime, ...]
    """In the order in which they run."""
    depth_ms: float
    """What was saved with whole branches; the rest by width."""


class TimedTry(Value):
    """A network that was timed on the way: its speed-up by the model, which never saw it."""

    predicted: float
    measured: float


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
    candidate: str = "effect"
    """Which of the candidates was removed."""
    kl: float | None = None
    """Its effect as a whole after the refit: mean KL divergence from the dense network (nats), or
    what takes its place for the plan's task, on calibration images that the refit did not see;
    ``None`` where it was not measured."""
    speedup: float | None = None
    """Of the network after this round over the dense one, measured in turn on the device that was
    aimed at; ``None`` where it was not measured."""
    tries: tuple[TimedTry, ...] = ()
    """What was timed for that, in this order."""
    seconds: float


def _round(told: dict[str, Any]) -> dict[str, Any]:
    """A round as plans before schema 5 have it."""
    told = {name: value for name, value in told.items() if name != "ridge"}
    return told | ({"candidate": told.pop("order")} if "order" in told else {})


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


class RecoveryCheck(Value):
    """A look at the held-out images in the middle of a recovery."""

    seconds: float
    """Of training before it."""
    divergence: float
    """Mean KL divergence from the dense network's prediction (nats); without classes, squared
    change of the outputs over their squared size."""
    agreement: Fraction | None = None
    """Images that get the dense network's class."""


class Recovery(Value):
    """Training after pruning, where it was asked for: towards the dense network, without labels."""

    minutes: float
    """Asked for."""
    seconds: float
    """Taken; less where nothing was gained any more."""
    steps: int
    images: int
    held_out: int
    """Calibration images that judged, and were not trained on."""
    divergence_before: float
    divergence: float
    """As in :class:`RecoveryCheck`, of the weights that were kept."""
    agreement_before: Fraction | None = None
    agreement: Fraction | None = None
    checks: tuple[RecoveryCheck, ...]


class PrunePlan(Value):
    """Everything that turns the dense network into the pruned one, except the weights."""

    schema_version: Literal[7] = 7
    """Earlier ones are read as this."""
    settings: dict[str, Any]
    """Those of ``config.PruneConfig`` that shape a plan, the seed, and what ``auto`` came to."""
    task: Task = "classify"
    """What the network's outputs are, and so what an effect is; see ``causal.tasks``."""
    dense: Size
    pruned: Size
    groups: tuple[GroupPlan, ...]
    excluded: dict[str, str] = Field(default_factory=dict)
    """Root layer -> why its units cannot be removed."""
    biased: tuple[str, ...] = ()
    """Layers that gained a bias to hold what was folded into them."""
    refitted: tuple[str, ...] = ()
    """Layers whose weights were refitted."""
    producers: tuple[str, ...] = ()
    """Layers whose remaining units were reconstructed to carry what the removed ones did."""
    starved: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Refitted layer -> its rows and its unknowns, where the images gave fewer rows: the ridge then
    keeps it near the weights that it had."""
    rounds: tuple[RoundLog, ...] = ()
    latency: LatencyByLayer | None = None
    """``None`` where latency was no aim."""
    recovery: Recovery | None = None
    """``None`` where the network was not trained, as is the default."""

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_schema(cls, told: Any) -> Any:
        """2 says once what was asked, 5 searches no ridge; what others added has defaults."""
        version = told.get("schema_version", 7) if isinstance(told, dict) else 7
        if not isinstance(version, int) or not 1 <= version < 7:
            return told
        told = dict(told)
        if version == 1:
            asked = {n: told.pop(n) for n in ("criterion", "ratio_of", "alpha") if n in told}
            asked["ratio"] = told.pop("ratio_requested", None)
            told["settings"] = dict(told.get("settings") or {}) | asked
        rounds = told.get("rounds")
        if version < 5 and isinstance(rounds, list):
            told["rounds"] = [_round(each) if isinstance(each, dict) else each for each in rounds]
        return told | {"schema_version": 7}

    @property
    def criterion(self) -> str:
        """The importance that ranked the units; ``none`` where nothing was to be removed."""
        return str(self.settings["criterion"])

    @property
    def ratio_requested(self) -> float:
        """The fraction that was asked for."""
        return float(self.settings["ratio"])

    @property
    def ratio_of(self) -> RatioOf:
        """What the ratio is a fraction of."""
        of: RatioOf = self.settings["ratio_of"]
        return of

    @property
    def alpha(self) -> float:
        """False-discovery rate of the verdicts."""
        return float(self.settings["alpha"])

    @property
    def scoring(self) -> ScoringCost | None:
        """What measuring took; ``None`` where nothing was measured."""
        forwards = sum(r.forwards for r in self.rounds)
        if not forwards:
            return None
        return ScoringCost(
            measuring=str(self.settings.get("measuring", "exact")),
            images=int(self.settings["scoring_samples"]), forwards=forwards,
            forwards_exact=sum(r.forwards_exact for r in self.rounds),
        )  # fmt: skip

    @property
    def removed(self) -> dict[RatioOf, float]:
        """What a ratio can be of -> the fraction really removed; latency where it was an aim."""
        known: list[RatioOf] = ["params", "channels", "macs"]
        if self.dense.latency_ms is not None:
            known.append("latency")
        return {of: self.effective(of) for of in known}

    def effective(self, of: RatioOf) -> float:
        """The fraction really removed."""
        total = self.dense.amount(of)
        return 1.0 - self.pruned.amount(of) / total if total else 0.0
