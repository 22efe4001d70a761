"""What a plan says about its units: verdicts, largest effects, classes served, the threshold.

Everything comes from ``plan.json`` (and class names from the manifest); nothing is measured here.
The command ``explain`` and the report are made from this.
"""

from __future__ import annotations

import difflib
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cswap_deploy.config import RatioOf, Task
from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.records.bundle import PLAN, read_plan, verify_bundle
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.plan import GroupPlan, PrunePlan, UnitEffect
from cswap_deploy.runtime.manifest import MANIFEST

VERDICTS = ("critical", "neutral", "detrimental", "not measured")
RankedBy = Literal["kl", "true-class", "change"]
RANKED_BY: dict[RankedBy, str] = {
    "kl": "KL divergence", "true-class": "likely harm", "change": "relative squared change",
}  # fmt: skip
"""What the value that ranks units is called."""
UNITS: dict[RankedBy, str] = {"kl": ", nats", "true-class": ", nats", "change": ""}
_MEANING: dict[RankedBy, str] = {
    "kl": "the KL divergence (how far the whole output moves)",
    "true-class": "the likely harm (half the standard deviation over the images minus the mean of "
    "log(p without the unit / p), p the true class's probability; nats)",
    "change": "the relative squared change of the outputs",
}
_EFFECTS: dict[Task, str] = {
    "binary": "the KL divergence of the yes-or-no outputs, summed over them (nats)",
    "dense": "the KL divergence of a pixel's classes, averaged over the pixels (nats)",
    "features": "the squared change of the outputs over their squared size",
    "detect": "the squared change of each output over its squared size, summed over the outputs",
    "any": "the squared change of each output over its squared size, summed over the outputs",
}
"""What an effect is where there is no true class."""
_SET_TO = {
    "zero": "set to zero",
    "mean": "set to its mean",
    "predicted": "set to its conditional mean given the other units of its layer",
}
_PER = {
    "params": " for each parameter saved", "macs": " for each MAC saved", "channels": "",
    "latency": " for each millisecond saved",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Unit:
    """One measured unit, as it was when it was last measured."""

    group: str
    kept: bool
    effect: UnitEffect
    serves: tuple[str, ...]
    """Names of the classes that it serves, strongest first."""
    harms: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        told: dict[str, Any] = self.effect.model_dump(exclude={"images"})
        for which, names in (("serves", self.serves), ("harms", self.harms)):
            pairs = zip(told[which], names, strict=True)
            told[which] = [{"index": index, "name": name} for index, name in pairs]
        return told | {"group": self.group, "kept": self.kept}


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """The units of one group, counted."""

    name: str
    kind: str
    units: int
    kept: int
    kept_verdicts: dict[str, int]
    removed_verdicts: dict[str, int]
    largest: Unit | None
    """The measured unit with the largest effect on the true class, or on the outputs where there is
    none."""
    costs: tuple[tuple[float, ...], tuple[float, ...]]
    """What ranks the units: the removed ones' values and the kept ones', each ascending."""

    @property
    def threshold(self) -> float | None:
        """The value below which as many units lie as were removed; None where all or none were.

        Where the two do not overlap it lies halfway between the costliest removed unit and the
        cheapest kept one. They may overlap: units were measured in different rounds, and leave
        several at a time where widths are aligned.
        """
        removed, kept = self.costs
        if not removed or not kept:
            return None
        ordered = sorted((*removed, *kept))
        return statistics.mean(ordered[len(removed) - 1 : len(removed) + 1])

    def plain(self) -> dict[str, Any]:
        """For JSON; the single costs stay in ``plan.json``."""
        told = asdict(self) | {
            "removed": self.units - self.kept,
            "largest": None if self.largest is None else self.largest.plain(),
            "threshold": self.threshold,
        }
        del told["costs"]
        return told


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a plan says of a network, or of one of its groups; None where it says nothing."""

    model: str | None
    task: Task
    """What the network's outputs are; verdicts are for ``classify`` alone."""
    criterion: str
    """The importance that ranked the units, by the name it is chosen by."""
    ratio_of: RatioOf
    ratio_effective: float
    alpha: float
    ranked_by: RankedBy | None
    reading: tuple[str, ...]
    """How to read it, in sentences."""
    groups: tuple[GroupSummary, ...]
    largest: tuple[Unit, ...]
    """Largest effects on the true class, of either sign; on the outputs where there is none."""
    detrimental: tuple[Unit, ...]
    """Those whose removal helps most."""
    removed_at_largest_cost: tuple[Unit, ...]
    """By what ranked them."""

    @property
    def verdicts(self) -> Counter[str]:
        """How many units have each verdict."""
        parts = ((g.kept_verdicts, g.removed_verdicts) for g in self.groups)
        return sum((Counter(kept) + Counter(removed) for kept, removed in parts), Counter())

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        lists = ("groups", "largest", "detrimental", "removed_at_largest_cost")
        return asdict(self) | {n: [part.plain() for part in getattr(self, n)] for n in lists}


def read_explained(path: Path) -> tuple[PrunePlan, Manifest | None]:
    """Read the plan of a bundle, or of the folder of an unfinished build.

    Raises:
        ArtifactError: There is no plan, or the bundle is damaged.
    """
    if not (path / PLAN).exists():
        state = f"has no {PLAN}" if path.is_dir() else "is not a folder"
        raise ArtifactError(
            f"{path} {state if path.exists() else 'does not exist'}",
            fix="name the folder that `cswap-deploy build -o` or `cswap-deploy prune -o` wrote",
        )
    manifest = verify_bundle(path).manifest if (path / MANIFEST).exists() else None
    return read_plan(path), manifest


def explain(
    plan: PrunePlan, manifest: Manifest | None = None, *, group: str | None = None, top: int = 5
) -> Explanation:
    """Say what a plan holds.

    Args:
        plan: Of any importance; where units were ranked without measuring there are no effects.
        manifest: Of the same build, for the names of the classes.
        group: Speak of this group alone.
        top: Units in each list.

    Raises:
        UsageError: The plan has no such group; names near ones.
    """
    names = class_names(manifest)
    chosen = plan.groups if group is None else (_find(plan, group),)
    by: RankedBy = "true-class" if plan.settings.get("effect") == "true-class" else "kl"
    if plan.task in ("features", "detect", "any"):
        by = "change"
    measured = {g.name: _measured(g, names) for g in plan.groups}
    units = [unit for g in chosen for unit in measured[g.name]]
    helpful = [u for u in units if u.effect.verdict == "detrimental"]

    def first(units: list[Unit], key: Callable[[UnitEffect], float]) -> tuple[Unit, ...]:
        return tuple(sorted(units, key=lambda u: -key(u.effect))[:top])

    ranked_by = by if any(measured.values()) else None
    return Explanation(
        model=None if manifest is None else manifest.model.name,
        task=plan.task,
        criterion=plan.criterion,
        ratio_of=plan.ratio_of,
        ratio_effective=plan.effective(plan.ratio_of),
        alpha=plan.alpha,
        ranked_by=ranked_by,
        reading=_reading(plan, ranked_by),
        groups=tuple(_summarise(g, measured[g.name], by) for g in chosen),
        largest=first(units, _size),
        detrimental=first(helpful, lambda e: e.true_class or 0.0),
        removed_at_largest_cost=first([u for u in units if not u.kept], lambda e: _cost(e, by)),
    )


def _cost(effect: UnitEffect, by: RankedBy) -> float:
    """What ranks a unit."""
    return effect.harm if by == "true-class" else effect.kl


def _size(effect: UnitEffect) -> float:
    """On the true class, of either sign; on the outputs where there is none."""
    return effect.kl if effect.true_class is None else abs(effect.true_class)


def class_names(manifest: Manifest | None) -> dict[int, str]:
    """Class index -> name, as far as the model or the names of the data's folders tell."""
    if manifest is None:
        return {}
    names: dict[int, str] = {}
    for data in (manifest.validation, manifest.calibration):
        if data is not None:
            names |= {i: name for name, i in data.class_indices.items() if not name.isdigit()}
    return names | dict(enumerate(manifest.model.class_names))


def _measured(group: GroupPlan, names: dict[int, str]) -> list[Unit]:
    """The units whose effect was really measured."""

    def named(classes: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(names.get(c, f"class {c}") for c in classes)

    kept = set(group.kept)
    return [
        Unit(group.name, e.unit in kept, e, named(e.serves), named(e.harms))
        for e in group.effects
        if e.round > 0
    ]


def _summarise(group: GroupPlan, measured: list[Unit], by: RankedBy) -> GroupSummary:
    kept = len(group.kept)

    def count(units: list[Unit], total: int) -> tuple[dict[str, int], tuple[float, ...]]:
        counts = Counter(str(u.effect.verdict) for u in units)
        counts["not measured"] = total - len(units)
        return {v: counts[v] for v in VERDICTS}, tuple(sorted(_cost(u.effect, by) for u in units))

    kept_verdicts, kept_costs = count([u for u in measured if u.kept], kept)
    gone_verdicts, gone_costs = count([u for u in measured if not u.kept], group.units - kept)
    return GroupSummary(
        name=group.name, kind=group.kind, units=group.units, kept=kept,
        kept_verdicts=kept_verdicts, removed_verdicts=gone_verdicts,
        largest=max(measured, key=lambda u: _size(u.effect), default=None),
        costs=(gone_costs, kept_costs),
    )  # fmt: skip


def _reading(plan: PrunePlan, by: RankedBy | None) -> tuple[str, ...]:
    """How to read effects and verdicts, in sentences; why there are none, where there are none."""
    if not plan.groups:
        return ("Nothing was removed: this is the dense network.",)
    if by is None:
        return (
            f"The importance {plan.criterion} ranks the units without measuring them, so there are "
            "no effects and no verdicts; build with --criterion cswap to have them.",
        )
    settings = plan.settings
    images = f"{settings['scoring_samples']:,} images, " if "scoring_samples" in settings else ""
    least = settings.get("min_effect")
    at_least = f", effects of {100 * least:g} % or more" if least else ""
    tried = (
        " That ranking proposed one of the candidates that each round tried; the candidate that "
        "went is the one whose own effect, after the refit, was least."
        if settings.get("select") == "set"
        else ""
    )
    how = _SET_TO.get(str(settings.get("intervention")), "taken away")
    if plan.task != "classify":
        return (
            f"An effect is {_EFFECTS[plan.task]} when a unit is {how} ({images}mean). Units are "
            "shown as last measured, on a network that had shrunk in between.",
            f"No verdicts: no classes (task {plan.task}). The removal goes by {_MEANING[by]}"
            f"{_PER[plan.ratio_of]}, smallest first.{tried}",
        )
    return (
        "An effect is the relative change of the true class's probability when a unit is "
        f"{how} ({images}95 % interval): "
        "below zero the unit helps the prediction, above zero it harms it. Units are shown as last "
        "measured, on a network that had shrunk in between.",
        f"Verdicts describe (false-discovery rate {100 * plan.alpha:g} %{at_least}): removing a "
        "critical unit hurts some class, one that it serves, or all on average; removing a "
        "detrimental one only helps; a neutral one shows neither. The removal itself goes by "
        f"{_MEANING[by]}{_PER[plan.ratio_of]}, smallest first.{tried}",
    )


def _find(plan: PrunePlan, name: str) -> GroupPlan:
    known = {group.name: group for group in plan.groups}
    if name in known:
        return known[name]
    if name in plan.excluded:
        raise UsageError(f"{name!r} was left as it is: {plan.excluded[name]}")
    if not known:
        raise UsageError(f"no group {name!r}: the plan has none", fix="leave the group out")
    near = [k for k in known if name.lower() in k.lower()]
    near += difflib.get_close_matches(name, set(known) - set(near), n=5, cutoff=0.5)
    near = near or list(known)
    raise UsageError(
        f"no group {name!r} among the plan's {len(known)}",
        fix=f"one of: {', '.join(near[:5])}{', ...' if len(near) > 5 else ''}",
    )
