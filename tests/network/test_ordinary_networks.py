"""What people's own networks bring: each is built and right, or refused by name; nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from apart import apart, limited
from built_right import Built, build, follow_the_fix, pictures
from ordinary_networks import NETWORKS
from small_networks import measure_group, slow_effect

from cswap_deploy.causal.interventions import input_moments
from cswap_deploy.config import PruneConfig
from cswap_deploy.pruning.prepare import prepare

LIMIT_S = 60.0
PRUNED = [name for name, case in NETWORKS.items() if case.expected == "pruned"]


def every(step: int) -> frozenset[str]:
    """One network of so many, or all of them in the nightly profile."""
    return frozenset(
        list(NETWORKS)[:: 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else step]
    )


EXPORTED, REPLAYED = every(12), every(4)
"""Exporting, and tracing a module once more for its plan, take most of the time."""


def attempt(name: str, folder: Path, *, ratio: float) -> Built:
    case = NETWORKS[name]
    export = ratio > 0 and name in EXPORTED
    how = {
        "size": case.size, "images": case.images, "export": export, "replay": name in REPLAYED,
    }  # fmt: skip
    with limited(LIMIT_S):
        built = build(case.make, folder, ratio=ratio, **how)
        if built.refused and ratio > 0:
            follow_the_fix(built, case.make, folder, **how)
    return built


def pruned(name: str, folder: Path) -> Built:
    return attempt(name, folder, ratio=0.2)


def dense(name: str, folder: Path) -> Built:
    return attempt(name, folder, ratio=0.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_is_pruned_right_or_refused_by_name(name: str, tmp_path: Path) -> None:
    case = NETWORKS[name]
    if case.apart:
        built = apart(pruned, name, tmp_path, limit_s=2 * LIMIT_S)
    else:
        built = pruned(name, tmp_path)
    if built.refused:
        assert case.expected != "pruned", built.reason
        assert re.search(case.words, built.reason)
    else:
        assert case.expected != "refused"
        assert built.units[1] < built.units[0]
        assert built.params[1] < built.params[0]


# What is pruned right has passed through all that a ratio of zero does.
@pytest.mark.parametrize("name", sorted(every(4) | (NETWORKS.keys() - PRUNED)))
def test_ratio_zero_leaves_it_as_it_is(name: str, tmp_path: Path) -> None:
    case = NETWORKS[name]
    built = dense(name, tmp_path)
    if built.refused:
        assert case.expected in ("refused", "any"), built.reason
        assert re.search(case.words, built.reason)
    else:
        assert case.expected != "refused"
        assert built.params[0] == built.params[1] > 0


EXACT = (
    "view_by_batch", "sliced_gate", "shuffle_net", "dense_block", "squeeze_by_linear", "transposed",
    "multihead_attention", "grouped_queries", "siamese", "used_twice", "instance_norm", "upshuffle",
)  # fmt: skip
"""One or two of each kind."""


@pytest.mark.parametrize("name", EXACT)
def test_effects_are_those_of_masked_forwards(name: str) -> None:
    """The first and the last unit of three groups: the whole network again, inputs zeroed."""
    case = NETWORKS[name]
    images, labels = pictures(6, case.size)
    network = prepare(case.make(), images, PruneConfig(ratio=0.2, round_to=1))
    for group in network.groups[:: max(1, len(network.groups) // 3)]:
        units = [0, group.units - 1]
        layers = sorted({c.layer for c in group.consumers})
        zero = input_moments(network.graph, layers, images, intervention="zero", chunk=6)
        found = measure_group(
            network.graph, group, units, images=images, labels=labels, moments=zero
        )
        for at, unit in enumerate(units):
            slow = slow_effect(network.dense.module, group, unit, images, labels, None)
            for fast, right in zip((found.true_class[at], found.kl[at]), slow, strict=True):
                np.testing.assert_allclose(fast, right.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", PRUNED)
def test_the_case_itself_is_sound(name: str) -> None:
    """The same weights each time, answers that do not change, every image with its own."""
    case = NETWORKS[name]
    images, _ = pictures(4, case.size)
    one, other = case.make().float(), case.make().float()
    with torch.no_grad():
        first, again = one(images), one(images)
        assert torch.equal(first, again)
        assert torch.equal(first, other(images))
        torch.testing.assert_close(
            torch.cat([one(i[None]) for i in images]), first, rtol=1e-4, atol=1e-4
        )
    assert first.shape == (4, 10)
    assert torch.isfinite(first).all()
    assert first.std(0).max() > 0.01
    assert case.brings.endswith(".")
