"""The estimate of all effects from a few backward passes: right where interventions are small."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_networks import CLASSES, pictures, small_cnn, small_vit, traced
from torch import Tensor, nn

from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.fisher import DIRECTIONS, estimate_effects, fisher_directions
from cswap_deploy.causal.interventions import (
    AblationValue,
    Moments,
    ablation_values,
    input_moments,
)
from cswap_deploy.causal.measurement import LocalMeasurement
from cswap_deploy.causal.memory import Budget
from cswap_deploy.errors import StageError
from cswap_deploy.network.units import consumers

IMAGES, LABELS = pictures(10)
BUDGET = Budget(1 << 30, 1 << 25)
PADDED = {"stem.0", "down.0"}
"""Groups with a reader whose bias counts positions that lie in the padding."""


class Weaker(Moments):
    """do(a := (1 - part) a + part * what the moments say)."""

    def __init__(self, whole: Moments | None, inputs: int, part: float) -> None:
        self.whole, self.inputs, self.part = whole, inputs, part

    def ablation_values(self, index: Tensor) -> list[AblationValue]:
        return [self._weaker(own) for own in index]

    def _weaker(self, index: Tensor) -> AblationValue:
        (value,) = ablation_values(self.whole, [index.tolist()])
        weights = torch.zeros(len(index), self.inputs)
        if value.weights is not None:
            weights += self.part * value.weights
        weights[torch.arange(len(index)), index] += 1 - self.part
        constant = None if value.constant is None else self.part * value.constant
        return AblationValue(index, weights, constant)


def _experiment(make, *, budget=BUDGET, moments=None):
    graph, groups = traced(make)
    return Experiment(graph, IMAGES, LABELS, moments or {}, budget), list(groups.values())


def _estimates(make, intervention, *, part=1.0, directions=DIRECTIONS):
    """Group -> (estimate, exact KL divergences, exact changes of log-probability)."""
    experiment, groups = _experiment(make)
    graph, names = experiment.graph, consumers(tuple(groups))
    moments = input_moments(graph, names, IMAGES, intervention=intervention, chunk=64)
    if part < 1:
        for name in names:
            layer = graph.module.get_submodule(name)
            inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
            moments[name] = Weaker(moments.get(name), inputs, part)
    experiment = replace(experiment, moments=moments)
    wanted = {g: range(g.units) for g in groups}
    exact = LocalMeasurement(experiment).effects(wanted)
    estimates = estimate_effects(experiment, wanted, directions=directions)
    return {
        e.group: (estimate, e.kl, np.log1p(e.true_class))
        for e, estimate in zip(exact, estimates, strict=True)
    }


@pytest.mark.parametrize("intervention", ["zero", "mean", "predicted"])
@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_weak_interventions_are_estimated_right(make, intervention) -> None:
    """Every kind of unit and reader, with all of the Fisher information."""
    found = _estimates(make, intervention, part=0.03, directions=CLASSES - 1)
    for name, (estimate, kl, log) in found.items():
        if intervention != "zero" and name in PADDED:
            continue
        for one, other in ((estimate.log_true, log), (estimate.kl, kl)):
            large = np.abs(other) > np.abs(other).max() / 4
            np.testing.assert_allclose(one[large], other[large], rtol=0.12, err_msg=name)


@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_whole_interventions_are_ordered_about_right(make) -> None:
    """Two directions of four, and interventions that are not small at all."""
    agree = [
        np.corrcoef(estimate.kl.ravel(), kl.ravel())[0, 1]
        for estimate, kl, _ in _estimates(make, "predicted").values()
    ]
    assert np.median(agree) > 0.7


def test_directions_of_many_classes_are_the_largest_eigenvectors() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 300)
    _, first, second = fisher_directions(logits, torch.arange(4), 2)
    p = logits.double().softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values = torch.stack([first, second]).square().sum(-1)
    expected = torch.linalg.eigvalsh(fisher)[:, -2:].flip(1).T
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=0)
    turned = (fisher @ first[:, :, None])[..., 0]
    torch.testing.assert_close(turned, first * values[0, :, None], rtol=0, atol=1e-3)


def test_first_direction_is_that_of_the_true_class() -> None:
    logits, labels = torch.randn(6, CLASSES, requires_grad=True), torch.arange(6) % CLASSES
    logits.log_softmax(-1)[torch.arange(6), labels].sum().backward()
    true, *_ = fisher_directions(logits.detach(), labels, 2)
    torch.testing.assert_close(true, logits.grad.double(), atol=1e-6, rtol=0)


def test_estimating_leaves_weights_and_gradients_alone() -> None:
    experiment, groups = _experiment(small_cnn)
    module = experiment.graph.module
    before = {k: v.clone() for k, v in module.state_dict().items()}
    estimate_effects(experiment, {g: range(g.units) for g in groups})
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_less_memory_changes_nothing() -> None:
    parts: list[list[int]] = [[], []]
    found = []
    for budget, part in zip((BUDGET, Budget(1, 1)), parts, strict=True):
        experiment, groups = _experiment(small_cnn, budget=budget)
        wanted = {g: range(g.units) for g in groups}
        found.append(estimate_effects(experiment, wanted, tick=part.append))
    assert parts == [[10], [1] * 10]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a.kl, b.kl, rtol=1e-4, atol=1e-9)


def test_a_network_that_is_not_finite_names_the_layer() -> None:
    experiment, groups = _experiment(small_cnn)
    graph = experiment.graph.on(copy.deepcopy(experiment.graph.module))
    graph.module.get_submodule("expand.1").bias.data[0] = float("nan")
    experiment = replace(experiment, graph=graph)
    with pytest.raises(StageError, match=r"first to go wrong is expand\.1 \(NaN\)"):
        estimate_effects(experiment, {g: [0] for g in groups if g.name == "out.0"})
