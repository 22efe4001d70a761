"""Memory while measuring: within its budget, halved when it runs out, without changing effects."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from small_networks import lively, pictures, small_cnn, small_vit
from torch import nn

from cswap_deploy.causal import epilogue as tails
from cswap_deploy.causal import memory
from cswap_deploy.causal.bfloat16 import HalfGraph
from cswap_deploy.causal.effects import kl_divergence
from cswap_deploy.causal.fanout import masked_fanout
from cswap_deploy.causal.interventions import input_moments
from cswap_deploy.causal.memory import Budget, free_memory, keep_freed_memory, parse_size
from cswap_deploy.causal.scoring import Local, independent, measure
from cswap_deploy.errors import StageError, UsageError
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


@pytest.fixture
def network() -> tuple[Counting, dict]:
    module = small_cnn()
    groups = find_groups(module, IMAGES[:2]).groups
    return (
        Counting(trace(module, IMAGES[:2]).program, module),
        {g: list(range(g.units)) for g in groups},
    )


def _effects(graph, wanted, budget):
    found = measure(graph, wanted, images=IMAGES, labels=LABELS, moments={}, budget=budget)
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


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("512MiB", 2**29), ("2G", 2**31), ("1.5 gb", 3 * 2**29), ("7k", 7168)],
)
def test_sizes(text, size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "0", "1 EiB"])
def test_what_is_no_size(text) -> None:
    with pytest.raises(UsageError, match="no amount of memory"):
        parse_size(text)


def test_a_container_s_limit_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    free = free_memory()
    assert free > 2**26
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory() > 2**26
    (tmp_path / "memory.max").write_text("50001000\n")
    assert free_memory() == 50_000_000
    assert Budget.of().total == 50_000_000 // 3


def test_the_c_library_takes_the_setting_or_says_no() -> None:
    assert keep_freed_memory() in (True, False)


@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_bfloat16_keeps_small_effects(make) -> None:
    """The logits' own rounding would be 0.4 %; effects a thousand times smaller come out right."""
    module = make()
    graph = trace(module, IMAGES[:2])
    wanted = {g: list(range(g.units)) for g in find_groups(module, IMAGES[:2]).groups}
    layers = [c.layer for g in wanted for c in g.consumers]
    moments = input_moments(graph, layers, IMAGES, intervention="predicted", chunk=64)
    whole, rounded = (
        measure(graph, wanted, images=IMAGES, labels=LABELS, moments=moments, half=half)
        for half in (False, True)
    )
    assert any(not np.array_equal(a.kl, b.kl) for a, b in zip(whole, rounded, strict=True))
    for a, b in zip(whole, rounded, strict=True):
        assert np.corrcoef(a.kl.ravel(), b.kl.ravel())[0, 1] > 0.97, a.group
        np.testing.assert_allclose(b.true_class, a.true_class, atol=0.02)


def test_bfloat16_leaves_the_network_alone() -> None:
    module = small_cnn()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    graph = trace(module, IMAGES[:2])
    rounded = HalfGraph(graph)
    logits, _ = graph.run(IMAGES)
    close, _ = rounded.run(IMAGES)
    assert close.dtype == torch.float32, "the classifier stays whole"
    assert 0 < (close - logits).abs().max() < 0.05 * logits.abs().max()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("intervention", ["zero", "mean", "predicted"])
@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_what_a_gpu_computes_in_one_kernel_is_the_same(make, intervention, monkeypatch) -> None:
    """The kernel's place is taken by its torch reference here; what it is given is what counts."""
    calls: list[tuple] = []

    def fanout(z, r, weight, **more):
        calls.append((tuple(r.shape), more["epilogue"]))
        return masked_fanout(z, r, weight, **more)

    monkeypatch.setattr(tails, "masked_fanout", fanout)
    module = make()
    graph = trace(module, IMAGES[:2])
    wanted = {g: list(range(g.units)) for g in find_groups(module, IMAGES[:2]).groups}
    layers = [c.layer for g in wanted for c in g.consumers]
    moments = input_moments(graph, layers, IMAGES, intervention=intervention, chunk=64)
    plain = Local(graph, IMAGES, LABELS, moments, fan=False).effects(wanted)
    assert not calls
    fanned = Local(graph, IMAGES, LABELS, moments, fan=True, device=torch.device("cpu")).effects(
        wanted
    )
    assert calls
    for a, b in zip(plain, fanned, strict=True):
        np.testing.assert_allclose(b.kl, a.kl, rtol=1e-4, atol=1e-6, err_msg=a.group)
        np.testing.assert_allclose(b.true_class, a.true_class, rtol=1e-4, atol=1e-5)


def test_a_tail_reaches_to_the_activation_or_the_stream() -> None:
    """SmallCNN: squeeze is read by excite; grouped by out, its norm and a ReLU."""
    module = small_cnn()
    graph = trace(module, IMAGES[:2])
    found = {}
    for name in ("out.0", "project.0", "down.0", "grouped.0", "depthwise.0"):
        (node,) = graph.readers(name)
        inside = set(graph.suffix([node]).nodes)
        found[name] = tails.tail_of(node, module.get_submodule(name), inside=inside)
    assert found["grouped.0"] is None, "a grouped convolution"
    assert found["depthwise.0"] is None
    out = found["out.0"]
    assert out is not None
    assert out.norm is not None
    assert out.activation.kind == "relu"
    down = found["down.0"]
    assert down is not None
    assert down.window.stride == (2, 2)
    assert down.window.padding == (1, 1)
    project = found["project.0"]
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
    assert independent(trace(small_cnn(), IMAGES[:2]), IMAGES)
    groups = [g for g in find_groups(module, IMAGES[:2]).groups if g.name == "first"]
    (effects,) = Local(graph, IMAGES, LABELS, {}, together=False).effects(
        {groups[0]: list(range(8))}
    )
    (batched,) = Local(graph, IMAGES, LABELS, {}).effects({groups[0]: list(range(8))})
    with torch.no_grad():
        base = module(IMAGES).double()
        for unit in range(8):
            masked = copy.deepcopy(module)
            masked.second.weight[:, unit] = 0.0
            slow = kl_divergence(masked(IMAGES).double()[None], base)[0].numpy()
            np.testing.assert_allclose(effects.kl[unit], slow, rtol=1e-3, atol=1e-7)
    assert not np.allclose(batched.kl, effects.kl, rtol=1e-2), "the comparison is not empty"
