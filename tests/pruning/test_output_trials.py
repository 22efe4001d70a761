"""Trials of candidates on networks that do not classify."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import small_tasks
import torch
from small_networks import ground_of, pictures

from cswap_deploy.causal.mixtures import lightly_mixed
from cswap_deploy.config import PruneConfig, Task
from cswap_deploy.pruning.prepare import prepare
from cswap_deploy.pruning.trials import Trials

IMAGES, _ = pictures(24)


@pytest.mark.parametrize("task", ["dense", "any"])
def test_a_trial_has_the_task_s_effect(task: Task) -> None:
    """Zero intervention, no refit: the same as zeroing weights and running both networks."""
    module = small_tasks.maps()
    network = prepare(module, IMAGES, PruneConfig(ratio=0.3))
    effect = (
        Trials(network, {}, ground_of(network.dense, IMAGES, task), refits=False)
        .trial({"conv1": [3, 5]}, {})
        .effect
    )
    masked = copy.deepcopy(module)
    with torch.no_grad():
        masked.conv2.weight[:, [3, 5]] = 0.0
    unseen = IMAGES[12:]
    found = []
    for images in (unseen, *(lightly_mixed(unseen, seed=seed) for seed in range(2))):
        with torch.no_grad():
            before, after = module(images), masked(images)
        one = torch.zeros(len(images), dtype=torch.float64)
        for name, value in before.items():
            a, b = value.double(), after[name].double()
            if task == "dense":
                p, q = a.log_softmax(1), b.log_softmax(1)
                one += (p.exp() * (p - q)).sum(1).mean((1, 2))
            else:
                one += (a - b).flatten(1).square().sum(1) / a.flatten(1).square().sum(1)
        found.append(one)
    torch.testing.assert_close(effect, torch.stack(found).mean(0), rtol=1e-3, atol=1e-9)


def test_large_outputs_are_tried_on_fewer_images() -> None:
    network = prepare(small_tasks.maps(), IMAGES, PruneConfig(ratio=0.3))
    ground = replace(ground_of(network.dense, IMAGES, "dense"), memory=1)
    effect = Trials(network, {}, ground, refits=False).trial({"conv1": [3]}, {}).effect
    assert len(effect) == 8
