"""An intervention that is measured is the one that becomes part of the weights."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import lively, measure_group, pictures, small_cnn, small_vit, traced
from torch import Tensor, nn

from cswap_deploy.causal.effects import Effects, kl_divergence, relative_effect
from cswap_deploy.causal.interventions import (
    RIDGE,
    Intervention,
    ablation_values,
    fold,
    input_moments,
)
from cswap_deploy.causal.significance import find_verdicts
from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.groups import find_groups
from cswap_deploy.network.offsets import needs_bias, norm_after, set_offset
from cswap_deploy.network.units import Group
from cswap_deploy.progress import Silent
from cswap_deploy.pruning.prune import prune

IMAGES, LABELS = pictures(30)
UNITS = [
    (small_cnn, "stem.0", 2),  # a stream with three consumers
    (small_cnn, "expand.0", 5),  # gated by squeeze-and-excitation, that reads it too
    (small_cnn, "squeeze", 1),
    (small_cnn, "down.0", 3),  # a slot of a grouped convolution
    (small_cnn, "grouped.0", 0),
    (small_cnn, "out.0", 7),
    (small_vit, "blocks.0.attn.qkv", 1),  # a head: eight inputs
    (small_vit, "blocks.0.mlp.fc1", 4),
]


def logits(module: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(images)
    return found


def moments_of(
    graph: Graph, group: Group, intervention: Intervention, images: Tensor, ridge: float = RIDGE
) -> Any:
    layers = [c.layer for c in group.consumers]
    return input_moments(graph, layers, images, intervention=intervention, chunk=16, ridge=ridge)


def folded(graph: Graph, group: Group, unit: int, moments: Any) -> nn.Module:
    """A copy from which the unit is gone, its ablation value in its place."""
    module = copy.deepcopy(graph.module)
    for entry in group.consumers:
        (ablation_value,) = ablation_values(moments.get(entry.layer), [entry.indices[unit]])
        fold(graph.on(module), entry.layer, ablation_value)
    return module


@pytest.mark.parametrize("intervention", ["zero", "mean", "predicted"])
@pytest.mark.parametrize(("make", "name", "unit"), UNITS, ids=[n for _, n, _ in UNITS])
def test_measured_effect_is_that_of_the_folded_network(
    make: Any, name: str, unit: int, intervention: Intervention
) -> None:
    graph, groups = traced(make)
    module, group = graph.module, groups[name]
    moments = moments_of(graph, group, intervention, IMAGES)
    assert bool(moments) == (intervention != "zero")
    found = measure_group(
        graph, group, [unit], images=IMAGES, labels=LABELS, moments=moments, variant_bytes=1 << 17
    )
    gone = folded(graph, group, unit, moments)
    before, after = logits(module).double(), logits(gone).double()
    rows = torch.arange(len(LABELS))
    p, q = F.softmax(before, 1)[rows, LABELS], F.softmax(after, 1)[rows, LABELS]
    assert np.abs(found.true_class).max() > 1e-3, "the comparison is empty"
    np.testing.assert_allclose(found.true_class, relative_effect(q[None], p).numpy(), atol=1e-4)
    np.testing.assert_allclose(found.kl, kl_divergence(after[None], before).numpy(), atol=1e-4)
    # Nothing reads the unit any more.
    for entry in group.consumers:
        layer: Any = gone.get_submodule(entry.layer)
        index = torch.tensor(entry.indices[unit]) % layer.weight.shape[1]
        assert not layer.weight[:, index].any()


def test_the_three_interventions_differ() -> None:
    graph, groups = traced(small_cnn)
    kinds: tuple[Intervention, ...] = ("zero", "mean", "predicted")
    kl = {
        kind: measure_group(
            graph, groups["out.0"], range(10), images=IMAGES, labels=LABELS,
            moments=moments_of(graph, groups["out.0"], kind, IMAGES),
        ).kl.mean()
        for kind in kinds
    }  # fmt: skip
    assert kl["predicted"] < kl["mean"] < kl["zero"]


# --- what the others predict ---------------------------------------------------------------------


class Dependent(nn.Module):
    """Unit 2 is half of unit 0 minus unit 1 plus three, at every position."""

    def __init__(self, *, linear: bool) -> None:
        super().__init__()
        self.units = nn.Conv2d(3, 6, 3, padding=1)
        self.reader = nn.Linear(6, 4) if linear else nn.Conv2d(6, 4, 1)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y = self.units(x)
        return self.reader(y.mean((2, 3))) if self.linear else self.reader(y).mean((2, 3))


@cache
def dependent(*, linear: bool) -> tuple[Graph, Group]:
    torch.manual_seed(0)
    module: Any = lively(Dependent(linear=linear))
    for p in (module.units.weight.data, module.units.bias.data):
        p[2] = 0.5 * p[0] - p[1]
    module.units.bias.data[2] += 3.0
    images = pictures(2)[0]
    (group,) = find_groups(trace(module, images)).groups
    return trace(module, images), group


@pytest.mark.parametrize("linear", [False, True], ids=["1x1", "linear"])
def test_unit_that_the_others_give_has_no_effect_and_folds_exactly(
    linear: bool,
) -> None:
    graph, group = dependent(linear=linear)
    moments = moments_of(graph, group, "predicted", IMAGES, 1e-9)
    found = measure_group(
        graph, group, range(6), images=IMAGES, labels=LABELS % 4, moments=moments
    ).true_class
    assert np.abs(found[2]).max() < 1e-4
    # 0, 1 and 2 each follow from the other two; the rest do not.
    assert np.abs(found[3:]).max(1).min() > (1e-3 if linear else 1e-2)
    before = logits(graph.module)
    torch.testing.assert_close(logits(folded(graph, group, 2, moments)), before, rtol=0, atol=1e-4)
    assert (logits(folded(graph, group, 2, {})) - before).abs().max() > 0.5
    means = moments_of(graph, group, "mean", IMAGES)
    assert (logits(folded(graph, group, 2, means)) - before).abs().max() > 1e-2
    # And on images that nothing was fitted on.
    fresh = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(
        logits(folded(graph, group, 2, moments), fresh), logits(graph.module, fresh),
        rtol=0, atol=1e-3,
    )  # fmt: skip


def test_with_the_ridge_that_ships_little_is_left_of_it() -> None:
    graph, group = dependent(linear=False)
    before = logits(graph.module)
    distance = {
        kind: (logits(folded(graph, group, 2, moments_of(graph, group, kind, IMAGES))) - before)
        .abs()
        .max()
        .item()
        for kind in ("mean", "predicted")
    }
    assert distance["predicted"] < distance["mean"] / 50


def test_units_that_left_predict_nothing() -> None:
    """After a unit is folded away, nobody leans on it: its row and column are dead."""
    graph, group = dependent(linear=False)
    gone = folded(graph, group, 2, moments_of(graph, group, "predicted", IMAGES))
    later = graph.on(gone)
    (ablation_value,) = ablation_values(
        moments_of(later, group, "predicted", IMAGES)["reader"], [[0]]
    )
    assert ablation_value.weights is not None
    assert ablation_value.weights[0, 2] == 0.0
    assert ablation_value.weights[0, 0] == 0.0
    assert ablation_value.weights[0, [1, 3, 4, 5]].abs().min() > 0


# --- planted units -------------------------------------------------------------------------------

FIRST, SECOND, WEAK, UNREAD, OTHER = range(5)


class Planted(nn.Module):
    """A unit for each of five input channels, read by hand-set weights.

    0 and 1 are the same and decide the class; either could do it alone. 2 and 4 speak for a class
    at random, weakly. Nothing reads 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Conv2d(5, 5, 1)
        self.classifier = nn.Linear(5, 2)
        with torch.no_grad():
            self.units.weight.copy_(torch.eye(5)[..., None, None])
            self.units.weight[SECOND] = self.units.weight[FIRST]
            self.units.bias.zero_()
            one = torch.tensor([1.0, 1.0, 0.3, 0.0, 0.5])
            self.classifier.weight.copy_(torch.stack([-one, one]))
            self.classifier.bias.copy_(torch.tensor([1.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.classifier(torch.relu(self.units(x)).mean((2, 3)))
        return found


def planted_images() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    images = torch.rand(60, 5, 4, 4, generator=g) * 0.1
    images[:, 0] += labels.view(-1, 1, 1).float()
    images[:, [2, 3, 4]] += torch.rand(60, 3, 1, 1, generator=g)
    return images, labels


def measured(graph: Graph, group: Group, kind: Intervention) -> Effects:
    images, labels = planted_images()
    return measure_group(
        graph, group, range(5), images=images, labels=labels,
        moments=moments_of(graph, group, kind, images),
    )  # fmt: skip


def verdicts(effects: Effects) -> tuple[str, ...]:
    labels = planted_images()[1].numpy()
    return find_verdicts(effects.true_class, labels, alpha=0.05, min_effect=0.01).verdicts


def test_of_two_that_are_the_same_each_alone_is_neutral_and_the_last_is_critical() -> None:
    module = Planted().eval()
    images, _ = planted_images()
    graph = trace(module, images[:2])
    (group,) = find_groups(trace(module, images[:2])).groups
    before = measured(graph, group, "predicted")
    assert verdicts(before)[:2] == ("neutral", "neutral")
    assert np.abs(before.true_class[:2]).max() < 1e-3
    # With the zero intervention nothing predicts the other one: both look critical.
    assert verdicts(measured(graph, group, "zero"))[:2] == ("critical", "critical")
    gone = folded(graph, group, FIRST, moments_of(graph, group, "predicted", images))
    torch.testing.assert_close(logits(gone, images), logits(module, images), rtol=0, atol=5e-3)
    after = measured(graph.on(gone), group, "predicted")
    assert verdicts(after)[SECOND] == "critical"
    assert after.true_class[SECOND].mean() < -0.1
    assert np.abs(after.true_class[FIRST]).max() < 1e-6


@pytest.mark.parametrize("select", ["set", "unit"])
def test_one_of_two_that_are_the_same_stays_and_the_unread_goes_first(select: Any) -> None:
    images, labels = planted_images()
    before = logits(Planted(), images).softmax(1)

    def kept(units: int, rounds: int) -> set[int]:
        config = PruneConfig(
            ratio=units / 5, ratio_of="channels", rounds=rounds, round_to=1, scoring_samples=60,
            select=select, measuring="exact",
        )  # fmt: skip
        result = prune(
            Planted().eval(), Calibration(images, labels), config=config, progress=Silent()
        )
        if units == 2:
            after = logits(result.module, images).softmax(1)
            assert (after - before).abs().max() < 0.02
        return set(result.plan.groups[0].kept)

    assert kept(1, 1) == {FIRST, SECOND, WEAK, OTHER}
    left = kept(3, 3)
    assert UNREAD not in left
    assert len(left & {FIRST, SECOND}) == 1, "one of the two, and only one"
    assert kept(2, 2) in ({FIRST, WEAK, OTHER}, {SECOND, WEAK, OTHER})
    if select == "unit":
        # All at once, each looks as if the other were there: that is what the rounds are for.
        assert kept(3, 1) == {WEAK, OTHER}


# --- constants without a bias --------------------------------------------------------------------


class Normed(nn.Module):
    """A convolution without bias that only a batch norm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Conv2d(3, 6, 3, padding=1)
        self.reader = nn.Conv2d(6, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.plain = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.plain(torch.relu(self.norm(self.reader(torch.relu(self.units(x))))))
        return found.mean((2, 3))


def test_constant_goes_into_the_running_mean() -> None:
    torch.manual_seed(1)
    module: Any = lively(Normed())
    graph = trace(module, IMAGES[:2])
    assert norm_after(graph, "reader") is module.norm
    assert not needs_bias(graph, "reader")
    assert needs_bias(graph, "plain")
    moments = input_moments(graph, ["reader"], IMAGES, intervention="mean", chunk=7)["reader"]
    (ablation_value,) = ablation_values(moments, [[1, 4]])
    changed = copy.deepcopy(module)
    fold(graph.on(changed), "reader", ablation_value)
    assert changed.reader.bias is None
    with torch.no_grad():
        x = torch.relu(module.units(IMAGES))
        mean = x.mean((0, 2, 3))[[1, 4]]
        wanted = module.norm.running_mean - module.reader.weight[:, [1, 4], 0, 0] @ mean
        torch.testing.assert_close(changed.norm.running_mean, wanted)
        x[:, [1, 4]] = mean.view(1, 2, 1, 1)
        by_hand = module.plain(torch.relu(module.norm(module.reader(x)))).mean((2, 3))
    torch.testing.assert_close(logits(changed), by_hand, rtol=1e-4, atol=1e-5)

    offset = torch.tensor([0.5, -1.0, 0.0, 2.0])
    for _ in range(2):  # it is set, not added
        set_offset(graph.on(changed), graph, "reader", offset)
    torch.testing.assert_close(changed.norm.running_mean, module.norm.running_mean - offset)
    with torch.no_grad():
        z = changed.reader(torch.relu(changed.units(IMAGES))) + offset.view(1, 4, 1, 1)
        by_hand = module.plain(torch.relu(module.norm(z))).mean((2, 3))
    torch.testing.assert_close(logits(changed), by_hand, rtol=1e-4, atol=1e-5)
