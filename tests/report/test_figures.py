"""The figures show what the plan and the manifest hold, the same way each time."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from made_up_bundle import effect, made_up_manifest, made_up_plan, made_up_targets

from cswap_deploy.records.plan import GroupPlan, PrunePlan
from cswap_deploy.report import figures, headline
from cswap_deploy.report.explain import Explanation, explain

pytest.importorskip("matplotlib")


def texts(svg: str) -> list[str]:
    """Words of a figure; also shows that it is well-formed."""
    # in HTML the prefix needs no declaration, in XML it does
    root = ElementTree.fromstring(
        svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
    )
    return [" ".join("".join(e.itertext()).split()) for e in root.iter("text")]


def effects_figure(plan: PrunePlan) -> str:
    return figures.effects_figure(explain(plan))


def without_effects(plan: PrunePlan) -> PrunePlan:
    groups = tuple(g.model_copy(update={"effects": ()}) for g in plan.groups)
    return plan.model_copy(update={"groups": groups})


def fills(svg: str, colour: str) -> int:
    """Shapes of a colour."""
    return len(re.findall(f'<path d="[^"]+"[^>]*style="fill: {colour}', svg))


def test_the_picture_shows_what_was_removed_the_threshold_and_the_verdicts() -> None:
    plan = made_up_plan()
    svg = effects_figure(plan)
    words = texts(svg)
    for group in plan.groups:
        assert group.name in words
        assert f"{len(group.kept)}/{group.units}" in words
    assert {"kept", "removed"} <= set(words)
    assert "KL divergence, nats" in words
    assert {"threshold", "critical (strip below)", "detrimental (strip below)"} <= set(words)
    groups = len(plan.groups)
    # one skyline for each group, and one patch in the legend
    assert fills(svg, figures.KEPT_COLOUR) == groups + 1
    assert fills(svg, figures.REMOVED_COLOUR) == groups + 1
    # a strip has at most one piece for each verdict on either side
    for verdict, colour in figures.VERDICT_COLOURS.items():
        pieces = sum(
            any(e.verdict == verdict and (e.unit in g.kept) is kept for e in g.effects)
            for g in plan.groups
            for kept in (False, True)
        )
        assert fills(svg, colour) == pieces + 1


def heights(svg: str, colour: str) -> list[float]:
    """Where the first shape of a colour has its corners, down the page."""
    found = re.findall(rf'<path d="([^"]+)"[^>]*style="fill: {colour}', svg)
    return sorted({float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", found[0])})


def test_a_bar_for_each_unit_by_height() -> None:
    """Two units removed, two kept: each polygon has two steps, the threshold lies between."""
    rng = random.Random(0)
    effects = tuple(
        effect(rng, unit, 0.5).model_copy(update={"kl": kl})
        for unit, kl in enumerate((0.4, 0.001, 0.1, 0.01))
    )
    group = GroupPlan(name="g", kind="channels", units=4, kept=(0, 2), effects=effects)
    svg = effects_figure(made_up_plan().model_copy(update={"groups": (group,)}))

    kept, removed = heights(svg, figures.KEPT_COLOUR), heights(svg, figures.REMOVED_COLOUR)
    assert len(kept) == len(removed) == 3, "two units and the floor"
    assert kept[2] == removed[2], "one floor"
    [line] = re.findall(
        r'<path d="M [\d.]+ ([\d.]+) \nL [\d.]+ \1 \n"[^>]*style="fill: none; stroke: currentColor',
        svg,
    )
    assert kept[1] < float(line) < removed[0]


def test_with_the_effect_on_the_true_class_likely_harm_is_drawn() -> None:
    """What ranks the units; below zero for a unit that likely helps, so its bar hangs down."""
    rng = random.Random(0)
    effects = tuple(
        effect(rng, unit, 0.5).model_copy(update={"harm": harm})
        for unit, harm in enumerate((0.4, -0.3, 0.1, 0.01))
    )
    group = GroupPlan(name="g", kind="channels", units=4, kept=(0, 2), effects=effects)
    plan = made_up_plan()
    settings = plan.settings | {"effect": "true-class"}
    svg = effects_figure(plan.model_copy(update={"groups": (group,), "settings": settings}))
    assert "likely harm, nats" in texts(svg)
    assert not any("effect|" in words for words in texts(svg))
    kept, removed = heights(svg, figures.KEPT_COLOUR), heights(svg, figures.REMOVED_COLOUR)
    zero = kept[2]
    assert len(removed) == 3
    assert removed[1] == zero, "one unit above zero, one below"
    assert zero - kept[0] > removed[2] - zero > 0, "0.4 is larger than 0.3"


def test_units_that_were_not_measured_are_left_out() -> None:
    plan = made_up_plan()
    first, second = plan.groups[:2]
    effects = tuple(e.model_copy(update={"round": 0}) for e in first.effects)
    first = first.model_copy(update={"effects": effects, "name": "a$b_c$<d>"})
    svg = effects_figure(plan.model_copy(update={"groups": (first, second)}))
    assert fills(svg, figures.KEPT_COLOUR) == 2, "one group, and the legend"
    assert "a$b_c$<d>" in texts(svg), "a name with dollars is text and not a formula"


@pytest.mark.parametrize(
    ("count", "panels", "draw"),
    [(18, 1, figures.units_figure), (19, 2, figures.units_figure), (19, 2, figures.effects_figure)],
)
def test_every_group_has_its_name_however_many_there_are(
    count: int, panels: int, draw: Callable[[Explanation], str]
) -> None:
    rng = random.Random(0)
    effects = tuple(effect(rng, unit, rng.random()) for unit in range(100))
    groups = tuple(
        GroupPlan(name=f"g{i}", kind="channels", units=100, kept=tuple(range(50)), effects=effects)
        for i in range(count)
    )
    plan = made_up_plan().model_copy(update={"groups": groups})
    svg = draw(explain(plan if draw == figures.effects_figure else without_effects(plan)))
    words = texts(svg)
    assert {g.name for g in groups} | {"kept", "removed"} <= set(words)
    assert len(svg) < 10_000 * count + 100_000
    assert words.count("units, %") + words.count("KL divergence, nats") == panels
    assert ("50/100" in words) is (count != 18), "no numbers that would overlap"


def test_latency_says_what_lies_outside() -> None:
    words = texts(figures.latency_figure(made_up_targets()[:1]))
    assert "milliseconds per call, batch 1; dots are medians; 2 slower calls lie outside" in words


def test_accuracy_is_shown_where_it_was_measured() -> None:
    words = texts(figures.accuracy_figure(headline.scored(made_up_manifest())))
    assert words.count("onnxruntime") == 1
    assert words.count("PyTorch") == 1
