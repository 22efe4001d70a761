"""The figures show what the plan and the manifest hold, the same way each time."""

from __future__ import annotations

import random
import re
from xml.etree import ElementTree

import pytest
from made_up_bundle import effect, made_up_manifest, made_up_plan, made_up_targets

from cswap_deploy.records.plan import GroupPlan, PrunePlan
from cswap_deploy.report import figures

pytest.importorskip("matplotlib")


def texts(svg: str) -> list[str]:
    """Words of a figure; also shows that it is well-formed."""
    # in HTML the prefix needs no declaration, in XML it does
    root = ElementTree.fromstring(
        svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
    )
    return [" ".join("".join(e.itertext()).split()) for e in root.iter("text")]


def without_effects(plan: PrunePlan) -> PrunePlan:
    groups = tuple(g.model_copy(update={"effects": ()}) for g in plan.groups)
    return plan.model_copy(update={"criterion": "magnitude", "groups": groups})


def fills(svg: str, colour: str) -> int:
    """Shapes of a colour."""
    return len(re.findall(f'<path d="[^"]+"[^>]*style="fill: {colour}', svg))


def test_each_group_says_how_many_units_were_kept() -> None:
    plan = made_up_plan()
    for words in (
        texts(figures.effects_figure(plan)),
        texts(figures.units_figure(without_effects(plan))),
    ):
        for group in plan.groups:
            assert group.name in words
            assert f"{len(group.kept)}/{group.units}" in words
        assert {"kept", "removed"} <= set(words)


def test_the_figures_are_the_same_each_time() -> None:
    plan, manifest = made_up_plan(), made_up_manifest()
    assert figures.units_figure(plan) == figures.units_figure(plan)
    assert figures.effects_figure(plan) == figures.effects_figure(plan)
    assert figures.latency_figure(manifest) == figures.latency_figure(manifest)
    assert figures.accuracy_figure(manifest) == figures.accuracy_figure(manifest)


def test_the_picture_shows_what_was_removed_the_cut_and_the_verdicts() -> None:
    plan = made_up_plan()
    svg = figures.effects_figure(plan)
    words = texts(svg)
    assert "KL divergence, nats" in words
    assert {"the cut", "critical (strip below)", "detrimental (strip below)"} <= set(words)
    groups = len(plan.groups)
    # one skyline for each group, and one patch in the legend
    assert fills(svg, figures.KEPT_COLOUR) == groups + 1
    assert fills(svg, figures.REMOVED_COLOUR) == groups + 1
    # a strip has at most one piece for each verdict on either side
    for verdict, colour in figures.VERDICT_COLOURS.items():
        pieces = sum(
            figures.verdict_counts(g, kept=kept)[verdict] > 0
            for g in plan.groups
            for kept in (False, True)
        )
        assert fills(svg, colour) == pieces + 1
    by_class = plan.model_copy(update={"settings": {"effect": "true-class"}})
    assert "|true-class effect|" in texts(figures.effects_figure(by_class))


def test_a_bar_for_each_unit_by_height() -> None:
    """Two units removed, two kept: the polygon of each has two steps, the cut lies between."""
    rng = random.Random(0)
    effects = tuple(
        effect(rng, unit, 0.5).model_copy(update={"kl": kl})
        for unit, kl in enumerate((0.4, 0.001, 0.1, 0.01))
    )
    group = GroupPlan(name="g", kind="channels", units=4, kept=(0, 2), effects=effects)
    svg = figures.effects_figure(made_up_plan().model_copy(update={"groups": (group,)}))

    def heights(colour: str) -> list[float]:
        found = re.findall(rf'<path d="([^"]+)"[^>]*style="fill: {colour}', svg)
        ys = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", found[0])]
        return sorted(set(ys))  # of the page, which counts from the top

    kept, removed = heights(figures.KEPT_COLOUR), heights(figures.REMOVED_COLOUR)
    assert len(kept) == len(removed) == 3, "two units and the floor"
    assert kept[2] == removed[2], "one floor"
    [line] = re.findall(
        r'<path d="M [\d.]+ ([\d.]+) \nL [\d.]+ \1 \n"[^>]*style="fill: none; stroke: currentColor',
        svg,
    )
    assert kept[1] < float(line) < removed[0]


def test_units_that_were_not_measured_are_left_out() -> None:
    plan = made_up_plan()
    unmeasured = tuple(
        group.model_copy(
            update={"effects": tuple(e.model_copy(update={"round": 0}) for e in group.effects)}
        )
        for group in plan.groups[:1]
    )
    svg = figures.effects_figure(plan.model_copy(update={"groups": unmeasured + plan.groups[1:]}))
    assert fills(svg, figures.KEPT_COLOUR) == len(plan.groups)
    assert plan.groups[0].name in texts(svg)


@pytest.mark.parametrize(("count", "panels"), [(4, 1), (18, 1), (20, 2), (54, 3)])
def test_every_group_has_its_name_however_many_there_are(count: int, panels: int) -> None:
    rng = random.Random(0)
    effects = tuple(effect(rng, unit, rng.random()) for unit in range(300))
    groups = tuple(
        GroupPlan(name=f"g{i}", kind="channels", units=300, kept=tuple(range(150)), effects=effects)
        for i in range(count)
    )
    plan = made_up_plan().model_copy(update={"groups": groups})
    for svg in (figures.effects_figure(plan), figures.units_figure(without_effects(plan))):
        words = texts(svg)
        assert {g.name for g in groups} <= set(words)
        assert len(svg) < 10_000 * count + 100_000
    assert words.count("units, %") == panels
    assert ("150/300" in words) is (count in (4, 20)), "no numbers that would overlap"


def test_latency_says_what_lies_outside() -> None:
    words = texts(figures.latency_figure(made_up_manifest()) or "")
    assert "milliseconds per call, batch 1; dots are medians; 2 slower calls lie outside" in words
    assert figures.latency_figure(made_up_manifest(targets=made_up_targets()[1:])) is None


def test_accuracy_is_shown_where_it_was_measured() -> None:
    words = texts(figures.accuracy_figure(made_up_manifest()) or "")
    assert words.count("onnxruntime") == 1
    assert words.count("PyTorch") == 1
    unscored = made_up_manifest(targets=(), torch_accuracy=None)
    assert figures.accuracy_figure(unscored) is None


def test_a_name_with_dollars_is_text_and_not_a_formula() -> None:
    plan = made_up_plan()
    group = plan.groups[0].model_copy(update={"name": "a$b_c$<d>"})
    words = texts(figures.effects_figure(plan.model_copy(update={"groups": (group,)})))
    assert "a$b_c$<d>" in words
