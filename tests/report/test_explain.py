"""``explain``: what a plan says about its units, in text and as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from made_up_bundle import made_up_manifest, made_up_plan, magnitude_plan, write_made_up_bundle
from rich.console import Console

from cswap_deploy.records.bundle import read_plan
from cswap_deploy.records.plan import GroupPlan, PrunePlan, UnitEffect, Verdict
from cswap_deploy.report.explain import Unit, explain
from cswap_deploy.report.terminal import draw
from cswap_deploy.report.units import explained

if TYPE_CHECKING:
    from conftest import Made, Ran

Command = Callable[..., "Ran"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_made_up_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def unit(index: int, kl: float, true_class: float, verdict: Verdict, **more: Any) -> UnitEffect:
    low, high = true_class - 0.01, true_class + 0.01
    return UnitEffect(
        unit=index, true_class=true_class, harm=0.002 - true_class, kl=kl, low=low, high=high,
        verdict=verdict,
        **({"round": 1} | more),
    )  # fmt: skip


SMALL = GroupPlan(
    name="body.conv",
    kind="channels",
    units=5,
    kept=(0, 2, 4),
    effects=(
        unit(0, 0.4, -0.3, "critical", serves=(1, 0)),
        unit(1, 0.001, 0.02, "detrimental", harms=(7,)),
        unit(2, 0.1, 0.05, "detrimental", harms=(1,)),
        unit(3, 0.01, -0.001, "neutral"),
        unit(4, 0.0, 0.0, "neutral", round=0),
    ),
)
"""Units 1 and 3 are gone, unit 4 was not measured."""


def small_plan(*, settings: dict[str, Any] | None = None, **changes: Any) -> PrunePlan:
    plan = made_up_plan()
    changes |= {"settings": plan.settings | (settings or {})}
    return plan.model_copy(update={"groups": (SMALL,)} | changes)


def numbers(units: tuple[Unit, ...]) -> list[int]:
    return [unit.effect.unit for unit in units]


def shown(plan: PrunePlan, width: int, *, top: int = 5) -> str:
    """What a terminal of a width shows, without colours."""
    out = StringIO()
    console = Console(file=out, width=width, highlight=False)
    for part in draw(explained(explain(plan, made_up_manifest(), top=top)), width):
        console.print(part)
    return out.getvalue()


# --- what is told --------------------------------------------------------------------------------


def test_a_group_by_hand() -> None:
    told = explain(small_plan(), made_up_manifest())
    [group] = told.groups
    assert (group.name, group.units, group.kept) == ("body.conv", 5, 3)
    assert group.kept_verdicts == {
        "critical": 1, "neutral": 0, "detrimental": 1, "not measured": 1,
    }  # fmt: skip
    assert group.removed_verdicts == {
        "critical": 0, "neutral": 1, "detrimental": 1, "not measured": 0,
    }  # fmt: skip
    assert group.costs == ((0.001, 0.01), (0.1, 0.4))
    assert group.threshold == pytest.approx(0.055), "halfway between 0.01 and 0.1"
    assert group.largest is not None
    assert group.largest.effect.unit == 0
    assert numbers(told.largest) == [0, 2, 1, 3]
    assert numbers(told.detrimental) == [2, 1]
    assert numbers(told.removed_at_largest_cost) == [3, 1]
    assert told.largest[0].serves == (
        "Trouser",
        "T-shirt/top",
    )
    assert told.largest[2].harms == ("class 7",)


def test_only_the_top_ones() -> None:
    told = explain(small_plan(), top=1)
    assert numbers(told.largest) == [0]
    assert numbers(told.detrimental) == [2]
    assert numbers(told.removed_at_largest_cost) == [3]


def test_units_may_be_ranked_by_likely_harm() -> None:
    """With the effect on the true class units go by half its spread minus its mean (logs).

    That is below zero for a unit that likely helps; the size of the effect would not tell.
    """
    plan = small_plan(settings={"effect": "true-class"})
    told = explain(plan)
    assert told.ranked_by == "true-class"
    [group] = told.groups
    assert group.costs == (
        (pytest.approx(-0.018), pytest.approx(0.003)), (pytest.approx(-0.048), pytest.approx(0.302))
    )  # fmt: skip
    assert numbers(told.removed_at_largest_cost) == [3, 1]
    assert (
        "goes by the likely harm (half the standard deviation over the images minus the mean of "
        "log(p without the unit / p), p the true class's probability; nats)" in told.reading[1]
    )
    for width in (60, 100, 160):
        text = shown(plan, width)
        assert "mean size" not in text
        assert "|" not in text, "nor an absolute value"
    assert "likely harm: removed │ kept" in text
    assert re.search(
        r"body\.conv +1  removed  detrimental .* 0\.0010 +−0\.018  harms class 7\n", text
    )


@pytest.mark.parametrize(
    ("removed", "kept", "level"),
    [
        ((1.0, 2.0), (4.0, 9.0), 3.0),
        ((1.0, 5.0), (3.0, 9.0), 4.0),  # they overlap: two of the four lie below
        ((0.0, 0.0), (0.0, 1.0), 0.0),
        ((), (1.0,), None),
        ((1.0,), (), None),
    ],
)
def test_as_many_units_lie_below_the_threshold_as_were_removed(
    removed: tuple[float, ...], kept: tuple[float, ...], level: float | None
) -> None:
    effects = tuple(unit(i, kl, 0.0, "neutral") for i, kl in enumerate((*removed, *kept)))
    group = GroupPlan(
        name="g", kind="channels", units=len(effects), effects=effects,
        kept=tuple(range(len(removed), len(effects))),
    )  # fmt: skip
    [summary] = explain(small_plan(groups=(group,))).groups
    assert summary.threshold == level


def test_classes_may_be_named_by_the_folders_of_the_data() -> None:
    manifest = made_up_manifest()
    assert manifest.calibration is not None
    data = manifest.calibration.model_copy(update={"class_indices": {"cat": 0, "1": 1, "dog": 7}})
    model = manifest.model.model_copy(update={"class_names": ("T-shirt/top",)})
    told = explain(small_plan(), made_up_manifest(calibration=data, model=model))
    assert told.largest[0].serves == (
        "class 1",
        "T-shirt/top",
    )
    assert told.largest[2].harms == ("dog",)


def test_units_of_the_plan_are_all_counted() -> None:
    plan = made_up_plan()
    told = explain(plan)
    for group, summary in zip(plan.groups, told.groups, strict=True):
        assert sum(summary.kept_verdicts.values()) == len(group.kept) == summary.kept
        assert sum(summary.removed_verdicts.values()) == group.units - len(group.kept)
        assert summary.kept == len(group.kept)
        assert list(map(len, summary.costs)) == [summary.units - summary.kept, summary.kept]


# --- how it looks --------------------------------------------------------------------------------


def test_strips_show_removed_units_and_kept_ones() -> None:
    """Four costs of 0.001 to 0.4 on eight levels, the least at the bottom, the most at the top.

    log(0.01 / 0.001) / log(0.4 / 0.001) = .38, above three eighths; log(100) / log(400) = .77,
    above six. Of 31 characters beside the mark 16 are two of four units, the removed ones.
    """
    line = next(s for s in shown(small_plan(), 160).splitlines() if s.startswith("body.conv"))
    strip = line.split()[-1]
    assert strip == "▁" * 8 + "▄" * 8 + "│" + "▇" * 7 + "█" * 8


@pytest.mark.parametrize("width", [80, 86, 100, 109, 110, 140, 200])
def test_it_fits_the_terminal(width: int) -> None:
    text = shown(made_up_plan(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text, "nothing is cut"
    assert not re.search("^ *[▁-█│]+ *$", text, re.MULTILINE), "no strip runs over its line"
    strips = set()
    for group in made_up_plan().groups:
        [line] = [s for s in text.splitlines() if s.startswith(group.name) and "│" in s]
        assert re.search(rf" {group.units} +{len(group.kept)} ", line)
        strip = line.rstrip().split()[-1]
        assert re.fullmatch("[▁-█]+│[▁-█]+", strip), "both sides of the mark"
        strips.add(len(strip))
    assert len(strips) == 1, "no strip is cut short"
    flat = " ".join(text.split())
    assert "below zero the unit helps the prediction, above zero it harms it." in flat
    assert "Verdicts describe" in flat


def test_classes_stand_below_their_unit_where_there_is_no_room() -> None:
    wide, narrow = shown(small_plan(), 140), shown(small_plan(), 80)
    line = r"body\.conv +0  kept +critical +−30 % \(−31 to −29\) +0\.40"
    assert re.search(line + r"  serves Trouser, T-shirt/top\n", wide)
    assert re.search(line + r"\n  serves Trouser, T-shirt/top\n", narrow)


def test_a_long_name_has_a_line_of_its_own() -> None:
    name = "features.denseblock1.denselayer12.conv1"
    text = shown(small_plan(groups=(SMALL.model_copy(update={"name": name}),)), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "\nlargest effects\n" in text, "the heading too"
    assert re.search(
        rf"\n{re.escape(name)}\n     0  kept +critical +−30 % \(−31 to −29\) +0\.40\n"
        "    serves Trouser, T-shirt/top\n     2  kept",
        text,
    )


def test_a_layers_name_is_no_markup() -> None:
    group = SMALL.model_copy(update={"name": "body[red].conv"})
    assert "body[red].conv" in shown(small_plan(groups=(group,)), 140)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_tells_groups_and_units(command: Command, bundle: Path) -> None:
    done = command("explain", bundle)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(
        "demo-resnet: importance cswap, 40.1% of params removed; 9 groups: 190 of 336 units kept\n"
    )
    for title in ("What was removed", "Measured effects"):
        assert f"\n\n{title}\n" in done.out
    for heading in ("largest effects", "detrimental", "removed at the largest cost"):
        assert re.search(rf"^{heading} +unit ", done.out, re.MULTILINE)
    assert re.search(r"critical .* serves .*T-shirt/top", done.out)
    assert "\x1b" not in done.out, "no colours where there is no terminal"


def test_json_is_one_object(command: Command, bundle: Path) -> None:
    done = command("explain", bundle, "--json", "--top", 3)
    assert (done.code, done.err) == (0, "")
    told = done.json()
    plan = read_plan(bundle)
    assert [g["name"] for g in told["groups"]] == [g.name for g in plan.groups]
    assert told["ranked_by"] == "kl"
    assert all(
        g["units"] == g["kept"] + g["removed"] and g["threshold"] > 0 for g in told["groups"]
    )
    assert [len(told[k]) for k in ("largest", "detrimental", "removed_at_largest_cost")] == [3] * 3
    measured = [e for g in plan.groups for e in g.effects]
    verdicts = Counter(e.verdict for e in measured)
    for verdict, count in verdicts.items():
        both = (
            g[which][verdict]
            for g in told["groups"]
            for which in ("kept_verdicts", "removed_verdicts")
        )
        assert sum(both) == count
    most = max(measured, key=lambda e: abs(e.true_class))
    first = told["largest"][0]
    assert first["true_class"] == most.true_class
    assert [c["index"] for c in first["serves"]] == list(most.serves)
    assert {u["verdict"] for u in told["detrimental"]} == {"detrimental"}
    assert not any(u["kept"] for u in told["removed_at_largest_cost"])


def test_one_group(command: Command, bundle: Path) -> None:
    told = command("explain", bundle, "layer2.1.conv1", "--json").json()
    assert [g["name"] for g in told["groups"]] == ["layer2.1.conv1"]
    assert {u["group"] for u in told["largest"]} == {"layer2.1.conv1"}
    text = command("explain", bundle, "layer2.1.conv1").out
    assert "layer2.1.conv1: 2" in text.splitlines()[0]
    assert "layer2.0.conv1" not in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layer2.1", "fix: one of: layer2.1.conv1"),
        ("layer3.O.conv1", "layer3.0.conv1"),
        ("head", "no group 'head' among the plan's 9"),
        ("conv1", "'conv1' was left as it is: feeds the residual stream"),
    ],
)
def test_a_group_that_the_plan_does_not_have(
    command: Command, bundle: Path, name: str, words: str
) -> None:
    done = command("explain", bundle, name)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_a_folder_of_an_unfinished_build(command: Command, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(made_up_plan().canonical_json())
    done = command("explain", tmp_path)
    assert done.code == 0
    assert done.out.startswith("plan: importance cswap, ")
    assert re.search(r"critical .* serves class \d", done.out)


def test_a_baseline_has_no_effects_and_that_is_no_error(command: Command, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(magnitude_plan().canonical_json())
    done = command("explain", tmp_path)
    assert done.code == 0
    assert (
        "The importance magnitude ranks the units without measuring them, so there are no effects "
        "and no verdicts; build with --criterion cswap to have them." in " ".join(done.out.split())
    )
    assert "layer3.2.conv1" in done.out
    assert "critical" not in done.out
    told = command("explain", tmp_path, "--json").json()
    assert (told["ranked_by"], told["largest"]) == (None, [])


def test_the_dense_network(command: Command, tmp_path: Path) -> None:
    plan = made_up_plan().model_copy(update={"groups": ()})
    (tmp_path / "plan.json").write_text(plan.canonical_json())
    done = command("explain", tmp_path)
    assert done.code == 0
    assert "Nothing was removed: this is the dense network." in done.out
    done = command("explain", tmp_path, "layer1")
    assert done.code == 2
    assert "no group 'layer1': the plan has none" in done.err


def test_an_older_plan_still_reads(command: Command, tmp_path: Path) -> None:
    plan = made_up_plan().model_dump(mode="json")
    for group in plan["groups"]:
        for effect in group["effects"]:
            del effect["serves"], effect["harms"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = command("explain", tmp_path)
    assert done.code == 0
    assert "serves " not in done.out.replace("one that it serves ", "")


def test_a_folder_without_a_plan(command: Command, tmp_path: Path) -> None:
    done = command("explain", tmp_path)
    assert (done.code, done.out) == (6, "")
    assert f"{tmp_path} has no plan.json" in done.err
    assert "fix: name the folder that `cswap-deploy build -o`" in done.err
    done = command("explain", tmp_path / "nowhere")
    assert done.code == 6
    assert f"{tmp_path / 'nowhere'} does not exist" in done.err


def test_a_damaged_plan(command: Command, bundle: Path) -> None:
    plan = bundle / "plan.json"
    whole = plan.read_text()
    plan.write_text(whole.replace('"critical"', '"crucial"', 1))
    done = command("explain", bundle)
    assert (done.code, done.out) == (6, "")
    assert f"{bundle} is damaged: plan.json has " in done.err
    (bundle / "manifest.json").unlink()
    done = command("explain", bundle)
    assert done.code == 6
    assert "plan.json is not a PrunePlan of schema version 7: groups.0.effects." in done.err


def test_top_is_at_least_one(command: Command, bundle: Path) -> None:
    done = command("explain", bundle, "--top", 0)
    assert done.code == 2
    assert "Invalid value for '--top'" in done.err


def test_a_real_bundle(command: Command, made: Made) -> None:
    plan = read_plan(made.bundle)
    told = command("explain", made.bundle, "--json").json()
    assert sum(g["units"] for g in told["groups"]) == plan.dense.units
    assert sum(g["kept"] for g in told["groups"]) == plan.pruned.units
    for group in told["groups"]:
        assert group["kept_verdicts"]["not measured"] == 0
        assert group["largest"] is not None
    assert told["reading"][0].startswith("An effect is ")
