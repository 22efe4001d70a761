"""Constants fold into biases exactly; the ridge is what the normal equations give by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import lively, pictures, small_cnn, small_vit, traced
from small_networks import refitted as fit
from torch import Tensor, nn

from cswap_deploy.causal.interventions import Moments, ablation_values, fold, input_moments
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.units import Group, Reader, give_bias, input_sum, mask_weight
from cswap_deploy.pruning.refit import MAX_FEATURES
from cswap_deploy.pruning.trials import MAX_ROWS

CONSUMERS = {
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    "1x1": lambda: nn.Conv2d(6, 4, 1),
    "3x3 strided": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "3x3 dilated": lambda: nn.Conv2d(6, 4, 3, dilation=2, padding=(2, 1), bias=False),
    "1x1 strided": lambda: nn.Conv2d(6, 4, 1, stride=(2, 1)),
    "grouped": lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2),
}
VALID = {
    "linear": CONSUMERS["linear"],
    "1x1": CONSUMERS["1x1"],
    "3x3 without padding": lambda: nn.Conv2d(6, 4, 3, stride=2),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
}
IMAGES = pictures(12, 9)[0]


class Pair(nn.Module):
    """Six units, and what reads them."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.units = nn.Conv2d(3, 6, 3, padding=1)
        self.reader = reader

    def forward(self, x: Tensor) -> Tensor:
        y = self.reader(torch.relu(self.units(x)))
        return y.flatten(1)

    @property
    def consumer(self) -> Any:
        return self.reader[2] if isinstance(self.reader, nn.Sequential) else self.reader

    @property
    def consumer_name(self) -> str:
        return "reader.2" if isinstance(self.reader, nn.Sequential) else "reader"


def pair(reader: nn.Module) -> Pair:
    torch.manual_seed(3)
    found = lively(Pair(reader))
    assert isinstance(found, Pair)
    return found


@cache
def _traced(reader: Callable[[], nn.Module], biased: bool) -> tuple[Pair, Graph]:
    module = pair(reader())
    if biased:
        give_bias(module.consumer)
    return module, trace(module, IMAGES[:2])


def fresh(reader: Callable[[], nn.Module], *, biased: bool = False) -> tuple[Pair, Graph]:
    """A pair to change, and its graph."""
    shared, graph = _traced(reader, biased)
    module = copy.deepcopy(shared)
    return module, graph.on(module)


def grouping(module: Pair) -> Group:
    """Units as the consumer reads them: single inputs, or a slot of each convolution group."""
    groups = getattr(module.consumer, "groups", 1)
    indices = tuple(tuple(range(u, 6, 6 // groups)) for u in range(6 // groups))
    reads = Reader(module.consumer_name, indices)
    return Group("units", "channels", indices, (reads,), ())


def logits(module: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return module(images)


def means(graph: Graph, layers: list[str]) -> dict[str, Moments]:
    return input_moments(graph, layers, IMAGES, intervention="mean", chunk=5)


def remove(
    graph: Graph, group: Group, unit: int, moments: Mapping[str, Moments] | None = None
) -> None:
    """One unit; nothing takes its place where there are no moments."""
    for entry in group.consumers:
        found = moments[entry.layer] if moments is not None else None
        (ablation_value,) = ablation_values(found, [entry.indices[unit]])
        fold(graph, entry.layer, ablation_value)


# --- mean folding --------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", VALID.values(), ids=VALID)
def test_mean_of_a_constant_unit_folds_exactly(reader: Any) -> None:
    module, graph = fresh(reader)
    group = grouping(module)
    gone = group.consumers[0].indices[1]
    module.units.weight.data[list(gone)] = 0.0
    module.units.bias.data[list(gone)] = 0.7
    before = logits(module)
    moments = means(graph, [module.consumer_name])
    found = moments[module.consumer_name].mean[list(gone)]
    assert found.tolist() == pytest.approx([0.7] * len(gone))

    without = copy.deepcopy(module)
    remove(graph.on(without), group, 1)
    assert (logits(without) - before).abs().max() > 0.1, "the unit mattered"
    remove(graph, group, 1, moments)
    torch.testing.assert_close(logits(module), before, rtol=1e-5, atol=1e-5)
    # The unit is really gone: what it carries no longer counts.
    module.units.bias.data[list(gone)] = 50.0
    torch.testing.assert_close(logits(module), before, rtol=1e-5, atol=1e-5)


def test_mean_of_a_varying_unit_keeps_the_mean_output() -> None:
    module, graph = fresh(CONSUMERS["1x1"])
    before = logits(module).view(12, 4, -1).mean((0, 2))
    remove(graph, grouping(module), 2, means(graph, ["reader"]))
    torch.testing.assert_close(logits(module).view(12, 4, -1).mean((0, 2)), before)


@pytest.mark.parametrize("reader", CONSUMERS.values(), ids=CONSUMERS)
def test_input_sum_is_the_layers_answer_to_constants(reader: Any) -> None:
    module = pair(reader())
    layer = module.consumer
    index = torch.tensor(grouping(module).consumers[0].indices[0])
    values = torch.arange(1.0, 1.0 + len(index))
    x = torch.zeros(1, 6, 21, 21)
    x[:, index] = values.view(1, -1, 1, 1)
    if isinstance(layer, nn.Linear):
        answer = F.linear(x[..., 0, 0], layer.weight)[0]
    else:
        answer = F.conv2d(
            x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )[0, :, 4, 4]
    torch.testing.assert_close(input_sum(layer, index, values), answer.detach())


@pytest.mark.parametrize("reader", CONSUMERS.values(), ids=CONSUMERS)
def test_mask_weight_removes_exactly_these_inputs(reader: Any) -> None:
    module = pair(reader())
    layer = module.consumer
    gone = list(grouping(module).consumers[0].indices[1])
    shape = (4, 6) if isinstance(layer, nn.Linear) else (4, 6, 9, 9)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    zeroed = x.clone()
    zeroed[:, gone] = 0.0
    wanted = logits(layer, zeroed)
    assert (wanted - logits(layer, x)).abs().max() > 1e-2
    mask_weight(layer, torch.tensor(gone))
    torch.testing.assert_close(logits(layer, x), wanted)


def test_give_bias_changes_no_output() -> None:
    module = pair(CONSUMERS["3x3 dilated"]())
    before = logits(module)
    assert give_bias(module.consumer)
    assert torch.equal(logits(module), before)
    assert not give_bias(module.consumer), "it has one now"


# --- the ridge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", CONSUMERS.values(), ids=CONSUMERS)
def test_refit_solves_the_normal_equations(reader: Any) -> None:
    """One masked unit, and (U'U/n + lI) W = U'Y/n + l W0 written out for every position."""
    dense, graph = fresh(reader, biased=True)
    masked = copy.deepcopy(dense)
    group = grouping(dense)
    gone = group.consumers[0].indices[1]
    kept = torch.tensor([i for i in range(6) if i not in gone])
    remove(graph.on(masked), group, 1)
    done = fit(graph.on(masked), graph, {dense.consumer_name: kept}, IMAGES, ridge=0.02)
    assert done.layers == (dense.consumer_name,)
    weight, bias = _by_hand(dense, kept.tolist(), ridge=0.02)
    torch.testing.assert_close(
        masked.consumer.weight.detach().double(), weight, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(masked.consumer.bias.detach().double(), bias, rtol=1e-4, atol=1e-5)
    # It is not W0 with a hole in it.
    hole = dense.consumer.weight.detach().double() * (weight != 0)
    assert (weight - hole).abs().max() > 1e-2


def _by_hand(dense: Pair, kept: list[int], *, ridge: float) -> tuple[Tensor, Tensor]:
    """Weights and bias by the book: one row per image and output position, picked by indices."""
    layer = dense.consumer
    with torch.no_grad():
        x = torch.relu(dense.units(IMAGES)).double()
        if isinstance(layer, nn.Linear):
            x = x.mean((2, 3))
        y = layer.double()(x)
    layer.float()
    prior = layer.weight.detach().double()
    weight = torch.zeros_like(prior)
    bias = torch.zeros(len(prior), dtype=torch.float64)
    groups = getattr(layer, "groups", 1)
    ins, outs = x.shape[1] // groups, y.shape[1] // groups
    for g in range(groups):
        mine = [i for i in kept if i // ins == g]
        slots = [i - g * ins for i in mine]
        rows = slice(g * outs, (g + 1) * outs)
        u = _patches(layer, x[:, mine])
        t = y[:, rows].flatten(2).transpose(1, 2).flatten(0, 1) if y.ndim == 4 else y[:, rows]
        mean_u, mean_t = u.mean(0), t.mean(0)
        gram = (u - mean_u).T @ (u - mean_u) / len(u)
        cross = (u - mean_u).T @ (t - mean_t) / len(u)
        pull = ridge * gram.diagonal().mean()
        w0 = prior[rows][:, slots].flatten(1)
        solution = torch.linalg.solve(gram + pull * torch.eye(len(gram)), cross + pull * w0.T).T
        weight[rows, slots] = solution.view(outs, len(slots), *prior.shape[2:])
        bias[rows] = mean_t - solution @ mean_u
    return weight, bias


def _patches(layer: Any, x: Tensor) -> Tensor:
    """(images * positions, features): what each output position of a layer sees."""
    if isinstance(layer, nn.Linear):
        return x
    (kh, kw), (sh, sw) = layer.kernel_size, layer.stride
    (ph, pw), (dh, dw) = layer.padding, layer.dilation
    x = F.pad(x, (pw, pw, ph, ph))
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    rows = []
    for image in x:
        for i in range(height):
            for j in range(width):
                top, left = i * sh, j * sw
                seen = image[:, top : top + dh * kh : dh, left : left + dw * kw : dw]
                rows.append(seen[:, :kh, :kw].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("reader", CONSUMERS.values(), ids=CONSUMERS)
def test_refit_recovers_a_duplicate(reader: Any) -> None:
    """Two units are the same; one goes; the other takes its weights over."""
    module, graph = fresh(reader, biased=True)
    group = grouping(module)
    twin, gone = group.consumers[0].indices[0], group.consumers[0].indices[1]
    for parameter in (module.units.weight, module.units.bias):
        parameter.data[list(gone)] = parameter.data[list(twin)]
    graph = graph.on(copy.deepcopy(module))
    dense = logits(module)
    remove(graph.on(module), group, 1)
    assert (logits(module) - dense).abs().max() > 0.1
    kept = torch.tensor([i for i in range(6) if i not in gone])
    fit(graph.on(module), graph, {module.consumer_name: kept}, IMAGES, ridge=1e-7)
    torch.testing.assert_close(logits(module), dense, rtol=0, atol=1e-4)
    other = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(
        logits(module, other), logits(graph.module, other), rtol=0, atol=1e-4
    )


def test_later_layers_make_up_for_earlier_ones() -> None:
    """Targets are the dense network's, inputs the pruned one's own."""
    dense, groups = small_cnn(), traced(small_cnn)[1]
    images = pictures(60)[0]
    for group in groups.values():
        for entry in group.consumers:
            give_bias(dense.get_submodule(entry.layer))  # type: ignore[arg-type]
    graph = trace(dense, images[:2])
    masked = copy.deepcopy(dense)
    for unit in (0, 3, 5):
        remove(graph.on(masked), groups["expand.0"], unit)
    before = (logits(masked, images) - logits(dense, images)).square().mean()
    alive = torch.tensor([i for i in range(12) if i not in (0, 3, 5)])
    everything = {"squeeze": alive, "project.0": alive, "classifier": torch.arange(10)}
    done = fit(graph.on(masked), graph, everything, images)
    assert done.layers == ("squeeze", "project.0", "classifier"), "in order of execution"
    after = (logits(masked, images) - logits(dense, images)).square().mean()
    only = copy.deepcopy(dense)
    for unit in (0, 3, 5):
        remove(graph.on(only), groups["expand.0"], unit)
    fit(graph.on(only), graph, {k: everything[k] for k in ("squeeze", "project.0")}, images)
    without_last = (logits(only, images) - logits(dense, images)).square().mean()
    assert after < without_last < before
    assert after < before / 4


@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_no_gradient_anywhere(make: Any) -> None:
    module = make()
    images = pictures(6)[0]
    group = list(traced(make)[1].values())[-1]
    for entry in group.consumers:
        give_bias(module.get_submodule(entry.layer))  # type: ignore[arg-type]
    dense = trace(copy.deepcopy(module), images[:2])
    graph = dense.on(module)
    wanted = {n: p.requires_grad for n, p in module.named_parameters()}
    names = [c.layer for c in group.consumers]
    remove(
        graph, group, 0,
        input_moments(graph, names, images, intervention="predicted", chunk=4),
    )  # fmt: skip
    kept = {
        c.layer: torch.tensor([i for u in c.indices[1:] for i in u]).sort().values
        for c in group.consumers
    }
    fit(graph, dense, kept, images)
    assert torch.is_grad_enabled()
    for side in (graph.module, dense.module):
        assert all(p.grad is None and p.grad_fn is None for p in side.parameters())
        assert all(not v.requires_grad for v in side.buffers())
    assert {n: p.requires_grad for n, p in module.named_parameters()} == wanted
    with torch.inference_mode():
        assert not module(images).requires_grad


def test_layer_that_is_too_wide_is_skipped_and_named() -> None:
    for size, fits in ((53, False), (9, True)):
        module = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 2))
        assert (3 * size * size <= MAX_FEATURES) is fits
        images = pictures(12, size)[0]
        graph = trace(module, images[:2])
        before = module[1].weight.detach().clone()
        kept = {"1": torch.arange(3 * size * size)}
        done = fit(graph.on(copy.deepcopy(module)), graph, kept, images)
        assert done.layers == (("1",) if fits else ())
        assert done.skipped == (() if fits else ("1",))
        assert torch.equal(module[1].weight, before), "the dense network is only read"


def test_sampled_positions_still_recover_a_duplicate() -> None:
    """With more positions than rows the fit uses some of them, and an exact answer stays exact."""
    images = pictures(4, 140)[0]
    assert MAX_ROWS < 4 * 140 * 140
    module = pair(CONSUMERS["1x1"]())
    module.units.weight.data[1] = module.units.weight.data[0]
    module.units.bias.data[1] = module.units.bias.data[0]
    graph = trace(copy.deepcopy(module), images[:2])
    dense = logits(module, images)
    remove(graph.on(module), grouping(module), 1)
    fit(graph.on(module), graph, {"reader": torch.tensor([0, 2, 3, 4, 5])}, images, ridge=1e-7)
    # Float32 sums round differently from processor to processor, and the ridge is next to nothing.
    torch.testing.assert_close(logits(module, images), dense, rtol=0, atol=1e-2)


def test_layers_with_fewer_rows_than_unknowns_are_named() -> None:
    import small_models

    import cswap_deploy

    settings = {"ratio": 0.2, "rounds": 1, "round_to": 1, "scoring_samples": 10}
    images = torch.randn(200, *small_models.INPUT_SIZE)
    few = cswap_deploy.prune(small_models.small(), images[:12], **settings).plan
    rows, unknowns = few.starved["head"]
    assert rows == 12, "one row an image behind the pool"
    assert rows < unknowns == 32
    assert not cswap_deploy.prune(small_models.small(), images, **settings).plan.starved
