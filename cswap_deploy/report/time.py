"""Where the time of a call went, for a network that was pruned to a speed."""

from __future__ import annotations

from functools import partial

from cswap_deploy.records.plan import LayerTime, PrunePlan
from cswap_deploy.report import cells as c
from cswap_deploy.report import figures
from cswap_deploy.report.document import Figure, Section, section, table

_MOST = 80
"""Layers that are drawn; of deeper networks their blocks are."""


def time_by_layer(plan: PrunePlan) -> Section | None:
    """What depth and what width gave, a picture of it, and the model against what was measured."""
    if plan.latency is None:
        return None
    layers = _merged(plan.latency.layers)
    saved = sum(layer.dense_ms - layer.pruned_ms for layer in layers)
    depth = plan.latency.depth_ms
    gone = sum(g.kind == "branch" and not g.kept for g in plan.groups)
    text = [
        f"By the latency model a call takes {c.ms(sum(x.dense_ms for x in layers))} before and "
        f"{c.ms(sum(x.pruned_ms for x in layers))} after. "
        + (
            f"{gone} whole branch{'es' if gone > 1 else ''} saved {c.ms(depth)} of it (depth), "
            f"narrower layers {c.ms(saved - depth)} (width)."
            if gone
            else "No whole branch went: all of it is width."
        )
    ]
    tries = [
        (log.round, c.Amount(f"{each.predicted:.2f}x"), c.Amount(f"{each.measured:.2f}x"),
         c.effect(each.predicted / each.measured - 1))
        for log in plan.rounds
        for each in log.tries
    ]  # fmt: skip
    if tries:
        text.append(
            "Networks on the way were really built and timed in turn with the dense one; the model "
            "had seen none of them. What it was off by corrected the next."
        )
    caption = "Each layer before (wide) and after (narrow), in the order in which they run."
    return section(
        "Time by layer", *text,
        tables=[table("round | predicted speed | measured | model off by", tries)],
        figures=[Figure(partial(figures.time_figure, layers), caption)],
    )  # fmt: skip


def _merged(layers: tuple[LayerTime, ...]) -> tuple[LayerTime, ...]:
    """As they are, or with the innermost names cut off until they can be drawn."""
    while len(layers) > _MOST and (deepest := max(x.layer.count(".") for x in layers)):
        found: dict[str, LayerTime] = {}
        for each in layers:
            inner = each.layer.count(".") == deepest
            name = each.layer.rpartition(".")[0] if inner else each.layer
            before = found.get(name, LayerTime(layer=name, dense_ms=0, pruned_ms=0))
            found[name] = LayerTime(
                layer=name, dense_ms=before.dense_ms + each.dense_ms,
                pruned_ms=before.pruned_ms + each.pruned_ms,
            )  # fmt: skip
        layers = tuple(found.values())
    return layers
