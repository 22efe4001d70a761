"""What is done where images are few for a network: mosaics, curves of groups, steps on trial."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import ground_of, lively, pictures, small_cnn, targets_of
from torch import Tensor, fx, nn

from cswap_deploy.causal import interventions
from cswap_deploy.causal.interventions import input_moments
from cswap_deploy.causal.mixtures import mosaics
from cswap_deploy.config import PruneConfig
from cswap_deploy.network.deletion import remove_units
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.pooling import balanced, pool_before
from cswap_deploy.network.units import consumers, mask_weight
from cswap_deploy.progress import Silent
from cswap_deploy.pruning import refit as module_of_refit
from cswap_deploy.pruning.allocation import Goal, Limits
from cswap_deploy.pruning.candidates import curved
from cswap_deploy.pruning.chains import find_chains
from cswap_deploy.pruning.curves import Curve, by_curves
from cswap_deploy.pruning.prepare import prepare
from cswap_deploy.pruning.refit import refit
from cswap_deploy.pruning.trials import (
    Ground,
    Judging,
    Trials,
    images_apart,
    starved,
    widened,
)

IMAGES = pictures(40, 8)[0]


class Pooled(nn.Module):
    """Many channels, averaged, and what reads them."""

    def __init__(self, pool: nn.Module, channels: int = 24) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, channels, 3, padding=1)
        self.pool = pool
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(torch.relu(self.features(x))).flatten(1))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2).flatten(1)[:, : x.shape[1]]


def make(pool: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Pooled(pool).eval()


def test_mosaics_show_parts_of_two_images_and_follow_their_seed() -> None:
    flat = torch.arange(1.0, 9.0).view(8, 1, 1, 1).expand(8, 3, 12, 12).contiguous()
    made = mosaics(flat, 20, seed=1)
    assert made.shape == (20, 3, 12, 12)
    assert torch.equal(made, mosaics(flat, 20, seed=1))
    assert not torch.equal(made, mosaics(flat, 20, seed=2))
    seen: list[float] = []
    for image in made:
        shown = image.round(decimals=3).unique().tolist()
        assert 1 <= len(shown) <= 2
        assert set(shown) <= set(range(1, 9)), "each place is of one image or the other"
        assert min(float((image[0] == value).float().mean()) for value in shown) >= 0.24
        seen += shown
    assert set(seen) == set(range(1, 9)), "each image comes up"


def test_a_mosaic_is_a_crop_as_the_picture_has_it() -> None:
    ramp = torch.arange(12.0).expand(1, 3, 12, 12).contiguous()
    for image in mosaics(ramp, 10, seed=0):
        assert 0 <= float(image.min()) <= float(image.max()) <= 11


@pytest.mark.parametrize("count", [8, 37, 300, 1000])
def test_what_evaluates_shares_no_picture_with_what_is_solved_on(count: int) -> None:
    marked = torch.arange(1.0, count + 1).view(count, 1, 1, 1).expand(count, 1, 4, 4).contiguous()
    images, order = widened(marked, torch.randperm(count), 1 << 30)
    assert len(images) == len(order) == 1024
    few, judges = images_apart(len(images))
    solved, judged = images[order[:few]], images[order[few : few + judges]]
    rest = images[order[few + judges :]]
    apart = {round(v, 3) for v in judged.flatten().tolist()}
    assert not apart & {round(v, 3) for v in torch.cat([solved, rest]).flatten().tolist()}
    assert set(range(1, count + 1)) <= {round(v, 3) for v in images.flatten().tolist()}


def test_enough_images_and_next_to_none_stay_as_they_are() -> None:
    for count, room in ((2, 1 << 30), (1024, 1 << 30), (1500, 1 << 30), (300, 4 * 4 * 200)):
        images, order = torch.rand(count, 1, 2, 2), torch.randperm(count)
        found = widened(images, order, room)
        assert found[0] is images
        assert found[1] is order
    assert len(widened(torch.rand(300, 1, 2, 2), torch.arange(300), 4 * 4 * 700)[0]) == 700


def test_starved_layers_are_those_with_fewer_rows_than_unknowns() -> None:
    graph = trace(make(nn.AdaptiveAvgPool2d(1)), IMAGES[:2])
    assert starved(graph, 23) == {"head": (23, 24)}
    assert not starved(graph, 24)


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(8), Mean()])
def test_what_is_averaged_is_found(pool: nn.Module) -> None:
    graph = trace(make(pool), IMAGES[:2])
    found = pool_before(graph.readers("head")[0], 24, 30)
    assert found is not None
    value = torch.rand(4, 24, 8, 8)
    assert found.channels == 1
    rows = found.rows(value, 1000)
    torch.testing.assert_close(rows.view(4, 64, 24).mean(1), value.mean((2, 3)))
    assert len(found.rows(value, 10)) == 40
    assert pool_before(graph.readers("head")[0], 24, 48) is None, "images enough"


@pytest.mark.parametrize("pool", [nn.AvgPool2d(4), Rows(), nn.AdaptiveMaxPool2d(1)])
def test_what_is_no_average_of_everything_is_left(pool: nn.Module) -> None:
    torch.manual_seed(0)
    network = Pooled(pool)
    network.head = nn.Linear(len(network.pool(torch.rand(1, 24, 8, 8)).flatten()), 5)
    graph = trace(network.eval(), IMAGES[:2])
    inputs = network.head.in_features
    assert pool_before(graph.readers("head")[0], inputs, 4) is None


def test_ablation_values_behind_an_average_use_what_is_averaged() -> None:
    """By hand: the covariance of averages and that of values, of the same trace."""
    graph = trace(make(nn.AdaptiveAvgPool2d(1)), IMAGES[:2])
    few = IMAGES[:20]
    moments = input_moments(graph, ["head"], few, intervention="predicted", chunk=7)["head"]
    values = torch.relu(graph.module.features(few)).detach().double()
    averages, rows = values.mean((2, 3)), values.permute(0, 2, 3, 1).reshape(-1, 24)
    covariance = balanced(averages.T.cov(correction=0), rows.T.cov(correction=0))
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(24)
    others = torch.tensor([i for i in range(24) if i != 3])
    by_hand = torch.linalg.solve(covariance[others][:, others], covariance[others, 3])
    (found,) = moments.ablation_values(torch.tensor([[3]]))
    assert found.weights is not None
    torch.testing.assert_close(found.weights[0, others].double(), by_hand, rtol=1e-3, atol=1e-4)


def test_few_rows_behind_an_average_tear_a_layer_less_far_away() -> None:
    """Twelve images for 24 inputs, of which a third goes: what others get from it."""
    network, images = make(nn.AdaptiveAvgPool2d(1)), pictures(300, 8)[0]
    dense = trace(copy.deepcopy(network), images[:2])
    said = dense.run(images[12:])[0].detach()
    errors = {}
    for way in ("averages", "both"):
        graph = dense.on(copy.deepcopy(network))
        with pytest.MonkeyPatch.context() as patch:
            if way == "averages":
                patch.setattr(interventions, "pool_before", lambda *_: None)
                patch.setattr(module_of_refit, "pool_before", lambda *_: None)
            moments = input_moments(
                graph, ["head"], images[:12], chunk=12, intervention="predicted"
            )
            (value,) = moments["head"].ablation_values(torch.arange(8)[None])
            interventions.fold(graph, "head", value)
            kept = {"head": torch.arange(8, 24)}
            refit(graph, targets_of(dense, images[:12]), kept, ridge=1e-3, most_bytes=1 << 30)
        errors[way] = float((graph.run(images[12:])[0].detach() - said).square().mean())
    assert errors["both"] < 0.7 * errors["averages"], errors


def prepared(*, branches: bool = False) -> Any:
    return prepare(small_cnn(), IMAGES16, PruneConfig(round_to=1, branches=branches))


IMAGES16 = pictures(40)[0]


def of_trials(few: bool = True, *, branches: bool = False) -> tuple[Trials, Goal, dict[str, Any]]:
    network = prepared(branches=branches)
    ground = replace(ground_of(network.dense, IMAGES16), few=few)
    names = [g.name for g in network.groups]
    goal = Goal(
        network.groups, Limits(dict.fromkeys(names, 1), dict.fromkeys(names, 1)),
        network.sizes, {}, "params", target=0.7 * network.dense_size.params,
    )  # fmt: skip
    moments = input_moments(
        network.graph, consumers(network.groups), IMAGES16, intervention="predicted", chunk=20
    )
    return Trials(network, {}, ground), goal, moments


def test_curves_are_measured_as_far_as_the_allocation_goes() -> None:
    trials, goal, moments = of_trials()
    order = {g.name: np.arange(g.units, dtype=float) for g in goal.groups}
    tried: list[dict[str, list[int]]] = []
    screen = Trials.screen

    def noted(self: Trials, gone: Any, moments: Any) -> float:
        tried.append(dict(gone))
        return screen(self, gone, moments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "screen", noted)
        ranking = by_curves(trials, goal, order, moments, Silent())
    gone = goal.choose(ranking)
    assert goal.without(gone).params <= 0.72 * goal.sizes.size().params
    assert tried[0] == {}
    for group in goal.groups:
        mine = [each[group.name] for each in tried if group.name in each]
        assert all(units == list(range(len(units))) for units in mine), "the order is kept"
        assert max(map(len, mine)) >= min(len(gone.get(group.name, ())), int(7 / 8 * group.units))
        values = ranking.values[group.name]
        assert (np.diff(values) >= 0).all()
    before = {name: tensor.clone() for name, tensor in trials.network.module.state_dict().items()}
    by_curves(trials, goal, order, moments, Silent())
    after = trials.network.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_screening_front_to_back_computes_what_lies_before_once() -> None:
    trials, goal, moments = of_trials(branches=True)
    trials, place = replace(trials, refits=False), trials.network.graph.position
    assert goal.branches
    removals = sorted(
        ({g.name: list(range(count))} for g in goal.groups for count in {1, min(3, g.units)}),
        key=lambda gone: place[trials.first_changed(gone)],
    )
    ran: list[fx.Node] = []
    execute = Graph.execute

    def noted(self: Graph, node: fx.Node, *args: Any, **settings: Any) -> Any:
        ran.append(node)
        return execute(self, node, *args, **settings)

    found, steps = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graph, "execute", noted)
        for each in (trials, trials.front_to_back()):
            ran.clear()
            found.append([each.screen(gone, moments) for gone in removals])
            steps.append(len(ran))
            backwards = [each.screen(gone, moments) for gone in reversed(removals)]
            assert backwards == pytest.approx(found[0][::-1], rel=1e-6)
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert len({*found[0]}) == len(removals), "or the test shows nothing"
    assert steps[1] < 0.8 * steps[0]


def test_a_group_that_costs_more_together_gives_up_less() -> None:
    """Single effects are the same in both groups; parts of one cost a hundred times as much."""
    trials, goal, moments = of_trials()
    dear = max(goal.groups, key=lambda g: g.units).name
    order = {g.name: np.arange(g.units, dtype=float) for g in goal.groups}

    def screen(self: Trials, gone: Any, moments: Any) -> float:
        return sum(
            (100.0 if name == dear else 1.0) * (len(units) / 10) ** 2
            for name, units in gone.items()
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "screen", screen)
        gone = goal.choose(by_curves(trials, goal, order, moments, Silent()))
    even = goal.choose(goal.uniform(order))
    assert len(gone.get(dear, ())) < len(even[dear])


def test_costs_of_a_curve_follow_the_square_between_its_points() -> None:
    group: Any = SimpleNamespace(name="g", kind="channels")
    curve = Curve(group, list(range(8)), [4, 8], [0.16, 0.64])
    np.testing.assert_allclose(curve.costs().cumsum(), (0.1 * np.arange(1, 9)) ** 2, atol=1e-9)
    assert curve.next is None
    assert Curve(group, [0, 1], [1, 2], [0.1]).next == 2


def test_without_a_refit_a_branch_is_tried_as_what_deleting_it_leaves() -> None:
    """Its mean, which only a refit can make up for, is another network."""
    trials, goal, moments = of_trials(branches=True)
    trials = replace(trials, refits=False)
    assert goal.branches
    images = trials.ground.batches.images
    for branch in goal.branches:
        gone = {branch.name: [0]}
        tried = trials.trial(gone, moments)
        smaller = copy.deepcopy(trials.network.dense.module)
        remove_units(smaller, gone, trials.network.groups)
        with torch.no_grad():
            torch.testing.assert_close(tried.module(images), smaller(images))
        refitted = replace(trials, refits=True).screen(gone, moments)
        assert trials.screen(gone, moments) != pytest.approx(refitted), branch.name


def test_curves_are_for_few_images_only() -> None:
    trials, goal, moments = of_trials(few=False)
    orders = {"effect": {g.name: np.arange(g.units, dtype=float) for g in goal.groups}}
    assert curved(trials, goal, orders, moments, Silent()) == {}
    few = Trials(trials.network, {}, replace(trials.ground, few=True))
    assert list(curved(few, goal, orders, moments, Silent())) == ["effect, by curves"]
    assert curved(few, goal, orders, {}, Silent()) == {}, "nothing is folded: too far off to tell"


def test_what_does_not_help_other_images_is_not_taken() -> None:
    """A refit towards wrong targets: with a judge the network stays as it was."""
    module = small_cnn()
    dense = trace(copy.deepcopy(module), IMAGES16[:2])
    graph = dense.on(module)
    wrong = targets_of(dense, IMAGES16)
    wrong.of("out.0").add_(5.0)
    kept = {"out.0": torch.arange(12)}
    ground = replace(ground_of(dense, IMAGES16), few=True)
    before = module.out[0].weight.clone(), dense_logits(graph)
    refit(graph, wrong, kept, most_bytes=1 << 30, judge=Judging(graph, ground))
    assert torch.equal(module.out[0].weight, before[0])
    torch.testing.assert_close(dense_logits(graph), before[1], rtol=0, atol=0)
    refit(graph, wrong, kept, most_bytes=1 << 30)
    assert float((dense_logits(graph) - before[1]).abs().max()) > 0.1, "or the test shows nothing"


def dense_logits(graph: Graph) -> Tensor:
    with torch.inference_mode():
        return graph.run(IMAGES16)[0].clone()


def judged(images: Tensor) -> tuple[Graph, Ground, Judging]:
    """A network to change, its dense one's ground, and what judges the changes."""
    module = lively(small_cnn())
    dense = trace(copy.deepcopy(module), images[:2])
    graph = dense.on(module)
    ground = replace(ground_of(dense, images), few=True)
    return graph, ground, Judging(graph, ground)


@pytest.mark.parametrize(("images", "parts"), [(IMAGES16, 1), (pictures(160)[0], 2)])
def test_a_judge_gives_what_a_whole_forward_gives(images: Tensor, parts: int) -> None:
    graph, ground, judging = judged(images)
    assert len(ground.first_parts) == parts
    for name in ("expand.0", "project.0", "out.0", "classifier"):
        node: fx.Node = graph.readers(name)[0]
        with torch.no_grad():
            graph.layer(name).weight.mul_(1.05)
        whole = float(ground.divergence(graph, parts=parts).mean())
        assert judging.effect(node) == pytest.approx(whole, rel=1e-5, abs=1e-9)
        assert judging.effect(node) == pytest.approx(whole, rel=1e-5, abs=1e-9)


def test_a_judge_runs_as_many_images_at_once_as_fit() -> None:
    graph, ground, _ = judged(IMAGES16)
    small = replace(ground, batches=replace(ground.batches, size=7))
    judging, most = Judging(graph, small), []
    execute = Graph.execute

    def noted(self: Graph, node: fx.Node, *args: Any, batch: int, **settings: Any) -> Any:
        most.append(batch)
        return execute(self, node, *args, batch=batch, **settings)

    for name in ("expand.0", "out.0"):
        with torch.no_grad():
            graph.layer(name).weight.mul_(1.05)
        whole = float(ground.divergence(graph, parts=1).mean())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Graph, "execute", noted)
            assert judging.effect(graph.readers(name)[0]) == pytest.approx(whole, rel=1e-5)
    assert max(most) == 7


def test_a_step_that_is_not_taken_leaves_the_producer_too() -> None:
    """A judge that is never content: the reconstructed producer goes back with its consumer."""
    module = lively(small_cnn())
    dense = trace(copy.deepcopy(module), IMAGES16[:2])
    graph = dense.on(module)
    mask_weight(graph.layer("project.0"), torch.tensor([0, 1, 2]))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    kept = {"project.0": torch.arange(3, 12)}
    asked: list[fx.Node] = []

    class Content:
        def effect(self, node: fx.Node) -> float:
            asked.append(node)
            return float(len(asked))

    settings: Any = {"reconstruct": ["project.0"], "most_bytes": 1 << 30}
    targets = targets_of(dense, IMAGES16)
    chains = find_chains(graph, ["project.0"])
    done = refit(graph, targets, kept, judge=Content(), **settings)
    assert done.producers == ()
    assert {*asked} == {chains[0].producer if chains else graph.readers("project.0")[0]}
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_judge_that_is_asked_for_an_earlier_layer_begins_anew() -> None:
    graph, ground, judging = judged(IMAGES16)
    judging.effect(graph.readers("out.0")[0])
    with torch.no_grad():
        graph.layer("expand.0").weight.mul_(1.1)
    whole = float(ground.divergence(graph, parts=1).mean())
    assert judging.effect(graph.readers("expand.0")[0]) == pytest.approx(whole, rel=1e-5)


def test_the_last_refit_leaves_out_what_evaluates_where_images_are_few() -> None:
    dense = trace(small_cnn(), IMAGES16[:2])
    ground: Ground = ground_of(dense, IMAGES16)
    assert len(ground.solved_on) == len(IMAGES16)
    few = replace(ground, few=True)
    apart, judges = images_apart(len(IMAGES16))
    evaluating = ground.batches.rows[apart : apart + judges].tolist()
    assert not {*few.solved_on.rows.tolist()} & {*evaluating}
