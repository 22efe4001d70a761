"""The estimate of all effects from a few backward passes: right where interventions are small."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_networks import CLASSES, pictures, small_cnn, small_vit
from torch import nn

from cswap_deploy.causal import fisher as quadratic
from cswap_deploy.causal.fisher import estimate
from cswap_deploy.causal.interventions import StandIn, input_moments
from cswap_deploy.causal.masked_forward import Cut
from cswap_deploy.causal.memory import Budget
from cswap_deploy.causal.scoring import _measure_part
from cswap_deploy.errors import StageError
from cswap_deploy.network.graph import trace
from cswap_deploy.network.groups import find_groups
from cswap_deploy.pruning.candidates import consumers

IMAGES, LABELS = pictures(10)
BUDGET = Budget(1 << 30, 1 << 25)
PADDED = {"stem.0", "down.0"}
"""Groups with a reader whose bias counts positions that lie in the padding."""


def _weaker(stand_in: StandIn, inputs: int, part: float) -> StandIn:
    """do(a := (1 - part) a + part * stand-in)."""
    weights = torch.zeros(len(stand_in.index), inputs)
    if stand_in.weights is not None:
        weights += part * stand_in.weights
    weights[torch.arange(len(stand_in.index)), stand_in.index] += 1 - part
    constant = None if stand_in.constant is None else part * stand_in.constant
    return StandIn(stand_in.index, weights, constant)


def _estimates(make, intervention, *, part=1.0):
    """Group -> (estimate, exact effects)."""
    module = make()
    groups = find_groups(module, IMAGES[:2]).groups
    graph = trace(module, IMAGES[:2])
    moments = input_moments(
        graph, consumers(tuple(groups)), IMAGES, intervention=intervention, chunk=64
    )
    cuts = [Cut(graph, g, range(g.units), moments) for g in groups]
    for cut in cuts:
        for _, name, units in cut.consumers:
            layer = module.get_submodule(name)
            inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
            if part < 1:
                units[:] = [_weaker(unit, inputs, part) for unit in units]
    guesses = estimate(graph, cuts, images=IMAGES, labels=LABELS, budget=BUDGET)
    exact = dict(_measure_part(graph, cuts, IMAGES, LABELS, BUDGET, None, None))
    return {
        cut.group.name: (guess, exact[i][1].numpy(), exact[i][0].log1p().numpy())
        for i, (cut, guess) in enumerate(zip(cuts, guesses, strict=True))
    }


@pytest.mark.parametrize("intervention", ["zero", "mean", "predicted"])
@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_weak_interventions_are_estimated_right(make, intervention, monkeypatch) -> None:
    """Every kind of unit and reader, with all of the Fisher information."""
    monkeypatch.setattr(quadratic, "DIRECTIONS", CLASSES - 1)
    for name, (guess, kl, log) in _estimates(make, intervention, part=0.03).items():
        if intervention != "zero" and name in PADDED:
            continue
        for one, other in ((guess.log_true, log), (guess.kl, kl)):
            large = np.abs(other) > np.abs(other).max() / 4
            np.testing.assert_allclose(one[large], other[large], rtol=0.12, err_msg=name)


@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_whole_interventions_are_ordered_about_right(make) -> None:
    """Two directions of four, and interventions that are not small at all."""
    agree = [
        np.corrcoef(guess.kl.ravel(), kl.ravel())[0, 1]
        for guess, kl, _ in _estimates(make, "predicted").values()
    ]
    assert np.median(agree) > 0.7


def test_few_directions_are_the_largest_eigenvectors() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 300)
    p = logits.double().softmax(-1)
    values, vectors = quadratic._largest(p, 2)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.linalg.eigvalsh(fisher)[:, -2:]
    torch.testing.assert_close(values[:, -2:], expected, rtol=1e-3, atol=0)
    top = vectors[:, :, -1:]
    torch.testing.assert_close(fisher @ top, top * values[:, -1:, None], rtol=0, atol=1e-3)


def test_first_direction_is_that_of_the_true_class() -> None:
    logits, labels = torch.randn(6, CLASSES, requires_grad=True), torch.arange(6) % CLASSES
    logits.log_softmax(-1)[torch.arange(6), labels].sum().backward()
    first = quadratic._directions(logits.detach(), labels)[0]
    torch.testing.assert_close(first, logits.grad.double(), atol=1e-6, rtol=0)


def test_estimating_leaves_weights_and_gradients_alone() -> None:
    module = small_cnn()
    graph = trace(module, IMAGES[:2])
    groups = find_groups(module, IMAGES[:2]).groups
    before = {k: v.clone() for k, v in module.state_dict().items()}
    cuts = [Cut(graph, g, range(g.units), {}) for g in groups]
    estimate(graph, cuts, images=IMAGES, labels=LABELS, budget=BUDGET)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_less_memory_changes_nothing() -> None:
    module = small_cnn()
    graph = trace(module, IMAGES[:2])
    groups = find_groups(module, IMAGES[:2]).groups
    cuts = [Cut(graph, g, range(g.units), {}) for g in groups]
    parts: list[list[int]] = [[], []]
    one, other = (
        estimate(graph, cuts, images=IMAGES, labels=LABELS, budget=b, tick=part.append)
        for b, part in zip((BUDGET, Budget(1, 1)), parts, strict=True)
    )
    assert parts == [[10], [1] * 10]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.kl, b.kl, rtol=1e-4, atol=1e-9)


def test_a_network_that_is_not_finite_names_the_layer() -> None:
    module = small_cnn()
    module.get_submodule("expand.1").bias.data[0] = float("nan")
    graph = trace(module, IMAGES[:2])
    (cut,) = [
        Cut(graph, g, [0], {}) for g in find_groups(module, IMAGES[:2]).groups if g.name == "out.0"
    ]
    with pytest.raises(StageError, match=r"first to go wrong is expand\.1 \(NaN\)"):
        estimate(graph, [cut], images=IMAGES, labels=LABELS, budget=BUDGET)
