"""A unit's effect, from a cached prefix and batched variants, is that of a whole forward."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_networks import (
    measure_group,
    pictures,
    slow_effect,
    slow_means,
    small_cnn,
    small_vit,
    traced,
)
from torch import nn

from cswap_deploy.causal.effects import kl_divergence, likely_harm, relative_effect
from cswap_deploy.causal.interventions import Intervention, input_moments
from cswap_deploy.errors import StageError
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.units import Group

IMAGES, LABELS = pictures(10)
KINDS = {
    small_cnn: {
        "stem.0": ("channels", 8),  # the residual stream: three consumers
        "expand.0": ("channels", 12),  # through a depthwise convolution, gated by excite
        "squeeze": ("channels", 4),
        "down.0": ("channels", 4),  # slots of a grouped convolution: three channels each
        "grouped.0": ("channels", 4),
        "out.0": ("channels", 10),
    },
    small_vit: {
        "blocks.0.attn.qkv": ("heads", 3),
        "blocks.0.mlp.fc1": ("neurons", 24),
        "blocks.1.attn.qkv": ("heads", 3),
        "blocks.1.mlp.fc1": ("neurons", 24),
    },
}
EVERY_GROUP = [
    (make, name) for make, groups in KINDS.items() for name in groups if "blocks.1" not in name
]


@pytest.fixture(scope="module")
def networks() -> dict[Callable[[], nn.Module], tuple[nn.Module, Graph, dict[str, Group]]]:
    return {make: (traced(make)[0].module, *traced(make)) for make in KINDS}


def test_small_networks_hold_every_kind_of_unit(networks) -> None:
    for make, expected in KINDS.items():
        groups = networks[make][2]
        assert {n: (g.kind, g.units) for n, g in groups.items()} == expected
    cnn = networks[small_cnn][2]
    consumers = {n: {c.layer for c in g.consumers} for n, g in cnn.items()}
    assert consumers["stem.0"] == {"expand.0", "down.0", "shortcut.0"}
    assert consumers["expand.0"] == {"squeeze", "project.0"}
    assert [len(i) for i in cnn["down.0"].consumers[0].indices] == [3, 3, 3, 3]


@pytest.mark.parametrize("intervention", ["zero", "mean"])
@pytest.mark.parametrize(("make", "name"), EVERY_GROUP, ids=lambda v: getattr(v, "__name__", v))
def test_effect_of_every_unit_equals_a_whole_masked_forward(
    networks, make, name: str, intervention: Intervention
) -> None:
    module, graph, groups = networks[make]
    group = groups[name]
    layers = sorted({c.layer for c in group.consumers})
    moments = input_moments(graph, layers, IMAGES, intervention=intervention, chunk=4)
    slow = None
    if intervention == "mean":
        slow = slow_means(module, set(layers), IMAGES)
        for layer in layers:
            torch.testing.assert_close(moments[layer].mean, slow[layer], rtol=1e-5, atol=1e-6)
    found = measure_group(
        graph, group, range(group.units), images=IMAGES, labels=LABELS, moments=moments
    )
    expected = [slow_effect(module, group, u, IMAGES, LABELS, slow) for u in range(group.units)]
    true_class = torch.stack([e[0] for e in expected]).numpy()
    kl = torch.stack([e[1] for e in expected]).numpy()
    largest = np.abs(true_class).max(1)
    assert largest.min() > 1e-4, "a unit does nothing: the comparison is empty"
    assert np.median(largest) > 1e-2
    np.testing.assert_allclose(found.true_class, true_class, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "name"), EVERY_GROUP, ids=lambda v: getattr(v, "__name__", v))
def test_chunks_of_images_and_variants_change_nothing(networks, make, name: str) -> None:
    _, graph, groups = networks[make]
    group = groups[name]
    layers = [c.layer for c in group.consumers]
    moments = input_moments(graph, layers, IMAGES, intervention="predicted", chunk=64)
    ticks: dict[int, list[int]] = {1: [], 40_000: [], 1 << 30: []}
    found = {
        size: measure_group(
            graph, group, range(group.units), images=IMAGES, labels=LABELS, moments=moments,
            variant_bytes=size, tick=ticks[size].append,
        )
        for size in ticks
    }  # fmt: skip
    assert len(ticks[1]) == group.units * len(IMAGES), "one variant of one image at a time"
    assert len(ticks[1 << 30]) == 1, "all at once"
    assert {sum(t) for t in ticks.values()} == {group.units * len(IMAGES)}
    for size in (1, 40_000):
        np.testing.assert_allclose(
            found[size].true_class, found[1 << 30].true_class, rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(found[size].kl, found[1 << 30].kl, rtol=1e-5, atol=1e-5)


def test_effects_follow_the_order_of_the_units_asked_for(networks) -> None:
    _, graph, groups = networks[small_cnn]
    group = groups["stem.0"]

    def effects(units: list[int]) -> np.ndarray:
        return measure_group(
            graph, group, units, images=IMAGES, labels=LABELS, moments={}
        ).true_class

    np.testing.assert_allclose(effects([5, 0]), effects(list(range(8)))[[5, 0]], atol=1e-6)


def test_effects_are_measured_on_the_weights_as_they_are_now(networks) -> None:
    """The graph is not a snapshot: after a unit is masked its effect is nothing."""
    module = small_cnn()
    graph = networks[small_cnn][1].on(module)
    group = networks[small_cnn][2]["squeeze"]
    module.get_submodule("excite").weight.data[:, 2] = 0.0
    found = measure_group(
        graph, group, range(4), images=IMAGES, labels=LABELS, moments={}
    ).true_class
    assert np.abs(found[2]).max() < 1e-6
    assert np.abs(found[[0, 1, 3]]).max(1).min() > 1e-4


def test_measuring_leaves_the_network_alone(networks) -> None:
    module, graph, groups = networks[small_cnn]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    for group in groups.values():
        measure_group(graph, group, [0, 1], images=IMAGES, labels=LABELS, moments={})
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.is_grad_enabled()


def test_relative_effect_by_hand() -> None:
    p = torch.tensor([0.5, 0.8], dtype=torch.float64)
    masked = torch.tensor([[0.25, 1.0]], dtype=torch.float64)
    assert relative_effect(masked, p).flatten().tolist() == pytest.approx([-0.5, 0.25])


def test_kl_divergence_by_hand() -> None:
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[[0.9, 0.1]]], dtype=torch.float64)
    assert kl_divergence(q.log(), p.log()).item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize(("layer", "what"), [("expand.1", "NaN"), ("classifier", "infinity")])
def test_prediction_that_is_not_finite_names_the_first_layer(networks, layer, what) -> None:
    module = small_cnn()
    graph = networks[small_cnn][1].on(module)
    module.get_submodule(layer).bias.data[0] = float(what)
    with pytest.raises(StageError, match=rf"first to go wrong is {layer} \({what}\)"):
        measure_group(
            graph, networks[small_cnn][2]["squeeze"], [0], images=IMAGES, labels=LABELS, moments={}
        )


def test_only_masked_prediction_that_is_not_finite_names_the_group(networks) -> None:
    graph, group = networks[small_cnn][1], networks[small_cnn][2]["squeeze"]
    layers = [c.layer for c in group.consumers]
    moments = input_moments(graph, layers, IMAGES, intervention="mean", chunk=4)
    moments[layers[0]].mean[:] = float("nan")
    with pytest.raises(StageError, match=r"not finite while the units of squeeze are measured"):
        measure_group(graph, group, [0], images=IMAGES, labels=LABELS, moments=moments)


def test_likely_harm_by_hand() -> None:
    """Half of the spread counts beside the mean of log(1 + xi)."""
    xi = np.array([[1.0, -0.5], [-0.5, -0.5], [0.0, 0.0], [-1.0, 0.0]])
    harm = likely_harm(xi)
    log2 = np.log(2.0)
    assert harm[0] == pytest.approx(log2 / 2), "means cancel, the spread stays"
    assert harm[1] == pytest.approx(log2), "always half of it: no spread"
    assert harm[2] == 0.0
    assert harm[3] == pytest.approx(12 * np.log(10) * (0.5 + 0.25)), "bounded where p vanishes"
    order = np.argsort(likely_harm(np.array([[0.1, 0.1], [-0.1, -0.1], [0.6, -0.3]])))
    assert order.tolist() == [0, 1, 2], "steady help goes before steady harm, erratic ones last"
