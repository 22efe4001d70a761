"""Where the time went, as the report says it."""

from __future__ import annotations

from cswap_deploy.records.plan import (
    GroupPlan,
    LatencyByLayer,
    LayerTime,
    PrunePlan,
    RoundLog,
    Size,
    TimedTry,
)
from cswap_deploy.report.cells import text
from cswap_deploy.report.time import time_by_layer


def plan(layers: tuple[LayerTime, ...], *, depth: float, gone: bool) -> PrunePlan:
    size = Size(units=1, params=1, macs=1)
    return PrunePlan(
        settings={"ratio": 0.4, "ratio_of": "latency"}, dense=size, pruned=size,
        groups=(GroupPlan(name="block", kind="branch", units=1, kept=() if gone else (0,)),),
        rounds=(
            RoundLog(
                round=1, measured=1, removed=1, params=1, seconds=1.0, speedup=1.5,
                tries=tuple(
                    TimedTry(predicted=p, measured=m) for p, m in ((1.6, 1.5), (1.7, 1.7))
                ),
            ),
        ),
        latency=LatencyByLayer(layers=layers, depth_ms=depth),
    )  # fmt: skip


def test_depth_and_width_come_to_what_was_saved() -> None:
    layers = (
        LayerTime(layer="stem", dense_ms=1.0, pruned_ms=0.75),
        LayerTime(layer="block.conv1", dense_ms=0.5, pruned_ms=0.0),
    )
    section = time_by_layer(plan(layers, depth=0.5, gone=True))
    assert section is not None
    (sentence, _) = section.text
    assert "1.50 ms before and 0.750 ms after" in sentence
    assert "1 whole branch saved 0.500 ms of it (depth), narrower layers 0.250 ms" in sentence
    (tries,) = section.tables
    assert [[text(cell) for cell in column.cells] for column in tries.columns] == [
        ["1", "1"], ["1.60x", "1.70x"], ["1.50x", "1.70x"], ["+6.7 %", "0 %"],
    ]  # fmt: skip
    svg = section.figures[0].svg()
    assert "block.conv1" in svg
    assert "stem" in svg


def test_without_a_branch_all_of_it_is_width_and_without_an_aim_there_is_nothing() -> None:
    layers = (LayerTime(layer="stem", dense_ms=1.0, pruned_ms=0.75),)
    whole = plan(layers, depth=0.0, gone=False)
    section = time_by_layer(whole)
    assert section is not None
    assert "all of it is width" in section.text[0]
    assert time_by_layer(whole.model_copy(update={"latency": None})) is None


def test_a_deep_network_is_drawn_by_its_blocks() -> None:
    layers = tuple(
        LayerTime(layer=f"stages.{s}.blocks.{b}.conv{k}", dense_ms=0.1, pruned_ms=0.05)
        for s in range(4) for b in range(10) for k in range(3)
    )  # fmt: skip
    section = time_by_layer(plan(layers, depth=0.0, gone=False))
    assert section is not None
    assert "12.0 ms before and 6.00 ms after" in section.text[0]
    svg = section.figures[0].svg()
    assert "stages.3.blocks.9<" in svg.replace(" ", "").replace("\n", "")
    assert "conv2" not in svg
