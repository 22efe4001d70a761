"""Memory while measuring: within its budget, halved when it runs out, without changing effects."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from small_networks import lively, pictures, small_cnn, small_vit, traced
from torch import nn

from cswap_deploy.causal.bfloat16 import Bfloat16Graph
from cswap_deploy.causal.effects import kl_divergence
from cswap_deploy.causal.epilogue import find_fused_epilogue
from cswap_deploy.causal.experiment import Experiment, independent
from cswap_deploy.causal.interventions import input_moments
from cswap_deploy.causal.masked_forward import MaskedForward
from cswap_deploy.causal.measurement import LocalMeasurement
from cswap_deploy.causal.memory import Budget, keep_freed_memory
from cswap_deploy.data.memory import free_memory
from cswap_deploy.errors import StageError
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.groups import find_groups

IMAGES, LABELS = pictures(10)


class Counting(Graph):
    """A graph that counts forwards, and whose batches do not fit beyond some rows."""

    forwards = 0
    most_rows = 1 << 30

    def run(self, images, **kwargs):
        self.forwards += 1
        return super().run(images, **kwargs)

    def run_suffix(self, suffix, cached, *, images, variants, replace):
        if images * variants > self.most_rows:  # stands for hardware with less memory
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 107374182400 bytes. Error code 12"
            )
        return super().run_suffix(suffix, cached, images=images, variants=variants, replace=replace)


def _all(groups) -> dict:
    return {g: list(range(g.units)) for g in groups.values()}


@pytest.fixture
def network() -> tuple[Counting, dict]:
    graph, groups = traced(small_cnn)
    return Counting(graph.program, graph.module), _all(groups)


def _effects(graph, wanted, budget):
    experiment = Experiment(graph, IMAGES, LABELS, budget=budget)
    found = LocalMeasurement(experiment).effects(wanted)
    return np.concatenate([e.kl for e in found]), np.concatenate([e.true_class for e in found])


def test_one_forward_serves_all_groups_where_memory_allows(network) -> None:
    graph, wanted = network
    plenty = _effects(graph, wanted, Budget(1 << 30, 1 << 25))
    assert graph.forwards == 1, "ten images, six groups, one forward"
    graph.forwards = 0
    little = _effects(graph, wanted, Budget(1, 1 << 25))
    assert graph.forwards == len(wanted) * len(IMAGES), "the prefix is computed again"
    for a, b in zip(plenty, little, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_running_out_of_memory_halves_the_batch_and_goes_on(network, caplog) -> None:
    graph, wanted = network
    plenty = _effects(graph, wanted, Budget(1 << 30, 1 << 25))
    graph.most_rows = 7
    budget = Budget(1 << 30, 1 << 25)
    with caplog.at_level(logging.WARNING):
        little = _effects(graph, wanted, budget)
    assert budget.variant_bytes < 1 << 25
    assert "memory ran out; going on with batches half the size" in caplog.text
    for a, b in zip(plenty, little, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_at_all_is_said(network) -> None:
    graph, wanted = network
    graph.most_rows = 0
    with pytest.raises(StageError, match="one variant of one image") as caught:
        _effects(graph, wanted, Budget(1 << 30, 1 << 25))
    assert "smaller --input-size" in caught.value.fix


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    def work(variant_bytes: int) -> None:
        raise RuntimeError("shape '[3]' is invalid for input of size 4")

    with pytest.raises(RuntimeError, match="is invalid"):
        Budget(1 << 20, 1 << 10).retrying(work)


def test_the_gpu_s_own_error_counts() -> None:
    tried: list[int] = []

    def work(variant_bytes: int) -> str:
        tried.append(variant_bytes)
        if variant_bytes > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "done"

    assert Budget(1 << 20, 1 << 10).retrying(work) == "done"
    assert tried == [1024, 512, 256]


def test_a_container_s_limit_counts(tmp_path) -> None:
    free = free_memory(tmp_path)
    assert free > 2**26
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory(tmp_path) > 2**26
    (tmp_path / "memory.max").write_text("50001000\n")
    assert free_memory(tmp_path) == 50_000_000


def test_the_c_library_takes_the_setting_or_says_no() -> None:
    assert keep_freed_memory() in (True, False)


@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_bfloat16_keeps_small_effects(make) -> None:
    """The logits' own rounding would be 0.4 %; effects a thousand times smaller come out right."""
    graph, groups = traced(make)
    wanted = _all(groups)
    layers = [c.layer for g in wanted for c in g.consumers]
    moments = input_moments(graph, layers, IMAGES, intervention="predicted", chunk=64)
    measurement = LocalMeasurement(Experiment(graph, IMAGES, LABELS, moments))
    whole, rounded = (measurement.effects(wanted, bfloat16=b) for b in (False, True))
    assert any(not np.array_equal(a.kl, b.kl) for a, b in zip(whole, rounded, strict=True))
    for a, b in zip(whole, rounded, strict=True):
        assert np.corrcoef(a.kl.ravel(), b.kl.ravel())[0, 1] > 0.97, a.group
        np.testing.assert_allclose(b.true_class, a.true_class, atol=0.02)


def test_bfloat16_leaves_the_network_alone() -> None:
    graph, _ = traced(small_cnn)
    module = graph.module
    before = {k: v.clone() for k, v in module.state_dict().items()}
    rounded = Bfloat16Graph(graph)
    logits, _ = graph.run(IMAGES)
    close, _ = rounded.run(IMAGES)
    assert close.dtype == torch.float32, "the classifier stays whole"
    assert 0 < (close - logits).abs().max() < 0.05 * logits.abs().max()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("intervention", ["zero", "mean", "predicted"])
@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_fused_epilogues_give_the_same_effects(make, intervention) -> None:
    """What a GPU computes in one kernel, here by the kernel's torch reference."""
    graph, groups = traced(make)
    wanted = _all(groups)
    layers = [c.layer for g in wanted for c in g.consumers]
    moments = input_moments(graph, layers, IMAGES, intervention=intervention, chunk=64)
    assert any(MaskedForward(graph, g, [0], moments, fused=True).epilogue for g in wanted)
    experiment = Experiment(graph, IMAGES, LABELS, moments)
    plain = LocalMeasurement(experiment, fused=False).effects(wanted)
    fused = LocalMeasurement(experiment, fused=True).effects(wanted)
    for a, b in zip(plain, fused, strict=True):
        np.testing.assert_allclose(b.kl, a.kl, rtol=1e-4, atol=1e-6, err_msg=a.group)
        np.testing.assert_allclose(b.true_class, a.true_class, rtol=1e-4, atol=1e-5)


def test_a_fused_epilogue_reaches_to_the_activation_or_the_stream() -> None:
    """SmallCNN: squeeze is read by excite; grouped by out, its norm and a ReLU."""
    graph, _ = traced(small_cnn)
    found = {}
    for name in ("out.0", "project.0", "down.0", "grouped.0", "depthwise.0"):
        (node,) = graph.readers(name)
        inside = set(graph.suffix([node]).nodes)
        found[name] = find_fused_epilogue(node, graph.layer(name), inside=inside)
    assert found["grouped.0"] is None, "a grouped convolution"
    assert found["depthwise.0"] is None
    out, project = found["out.0"], found["project.0"]
    assert out is not None
    assert out.norm is not None
    assert out.activation.kind == "relu"
    assert project is not None
    assert project.other is not None, "the residual stream is from before the cut"


class BatchNormalised(nn.Module):
    """Centres its features over the batch, at inference too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.classifier = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = self.second(x)
        return self.classifier(torch.relu(x - x.mean(0, keepdim=True)).mean((2, 3)))


def test_images_that_see_each_other_are_measured_by_whole_forwards() -> None:
    torch.manual_seed(0)
    module = lively(BatchNormalised())
    graph = trace(module, IMAGES[:2])
    assert not independent(graph, IMAGES)
    assert independent(traced(small_cnn)[0], IMAGES)
    groups = [g for g in find_groups(trace(module, IMAGES[:2])).groups if g.name == "first"]
    experiment = Experiment(graph, IMAGES, LABELS)
    (effects,) = LocalMeasurement(experiment, together=False).effects({groups[0]: list(range(8))})
    (batched,) = LocalMeasurement(experiment).effects({groups[0]: list(range(8))})
    with torch.no_grad():
        base = module(IMAGES).double()
        for unit in range(8):
            masked = copy.deepcopy(module)
            masked.second.weight[:, unit] = 0.0
            slow = kl_divergence(masked(IMAGES).double()[None], base)[0].numpy()
            np.testing.assert_allclose(effects.kl[unit], slow, rtol=1e-3, atol=1e-7)
    assert not np.allclose(batched.kl, effects.kl, rtol=1e-2), "the comparison is not empty"
