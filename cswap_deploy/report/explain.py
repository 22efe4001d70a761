"""What a plan says about its units: verdicts, largest effects, classes served, and the cut.

Everything comes from ``plan.json`` (and class names from the manifest); nothing is measured here.
The command ``explain`` and the report are made from this.
"""

from __future__ import annotations

import difflib
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.records.bundle import MANIFEST, PLAN, read_bundle, read_plan
from cswap_deploy.records.files import compare_files
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.records.plan import GroupPlan, PrunePlan, RatioOf, UnitEffect, Verdict

VERDICTS = ("critical", "neutral", "detrimental", "not measured")
Ranking = Literal["kl", "true-class"]
_SET_TO = {
    "zero": "set to zero",
    "mean": "set to its mean",
    "predicted": "set to what the other units of its layer predict for it",
}
_PER = {"params": " for each parameter saved", "macs": " for each MAC saved", "channels": ""}


@dataclass(frozen=True, slots=True)
class ClassName:
    """A class of the network."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Unit:
    """One measured unit, as it was when it was last measured."""

    group: str
    unit: int
    kept: bool
    true_class: float
    """Relative change of the true class's probability, a fraction; mean over images."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    harm: float
    """Nats; what ranks units by ``true-class``; see :func:`causal.effects.likely_harm`."""
    kl: float
    """Nats."""
    verdict: Verdict
    round: int
    serves: tuple[ClassName, ...]
    """Strongest first."""
    harms: tuple[ClassName, ...]


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """The units of one group, counted."""

    name: str
    kind: str
    units: int
    kept: int
    removed: int
    kept_verdicts: dict[str, int]
    removed_verdicts: dict[str, int]
    largest: Unit | None
    """The unit with the largest effect on the true class; None where none was measured."""
    cut: float | None
    """See :func:`cut`."""
    costs: tuple[tuple[float, ...], tuple[float, ...]]
    """What ranks the units: the removed ones' values and the kept ones', each ascending."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a plan says of a network, or of one of its groups."""

    model: str | None
    """None where there is no manifest yet."""
    criterion: str
    ratio_of: RatioOf
    ratio_effective: float
    alpha: float
    ranked_by: Ranking | None
    """None where nothing was measured."""
    reading: tuple[str, ...]
    """How to read it, in sentences."""
    groups: tuple[GroupSummary, ...]
    largest: tuple[Unit, ...]
    """Largest effects on the true class, of either sign."""
    detrimental: tuple[Unit, ...]
    """Those whose removal helps most."""
    removed_at_largest_cost: tuple[Unit, ...]
    """By what ranked them."""

    def plain(self) -> dict[str, Any]:
        """For JSON; the single costs stay in ``plan.json``."""
        told = asdict(self)
        for group in told["groups"]:
            del group["costs"]
        return told


def read_explained(path: Path) -> tuple[PrunePlan, Manifest | None]:
    """Read the plan of a bundle, or of the folder of an unfinished build.

    Raises:
        ArtifactError: There is no plan, it is damaged, or it is not the one that the bundle's
            manifest names.
    """
    if not (path / PLAN).is_file():
        state = f"has no {PLAN}" if path.is_dir() else "is not a folder"
        raise ArtifactError(
            f"{path} {state if path.exists() else 'does not exist'}",
            fix="name the folder that `cswap-deploy build -o` or `cswap-deploy prune -o` wrote",
        )
    manifest = read_bundle(path) if (path / MANIFEST).is_file() else None
    if manifest is not None:
        listed = tuple(ref for ref in manifest.files if ref.path == PLAN)
        wrong, _ = compare_files(path, listed)
        if wrong:
            raise ArtifactError(
                f"{path} is damaged: " + "; ".join(wrong),
                fix="copy the bundle again, or build it again",
            )
    return read_plan(path), manifest


def explain(
    plan: PrunePlan, manifest: Manifest | None = None, *, group: str | None = None, top: int = 5
) -> Explanation:
    """Say what a plan holds.

    Args:
        plan: Of any criterion; a baseline's has no effects.
        manifest: Of the same build, for the names of the classes.
        group: Speak of this group alone.
        top: Units in each list.

    Raises:
        UsageError: The plan has no such group; names near ones.
    """
    names = class_names(manifest)
    chosen = plan.groups if group is None else (_find(plan, group),)
    by = ranked_by(plan)
    units = [_unit(g, e, set(g.kept), names) for g in chosen for e in measured(g)]
    return Explanation(
        model=None if manifest is None else manifest.model.name,
        criterion=plan.criterion,
        ratio_of=plan.ratio_of,
        ratio_effective=plan.effective(plan.ratio_of),
        alpha=plan.alpha,
        ranked_by=by if has_effects(plan) else None,
        reading=reading(plan),
        groups=tuple(summarise(g, by, names) for g in chosen),
        largest=tuple(sorted(units, key=lambda u: -abs(u.true_class))[:top]),
        detrimental=tuple(
            sorted((u for u in units if u.verdict == "detrimental"), key=lambda u: -u.true_class)[
                :top
            ]
        ),
        removed_at_largest_cost=tuple(
            sorted((u for u in units if not u.kept), key=lambda u: -_cost(u, by))[:top]
        ),
    )


def summarise(group: GroupPlan, by: Ranking, names: dict[int, str]) -> GroupSummary:
    """Count a group's units and find its largest effect and its cut."""
    staying = set(group.kept)
    costs = split_costs(group, by)
    largest = max(measured(group), key=lambda e: abs(e.true_class), default=None)
    return GroupSummary(
        name=group.name,
        kind=group.kind,
        units=group.units,
        kept=len(group.kept),
        removed=group.units - len(group.kept),
        kept_verdicts=_counts(group, kept=True),
        removed_verdicts=_counts(group, kept=False),
        largest=None if largest is None else _unit(group, largest, staying, names),
        cut=cut(*costs),
        costs=costs,
    )


def has_effects(plan: PrunePlan) -> bool:
    """Whether any unit was measured; a baseline criterion measures none."""
    return any(True for group in plan.groups for _ in measured(group))


def measured(group: GroupPlan) -> Iterator[UnitEffect]:
    """The effects that were really measured."""
    return (effect for effect in group.effects if effect.round > 0)


def verdict_counts(group: GroupPlan, *, kept: bool) -> Counter[str]:
    """How many of a group's kept (or removed) units have each verdict."""
    verdicts = {effect.unit: effect.verdict for effect in measured(group)}
    staying = set(group.kept)
    chosen = (unit for unit in range(group.units) if (unit in staying) is kept)
    return Counter(verdicts.get(unit, "not measured") for unit in chosen)


def ranked_by(plan: PrunePlan) -> Ranking:
    """What decided the order of removal."""
    return "true-class" if plan.settings.get("effect") == "true-class" else "kl"


def split_costs(group: GroupPlan, by: Ranking) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What ranks the units, ascending: of the removed ones, and of the kept ones."""
    staying = set(group.kept)
    removed, kept = (
        tuple(sorted(_cost(e, by) for e in measured(group) if (e.unit in staying) is stays))
        for stays in (False, True)
    )
    return removed, kept


def cut(removed: tuple[float, ...], kept: tuple[float, ...]) -> float | None:
    """The value below which as many units lie as were removed; None where all or none were.

    Where the two do not overlap it lies halfway between the costliest removed unit and the
    cheapest kept one. They may overlap: units were measured in different rounds, and leave in
    bundles.
    """
    if not removed or not kept:
        return None
    ordered = sorted((*removed, *kept))
    return statistics.mean(ordered[len(removed) - 1 : len(removed) + 1])


def class_names(manifest: Manifest | None) -> dict[int, str]:
    """Class index -> name, as far as the model or the names of the data's folders tell."""
    if manifest is None:
        return {}
    names: dict[int, str] = {}
    for data in (manifest.validation, manifest.calibration):
        if data is not None:
            names |= {i: name for name, i in data.class_indices.items() if not name.isdigit()}
    return names | dict(enumerate(manifest.model.class_names))


def reading(plan: PrunePlan) -> tuple[str, ...]:
    """How to read effects and verdicts, in sentences; why there are none, where there are none."""
    if not plan.groups:
        return ("Nothing was removed: this is the dense network.",)
    if not has_effects(plan):
        return (
            f"The criterion {plan.criterion} ranks the units without measuring them, so there are "
            "no effects and no verdicts; build with --criterion cswap to have them.",
        )
    settings = plan.settings
    images = f"{settings['scoring_samples']:,} images, " if "scoring_samples" in settings else ""
    least = settings.get("min_effect")
    at_least = f", effects of {100 * least:g} % or more" if least else ""
    ranking = {
        "kl": "the KL divergence (how far the whole output moves)",
        "true-class": "the mean size of the effect on the true class",
    }[ranked_by(plan)]
    tried = (
        " That order proposed one of the sets that each round tried; the set that went is the one "
        "whose own effect, once the other layers had taken over, was least."
        if settings.get("select") == "set"
        else ""
    )
    return (
        "An effect is the relative change of the true class's probability when a unit is "
        f"{_SET_TO.get(str(settings.get('intervention')), 'taken away')} ({images}95 % interval): "
        "below zero the unit helps the prediction, above zero it harms it. Units are shown as last "
        "measured, on a network that had shrunk in between.",
        f"Verdicts describe (false-discovery rate {100 * plan.alpha:g} %{at_least}): removing a "
        "critical unit hurts some class, one that it serves, or all on average; removing a "
        "detrimental one only helps; a neutral one shows neither. The removal itself goes by "
        f"{ranking}{_PER[plan.ratio_of]}, smallest first.{tried}",
    )


# --- parts ---------------------------------------------------------------------------------------


def _find(plan: PrunePlan, name: str) -> GroupPlan:
    for group in plan.groups:
        if group.name == name:
            return group
    known = [group.name for group in plan.groups]
    near = [k for k in known if name.lower() in k.lower()]
    near += [k for k in difflib.get_close_matches(name, known, n=5, cutoff=0.5) if k not in near]
    if name in plan.excluded:
        raise UsageError(f"{name!r} was left as it is: {plan.excluded[name]}")
    if not known:
        raise UsageError(f"no group {name!r}: the plan has none", fix="leave the group out")
    raise UsageError(
        f"no group {name!r} among the plan's {len(known)}",
        fix=f"one of: {', '.join(near[:5] or known[:5])}"
        + (", ..." if len(near or known) > 5 else ""),
    )


def _counts(group: GroupPlan, *, kept: bool) -> dict[str, int]:
    counts = verdict_counts(group, kept=kept)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def _cost(effect: UnitEffect | Unit, by: Ranking) -> float:
    return effect.kl if by == "kl" else effect.harm


def _unit(group: GroupPlan, effect: UnitEffect, staying: set[int], names: dict[int, str]) -> Unit:
    def named(classes: tuple[int, ...]) -> tuple[ClassName, ...]:
        return tuple(ClassName(c, names.get(c, f"class {c}")) for c in classes)

    return Unit(
        group=group.name,
        unit=effect.unit,
        kept=effect.unit in staying,
        true_class=effect.true_class,
        low=effect.low,
        high=effect.high,
        harm=effect.harm,
        kl=effect.kl,
        verdict=effect.verdict,
        round=effect.round,
        serves=named(effect.serves),
        harms=named(effect.harms),
    )
