"""Pruning to a latency, on a device that is made up: its law is known, and not to the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import CLASSES, pictures, small_cnn, small_vit
from torch import nn

from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration
from cswap_deploy.errors import PruneError, UsageError
from cswap_deploy.progress import Silent
from cswap_deploy.pruning.allocation import Goal, Ranking, Removal
from cswap_deploy.pruning.approach import Timed, next_to_time
from cswap_deploy.pruning.candidates import Choice
from cswap_deploy.pruning.prepare import prepare
from cswap_deploy.pruning.prune import Pruned, prune
from cswap_deploy.pruning.timing import Variant
from cswap_deploy.records.latency import TimedGraph
from cswap_deploy.runtime.node_times import GraphTimes, NodeTime

IMAGES, LABELS = pictures(40)


class MadeUpDevice:
    """A fake: a layer takes what its multiply-accumulates say, and the whole call a bit more."""

    def __init__(self, *, per_mac: float = 1e-6, fixed: float = 0.02, off: float = 1.0) -> None:
        self.per_mac, self.fixed, self.off = per_mac, fixed, off
        self.calls = 0
        self.dense = 0.0

    def timed(self, variants: Sequence[Variant]) -> list[TimedGraph]:
        found = [(widths, self.time(make())) for widths, make in variants]
        self.dense = found[0][1].ms
        return [TimedGraph(widths=w, nodes=tuple(t.nodes), ms=t.ms) for w, t in found]

    def fraction(self, module: nn.Module) -> float | None:
        self.calls += 1
        return self.time(module).ms / self.dense * self.off

    def time(self, module: nn.Module) -> GraphTimes:
        nodes: list[NodeTime] = []
        hooks = []
        for name, layer in module.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue

            def note(layer: nn.Module, args: Any, out: Any, name: str = name) -> None:
                weight = layer.weight
                positions = out.numel() // out.shape[-1 if weight.ndim == 2 else 1]
                op = "Gemm" if weight.ndim == 2 else "Conv"
                shapes = (tuple(args[0].shape), tuple(weight.shape)), (tuple(out.shape),)
                ms = self.fixed + self.per_mac * weight.numel() * positions
                nodes.append(NodeTime(f"{name}/{op}", op, ms, *shapes))

            hooks.append(layer.register_forward_hook(note))
        with torch.no_grad():
            module(IMAGES[:1])
        for hook in hooks:
            hook.remove()
        return GraphTimes(nodes, sum(node.ms for node in nodes))


def run(module: nn.Module, device: MadeUpDevice | None, **settings: Any) -> Pruned:
    config = PruneConfig(
        **({"rounds": 2, "scoring_samples": 10, "round_to": 1, "measuring": "exact"} | settings)
    )
    return prune(
        module, Calibration(IMAGES, LABELS), config=config, device=device, progress=Silent()
    )


@pytest.mark.parametrize("make", [small_cnn, small_vit])
@pytest.mark.parametrize("off", [1.0, 1.06])
def test_the_speed_up_is_reached_as_measured_even_where_the_model_is_off(
    make: Any, off: float
) -> None:
    device = MadeUpDevice(off=off, fixed=0.001)
    result = run(make(), device, speedup=1.4)
    reached = result.plan.rounds[-1].speedup
    assert reached is not None
    assert reached == pytest.approx(1.4, rel=0.03)
    assert reached == pytest.approx(1 / device.fraction(result.module), rel=1e-6)
    assert result.plan.ratio_of == "latency"
    assert result.plan.dense.latency_ms == pytest.approx(device.dense, rel=0.03)
    assert result.plan.removed["latency"] > 0.2


def test_a_latency_is_a_speed_up_of_what_was_timed() -> None:
    device = MadeUpDevice(fixed=0.001)
    result = run(small_cnn(), device, max_latency=f"{0.7 * device.time(small_cnn()).ms:.6f}ms")
    assert result.plan.rounds[-1].speedup == pytest.approx(1 / 0.7, rel=0.03)


def test_where_time_is_launches_depth_goes() -> None:
    """Nothing but whole branches saves any time here."""
    device = MadeUpDevice(per_mac=1e-12, fixed=0.1)
    result = run(small_vit(), device, speedup=1.25)
    gone = [g.name for g in result.plan.groups if g.kind == "branch" and not g.kept]
    assert gone


def test_out_of_reach_is_refused_with_the_range() -> None:
    with pytest.raises(PruneError, match="cannot be reached") as failed:
        run(small_cnn(), MadeUpDevice(fixed=0.5), speedup=3.0)
    assert failed.value.fix is not None
    wanted = float(failed.value.fix.split("--speedup ")[1].split()[0])
    assert 1 < wanted < 3


def test_what_stays_slower_as_measured_is_refused_with_what_was_reached() -> None:
    """A device on which the model is wrong: nothing that is removed saves anything."""
    device = MadeUpDevice(fixed=0.001)
    device.fraction = lambda module: 1.02  # type: ignore[method-assign]
    with pytest.raises(PruneError, match=r"1\.40x was not reached.*0\.98x") as failed:
        run(small_cnn(), device, speedup=1.4)
    assert failed.value.fix == "pass --ratio 0 to build the dense network"


def test_a_latency_that_the_dense_network_has_is_refused() -> None:
    with pytest.raises(PruneError, match="the dense network takes"):
        run(small_cnn(), MadeUpDevice(), max_latency=1e6)


def test_without_a_device_it_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a target"):
        run(small_cnn(), None, speedup=1.2)


@pytest.mark.parametrize(
    "settings",
    [
        {"speedup": 1.5, "ratio": 0.4}, {"speedup": 1.5, "max_latency": 3.0},
        {"speedup": 1.5, "ratio_of": "params"}, {"max_latency": "4ms", "ratio_of": "macs"},
    ],
)  # fmt: skip
def test_two_aims_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="are one aim"):
        PruneConfig(**settings)


def test_an_aim_survives_being_written_down() -> None:
    asked = PruneConfig(speedup=1.6)
    assert asked.ratio_of == "latency"
    assert asked.ratio == pytest.approx(1 - 1 / 1.6)
    assert PruneConfig(**asked.model_dump(mode="json")) == asked
    assert PruneConfig(max_latency="4.5ms").max_latency == 4.5


class Table(MadeUpDevice):
    """A fake: the same device by a table alone, as one that is elsewhere."""

    def fraction(self, module: nn.Module) -> None:
        self.calls += 1


def test_a_device_that_is_elsewhere_is_taken_at_its_table_s_word() -> None:
    device = Table(fixed=0.001)
    result = run(small_cnn(), device, speedup=1.4)
    reached = result.plan.rounds[-1].speedup
    assert reached == pytest.approx(1.4, rel=0.05)
    assert reached == pytest.approx(
        MadeUpDevice.time(device, small_cnn()).ms / device.time(result.module).ms, rel=0.05
    )


def test_the_plan_says_where_the_time_went_and_what_was_timed() -> None:
    device = MadeUpDevice(per_mac=1e-12, fixed=0.1, off=1.02)
    plan = run(small_vit(), device, speedup=1.23).plan
    assert plan.latency is not None
    before = sum(layer.dense_ms for layer in plan.latency.layers)
    after = sum(layer.pruned_ms for layer in plan.latency.layers)
    assert before == pytest.approx(plan.dense.latency_ms, rel=1e-6)
    assert after == pytest.approx(plan.pruned.latency_ms, rel=1e-6)
    assert plan.latency.depth_ms == pytest.approx(before - after, rel=0.02), "width saves nothing"
    last = plan.rounds[-1]
    assert last.speedup in [each.measured for each in last.tries]
    assert all(each.predicted > 1 for each in last.tries)


class Stairs(MadeUpDevice):
    """A fake: one layer takes far more above so many of its outputs, which the model never saw."""

    layer, edge, more = "", 0, 0.0

    def fraction(self, module: nn.Module) -> float:
        self.calls += 1
        layer = module.get_submodule(self.layer)
        assert isinstance(layer, nn.Conv2d)
        step = self.more * (layer.out_channels > self.edge)
        return (self.time(module).ms + step * self.dense) / (1 + self.more) / self.dense


@pytest.mark.parametrize("name", ["expand.0", "grouped.0", "out.0"])
def test_where_a_step_of_the_device_leads_past_the_aim_others_go_instead(name: str) -> None:
    """Any unit of that layer goes far past 1.25x; what the others give up reaches it."""
    device = Stairs(fixed=0.001)
    device.layer, device.more = name, 0.6
    device.edge = small_cnn().get_submodule(name).out_channels - 1  # type: ignore[operator]
    plan = run(small_cnn(), device, speedup=1.25, rounds=1).plan
    assert plan.rounds[-1].speedup == pytest.approx(1.25, rel=0.03)


class OneStep(MadeUpDevice):
    """A fake: every layer's first unit doubles the speed, so that nothing lies in between."""

    def fraction(self, module: nn.Module) -> float:
        dense = sum(p.numel() for p in small_cnn().parameters())
        return 0.5 if sum(p.numel() for p in module.parameters()) < dense else 1.0


def test_where_nothing_lies_near_it_is_refused_with_what_lies_around_it() -> None:
    with pytest.raises(PruneError, match=r"1\.25x was not reached.*1\.00x and 2\.00x") as failed:
        run(small_cnn(), OneStep(fixed=0.001), speedup=1.25, rounds=1)
    assert failed.value.fix == "pass --speedup 2.00"
    reached = run(small_cnn(), OneStep(fixed=0.001), speedup=2.0, rounds=1).plan.rounds[-1].speedup
    assert reached == pytest.approx(2)


def test_what_is_quicker_than_a_latency_meets_it_and_says_so() -> None:
    dense = MadeUpDevice(fixed=0.001).time(small_cnn()).ms
    result = run(small_cnn(), OneStep(fixed=0.001), max_latency=dense / 1.25, rounds=1)
    assert result.plan.rounds[-1].speedup == pytest.approx(2)
    (note,) = result.notes
    assert "2.00x as fast where 1.25x was asked" in note
    assert "the next slower one has 1.00x" in note
    assert run(small_cnn(), MadeUpDevice(fixed=0.001), speedup=1.25, rounds=1).notes == ()


def test_widths_stay_multiples_of_the_alignment() -> None:
    """A runtime may have no kernel for others; a unit less would undo what the others save."""
    torch.manual_seed(0)
    wide = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 40, 3), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, CLASSES)]
    module = nn.Sequential(*wide, *head).eval()
    plan = run(module, MadeUpDevice(fixed=0.001), speedup=1.63, round_to="auto").plan
    widths = {len(group.kept) for group in plan.groups}
    assert widths < {*range(8, 41, 8)}, "the ratio of another quantity is met to the unit"
    plan = run(module, None, ratio=0.4, round_to="auto").plan
    assert any(len(group.kept) % 8 for group in plan.groups)


@pytest.mark.parametrize("wanted", [0.8, 0.9])
def test_a_step_of_one_group_is_tried_where_the_ranking_has_nothing(wanted: float) -> None:
    """The nearest by the model, on from what is slower or back from what is quicker."""
    prepared = prepare(small_cnn(), IMAGES, PruneConfig(ratio=0.5, round_to=2, branches=False))
    names = [group.name for group in prepared.groups]
    prized, *others = names
    values = {g.name: np.arange(g.units, dtype=float) for g in prepared.groups}
    values[prized] = np.full(len(values[prized]), np.inf)
    total = prepared.dense_size.amount("macs")
    goal = Goal(prepared.groups, prepared.limits, prepared.sizes, {}, "macs", target=wanted * total)

    def timed(gone: Removal) -> Timed:
        amount = goal.without(gone).amount("macs") / total
        choice = Choice("a", gone, {}, None, goal, Ranking(values), stepped=True)
        return Timed(choice, amount, amount)

    tried = [timed({}), timed({name: list(range(2)) for name in others})]
    assert tried[1].fraction < wanted < 1
    expected = min(
        [{name: [0, 1]} for name in others]
        + [{name: [0, 1] for name in others if name != kept} for kept in others],
        key=lambda gone: abs(math.log(timed(gone).fraction / wanted)),
    )
    found = next_to_time(tried, wanted)
    assert found is not None
    assert {name: units for name, units in found.gone.items() if units} == expected
    assert prized not in found.gone
    seen = tried
    while (following := next_to_time(seen, wanted)) is not None:
        assert following.gone not in [each.choice.gone for each in seen]
        seen = [*seen, timed(following.gone)]
