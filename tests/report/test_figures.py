"""The figures show what the plan and the manifest hold, the same way each time."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from made_up_bundle import effect, made_up_manifest, made_up_plan, made_up_targets

from cswap_deploy.artifacts import GroupPlan, PrunePlan
from cswap_deploy.report import figures

pytest.importorskip("matplotlib")


def texts(svg: str) -> list[str]:
    """Words of a figure; also shows that it is well-formed."""
    # in HTML the prefix needs no declaration, in XML it does
    root = ElementTree.fromstring(
        svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
    )
    return [" ".join("".join(e.itertext()).split()) for e in root.iter("text")]


def test_each_group_says_how_many_units_were_kept() -> None:
    plan = made_up_plan()
    words = texts(figures.units_figure(plan))
    for group in plan.groups:
        assert group.name in words
        assert f"{len(group.kept)}/{group.units}" in words
    assert {"kept, critical", "removed, neutral", "removed, detrimental"} <= set(words)
    assert "kept, not measured" not in words


def test_the_figures_are_the_same_each_time() -> None:
    plan, manifest = made_up_plan(), made_up_manifest()
    assert figures.units_figure(plan) == figures.units_figure(plan)
    assert figures.effects_figure(plan) == figures.effects_figure(plan)
    assert figures.latency_figure(manifest) == figures.latency_figure(manifest)
    assert figures.accuracy_figure(manifest) == figures.accuracy_figure(manifest)


def test_one_dot_per_measured_unit() -> None:
    plan = made_up_plan()
    dots = len(re.findall("<use ", figures.effects_figure(plan)))
    unmeasured = tuple(
        group.model_copy(
            update={"effects": tuple(e.model_copy(update={"round": 0}) for e in group.effects)}
        )
        for group in plan.groups[:1]
    )
    fewer = plan.model_copy(update={"groups": unmeasured + plan.groups[1:]})
    assert dots - len(re.findall("<use ", figures.effects_figure(fewer))) == 2 * 16
    none = plan.model_copy(update={"groups": unmeasured})
    assert figures.has_effects(plan)
    assert not figures.has_effects(none)
    assert "kept, not measured" in texts(figures.units_figure(none))


def test_thousands_of_units_stay_a_small_picture() -> None:
    import random

    rng = random.Random(0)
    effects = tuple(effect(rng, unit, rng.random()) for unit in range(300))
    groups = tuple(
        GroupPlan(name=f"g{i}", kind="channels", units=300, kept=tuple(range(150)), effects=effects)
        for i in range(30)
    )
    plan: PrunePlan = made_up_plan().model_copy(update={"groups": groups})
    svg = figures.effects_figure(plan)
    assert "data:image/png;base64" in svg
    assert len(svg) < 1_000_000
    assert "group, from the input to the output (names in the table)" in texts(svg)


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
    words = texts(figures.units_figure(plan.model_copy(update={"groups": (group,)})))
    assert "a$b_c$<d>" in words
