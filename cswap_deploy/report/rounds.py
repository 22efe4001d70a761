"""What pruning did: round by round, and the training after it, where it was asked for."""

from __future__ import annotations

import math

from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.report import cells as c
from cswap_deploy.report.document import Section, section, table


def rounds(plan: PrunePlan, images: int) -> Section | None:
    """What each round did, and how far the images went.

    Args:
        plan: Of the bundle.
        images: In the calibration set.
    """
    if not plan.rounds:
        return None
    cost, text = plan.scoring, []
    if cost is not None and cost.forwards < cost.forwards_exact:
        share = c.percent(cost.forwards / cost.forwards_exact)
        text.append(
            f"Measured as far as decisions needed ({cost.measuring}): {cost.forwards:,} masked "
            f"forwards, {share} of those of every unit on all {cost.images:,} images."
        )
    if estimated := sum(e.images == 0 for g in plan.groups for e in g.effects):
        text.append(
            f"The effects of {estimated:,} units are estimates alone: they lie far from where "
            "units start to go, or the passes set aside for measuring were spent."
        )
    layers = (
        ("Layers refitted in closed form, without training", plan.refitted),
        ("Layers whose own weights were reconstructed too (producers)", plan.producers),
        ("Layers that gained a bias for what was folded in", plan.biased),
    )
    text += [f"{what}: {len(names):,}." for what, names in layers if names]
    if plan.starved:
        text.append(
            f"Images were few: {len(plan.starved):,} layers had fewer rows than unknowns. Mosaics "
            "were added, and each layer changed only as far as predictions on left-out images "
            f"gained: {_starved(plan, images)}."
        )
    heads = "round | units measured | masked forwards | removed | parameters left | time"
    rows = (
        (
            r.round,
            r.measured,
            r.forwards or None,
            r.removed,
            r.params,
            c.seconds(r.seconds),
        )
        for r in plan.rounds
    )
    return section("Rounds", *text, tables=[table(heads, rows)])


def _starved(plan: PrunePlan, images: int) -> str:
    """The worst of them: rows, unknowns, and how many images would give enough."""
    worst = sorted(plan.starved.items(), key=lambda item: item[1][0] / item[1][1])[:5]
    told = (
        f"{name} ({rows:,} rows for {unknowns:,} inputs; {math.ceil(images * unknowns / rows):,} "
        "images would do)"
        for name, (rows, unknowns) in worst
    )
    return ", ".join(told)


def recovery(plan: PrunePlan) -> Section | None:
    """Training after pruning, where it was asked for."""
    found = plan.recovery
    if found is None:
        return None
    words = (
        f"Asked for: {found.minutes:g} minutes of training after pruning, towards the dense "
        f"network and without labels, on {found.images:,} calibration images with flips, shifts "
        f"and mixing; {found.held_out:,} others judged, and the weights with the least divergence "
        f"there were kept. It took {found.seconds:.0f} s and {found.steps:,} steps.",
    )
    rows = (
        (c.seconds(x.seconds), c.nats(x.divergence),
         None if x.agreement is None else c.percent(x.agreement))
        for x in found.checks
    )  # fmt: skip
    heads = "after | divergence from the dense network | same class"
    return section("Recovery (training)", *words, tables=[table(heads, rows)])
