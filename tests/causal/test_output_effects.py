"""Effects on outputs other than class scores."""

from __future__ import annotations

import copy
import math

import pytest
import small_tasks
import torch
from small_networks import pictures
from torch import Tensor, nn

from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.fisher import estimate_effects
from cswap_deploy.causal.measurement import LocalMeasurement
from cswap_deploy.causal.tasks import OutputEffect, binary_divergence, relative_squared_change
from cswap_deploy.config import Task
from cswap_deploy.models.outputs import named_outputs
from cswap_deploy.network.graph import trace
from cswap_deploy.network.units import Group, Reader

IMAGES, LABELS = pictures(12)
NETWORKS = {
    "features": small_tasks.headless,
    "binary": small_tasks.one_logit,
    "dense": small_tasks.maps,
    "detect": small_tasks.detector,
    "any": small_tasks.fields,
}
CONV1 = Group(
    "conv1", "channels", tuple((u,) for u in range(32)),
    (Reader("conv2", tuple((u,) for u in range(32))),), (),
)  # fmt: skip
"""Written down here, so that nothing but masked forwards is tested."""


def test_relative_squared_change_by_hand() -> None:
    base = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    masked = torch.tensor([[3.0, 3.0], [2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert relative_squared_change(masked, base).tolist() == [1 / 25, 1.0, 0.0]


def test_binary_divergence_by_hand() -> None:
    p, q = 0.8, 0.5
    base = torch.tensor([[math.log(p / (1 - p)), 2.0]], dtype=torch.float64)
    masked = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    by_hand = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert binary_divergence(masked, base).item() == pytest.approx(by_hand, abs=1e-12)
    large = torch.tensor([[800.0]], dtype=torch.float64)
    assert binary_divergence(-large, large).item() == pytest.approx(800.0)


def _outputs(task: Task, module: nn.Module, images: Tensor) -> OutputEffect:
    return OutputEffect(task, trace(module, images[:2]).measured)


def test_each_output_counts_by_its_own_size() -> None:
    effect = _outputs("any", small_tasks.detector(), IMAGES)
    boxes, scores = (o.elements for o in effect.outputs)
    base = torch.cat([torch.full((1, boxes), 1000.0), torch.full((1, scores), 0.01)], 1).double()
    for part in (slice(0, boxes), slice(boxes, None)):
        masked = base.clone()
        masked[:, part] *= 1.1
        assert effect.divergence(masked[None], base).item() == pytest.approx(0.01)


def test_dense_is_the_mean_over_pixels() -> None:
    effect = _outputs("dense", small_tasks.maps(), IMAGES)
    sizes = [o.elements for o in effect.outputs]
    assert [o.name for o in effect.outputs] == ["out", "aux"]
    base = torch.randn(2, sum(sizes), dtype=torch.float64)
    masked = base + torch.randn_like(base)
    expected = torch.zeros(2, dtype=torch.float64)
    for before, after in zip(base.split(sizes, 1), masked.split(sizes, 1), strict=True):
        p, q = (x.view(2, 4, 16, 16).log_softmax(1) for x in (before, after))
        expected += (p.exp() * (p - q)).sum(1).mean((1, 2))
    torch.testing.assert_close(effect.divergence(masked[None], base)[0], expected)


@pytest.mark.parametrize("task", NETWORKS)
def test_directions_give_the_second_order_of_the_effect(task: Task) -> None:
    module = NETWORKS[task]()
    effect = _outputs(task, module, IMAGES)
    base, _ = trace(module, IMAGES[:2]).run(IMAGES)
    base = base.detach().double()
    step = 1e-3 * torch.randn(base.shape, dtype=torch.float64)
    few = effect.directions(base, probes=4000 if base.shape[1] > 1 else 4)
    estimate = sum((v * step).sum(1).square() for v in few) / 2
    exact = effect.divergence((base + step)[None], base)[0]
    # 4000 random signs: a relative error of sqrt(2 / 4000), 2 %
    torch.testing.assert_close(estimate, exact, rtol=0.12, atol=0)


def slow_effect(task: Task, module: nn.Module, unit: int) -> Tensor:
    """(N,) by whole forwards of a masked copy, in the task's own words."""
    masked = copy.deepcopy(module)
    with torch.no_grad():
        masked.conv2.weight[:, unit] = 0.0
        before, after = named_outputs(module(IMAGES)), named_outputs(masked(IMAGES))
    total = torch.zeros(len(IMAGES), dtype=torch.float64)
    for name, value in before.items():
        if name in ("best", "anchors"):
            continue
        a, b = value.double(), after[name].double()
        if task == "dense":
            p, q = a.log_softmax(1), b.log_softmax(1)
            total += (p.exp() * (p - q)).sum(1).mean((1, 2))
        elif task == "binary":
            p, q = a.sigmoid(), b.sigmoid()
            total += (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
        else:
            total += (a - b).flatten(1).square().sum(1) / a.flatten(1).square().sum(1)
    return total


@pytest.mark.parametrize("task", NETWORKS)
def test_effects_are_those_of_whole_masked_forwards(task: Task) -> None:
    module = NETWORKS[task]()
    experiment = Experiment(trace(module, IMAGES[:2]), IMAGES, LABELS, task=task)
    (found,) = LocalMeasurement(experiment).effects({CONV1: [0, 3, 17]})
    for row, unit in enumerate((0, 3, 17)):
        expected = slow_effect(task, module, unit)
        torch.testing.assert_close(torch.from_numpy(found.kl[row]), expected, rtol=1e-3, atol=1e-9)
    assert found.kl.max() > 0
    assert not found.true_class.any()


@pytest.mark.parametrize("task", NETWORKS)
def test_the_estimate_orders_units_as_measured(task: Task) -> None:
    from scipy.stats import spearmanr

    module = NETWORKS[task]()
    experiment = Experiment(trace(module, IMAGES[:2]), IMAGES, LABELS, task=task)
    units = {CONV1: range(32)}
    (estimate,) = estimate_effects(experiment, units)
    (measured,) = LocalMeasurement(experiment).effects(units)
    agreement = spearmanr(estimate.kl.mean(1), measured.kl.mean(1)).statistic
    assert agreement > 0.8
    assert not estimate.log_true.any()


def test_what_has_no_size_is_not_measured() -> None:
    graph = trace(small_tasks.fields(), IMAGES[:2])
    assert [(o.name, o.shape) for o in graph.measured] == [("embedding", (32,)), ("logits", (5,))]
    rows, _ = graph.run(IMAGES)
    returned = small_tasks.fields()(IMAGES)
    torch.testing.assert_close(rows, torch.cat([returned.embedding, returned.logits], 1))


def test_probabilities_are_not_squashed_again() -> None:
    """A network that ends in a sigmoid has the effects of its logits."""
    found = []
    for module in (small_tasks.one_logit(), small_tasks.probabilities()):
        experiment = Experiment(trace(module, IMAGES[:2]), IMAGES, LABELS, task="binary")
        (exact,) = LocalMeasurement(experiment).effects({CONV1: range(8)})
        (estimate,) = estimate_effects(experiment, {CONV1: range(8)})
        found.append((torch.from_numpy(exact.kl), torch.from_numpy(estimate.kl)))
    for logits, squashed in zip(*found, strict=True):
        torch.testing.assert_close(squashed, logits, rtol=1e-2, atol=1e-9)
