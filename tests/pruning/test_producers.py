"""Producer reconstruction: each solution against one written out, and never a worse network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from small_networks import lively, pictures, small_cnn, small_vit, traced
from torch import Tensor, nn

from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.unfolding import at, draw, laid_out
from cswap_deploy.network.units import mask_weight
from cswap_deploy.pruning.producers import (
    DIRECTIONS,
    HELD_OUT,
    MAX_FEATURES,
    RIDGE,
    Chain,
    Target,
    best_change,
    find_chains,
    reconstruct_producer,
)
from cswap_deploy.pruning.refit import Refit, refit

IMAGES = pictures(64, 9)[0]


class Block(nn.Module):
    """A producer, batch norm and activation, a consumer."""

    def __init__(
        self, first: nn.Module, second: nn.Module, act: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.norm, self.second = first, nn.BatchNorm2d(8), second
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.norm(self.first(torch.tanh(self.stem(x)))))).flatten(1)


BLOCKS = {
    "3x3, 3x3": lambda: Block(
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 6, 3, padding=1), F.relu
    ),
    "strided, 1x1": lambda: Block(nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 6, 1), F.relu6),
    "1x1, strided": lambda: Block(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3, 2, 1), F.hardswish),
    "depthwise, 1x1": lambda: Block(
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 6, 1), F.silu
    ),
}


@cache
def block(make: Callable[[], nn.Module]) -> Graph:
    """Shared; who changes it works on a copy."""
    torch.manual_seed(5)
    return trace(lively(make()), IMAGES[:2])


def pruned_pair(
    dense: Graph, gone: list[int], *, reconstruct: bool, consumer: str = "second"
) -> tuple[Graph, Graph, Refit]:
    """A copy of the network that has lost some units and was refitted, and the network."""
    pruned = dense.on(copy.deepcopy(dense.module))
    layer = pruned.module.get_submodule(consumer)
    mask_weight(layer, torch.tensor(gone))  # type: ignore[arg-type]
    inputs = layer.weight.shape[1]  # type: ignore[index, union-attr]
    kept = torch.tensor([i for i in range(inputs) if i not in gone])
    done = refit(
        pruned, dense, {consumer: kept}, IMAGES, reconstruct=(consumer,) if reconstruct else ()
    )
    return pruned, dense, done


def distance(pruned: Graph, dense: Graph, images: Tensor) -> float:
    with torch.no_grad():
        return float((pruned.module(images) - dense.module(images)).square().mean())


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_less_is_lacking_on_images_never_seen(make: Callable[[], nn.Module]) -> None:
    fresh = torch.randn(200, 3, 9, 9, generator=torch.Generator().manual_seed(9))
    alone, dense, _ = pruned_pair(block(make), [1, 4, 6], reconstruct=False)
    helped, _, done = pruned_pair(block(make), [1, 4, 6], reconstruct=True)
    assert done.producers == ("first",)
    for images in (IMAGES, fresh):
        assert distance(helped, dense, images) < 0.97 * distance(alone, dense, images)
    before, after = dense.module.first.weight, helped.module.first.weight  # type: ignore[union-attr]
    assert torch.equal(after[[1, 4, 6]], before[[1, 4, 6]]), "units that are gone are left alone"
    assert not torch.equal(after[[0, 2, 3, 5, 7]], before[[0, 2, 3, 5, 7]])
    assert torch.equal(dense.module.stem.weight, helped.module.stem.weight)  # type: ignore[union-attr, arg-type]


def test_one_change_is_the_ridge_solution_written_out() -> None:
    """All taps, all positions, by loops: the least squares problem of the module's docstring."""
    torch.manual_seed(2)
    rows, taps, features, outputs = 50, 4, 3, 5
    sees, slope = torch.randn(rows, taps, features), torch.rand(rows, taps)
    read, lacking = torch.randn(taps, outputs), torch.randn(rows, outputs)
    left, sizes, right = torch.linalg.svd(read, full_matrices=False)
    few = DIRECTIONS
    moves, aims = [], []
    for k in range(few):
        move = torch.zeros(rows, features + 1)
        for r in range(rows):
            for s in range(taps):
                seen = torch.cat([sees[r, s], torch.ones(1)])
                move[r] += slope[r, s] * sizes[k] * left[s, k] * seen
        aim = lacking @ right[k]
        moves.append(move - move.mean(0))
        aims.append(aim - aim.mean())
    u, y = torch.cat(moves).double(), torch.cat(aims).double()
    gram = u.T @ u
    pull = RIDGE * gram.diagonal().mean() * torch.eye(features + 1)
    wanted = torch.linalg.solve(gram + pull, u.T @ y)
    found = best_change(sees.clone(), slope, read, lacking)
    assert found is not None
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    assert best_change(sees, torch.zeros_like(slope), read, lacking) is None
    assert best_change(sees, slope, torch.zeros_like(read), lacking) is None


def test_change_that_does_not_help_other_images_is_not_made() -> None:
    """What is wanted is noise: it can be followed on some images, and is wrong on the others."""
    module = copy.deepcopy(block(BLOCKS["3x3, 3x3"]).module)
    graph = block(BLOCKS["3x3, 3x3"]).on(module)
    (chain,) = find_chains(graph, ["second"])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        x = torch.tanh(module.stem(IMAGES))  # type: ignore[operator]
        said = laid_out(module.second(chain.run(graph, x)), module.second)  # type: ignore[operator, arg-type]
        where = draw(said.shape, 64)
        wanted = at(said, where)
        noise = wanted + torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
        target, units = Target(where, wanted), torch.arange(8)
        for rounding in (0, 1e-6, -1e-6):
            nearly = replace(target, values=wanted * (1 + rounding))
            done = reconstruct_producer(graph, chain, x, nearly, units=units)
            assert not done, "nothing lacks"
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        reconstruct_producer(graph, chain, x, replace(target, values=noise), units=units)
    held_out = where.image >= len(IMAGES) - int(HELD_OUT * len(IMAGES))
    assert 0 < held_out.sum() < len(where) / 3
    with torch.no_grad():
        now = at(laid_out(module.second(chain.run(graph, x)), module.second), where)  # type: ignore[operator, arg-type]

    def lacking(said: Tensor) -> float:
        return float((noise - said)[held_out].var(0).sum())

    assert lacking(now) <= lacking(wanted) * (1 + 1e-5)


def test_inputs_that_the_producer_lost_stay_lost() -> None:
    """The producer is a consumer too: what it does not read any more must not come back."""
    graph, groups = traced(small_cnn)
    module = copy.deepcopy(graph.module)
    images = pictures(40)[0]
    pruned = graph.on(module)
    kept: dict[str, Tensor] = {}
    for name, gone in (("squeeze", [1]), ("expand.0", [2, 7])):
        for entry in groups[name].consumers:
            index = [i for u in gone for i in entry.indices[u]]
            layer = module.get_submodule(entry.layer)
            mask_weight(layer, torch.tensor(index))  # type: ignore[arg-type]
            width = layer.weight.shape[1]  # type: ignore[index, union-attr]
            kept[entry.layer] = torch.tensor([i for i in range(width) if i not in index])
    before = module.squeeze.weight.clone()  # type: ignore[operator, union-attr]
    done = refit(pruned, graph, kept, images, reconstruct=kept)
    assert done.producers == ("squeeze",)
    after = module.squeeze.weight  # type: ignore[union-attr]
    assert not after[:, [2, 7]].any()  # type: ignore[index]
    assert not torch.equal(after, before)  # type: ignore[arg-type]


def chains(graph: Graph) -> dict[str, str]:
    single = [n for n in graph.layers() if len(graph.readers(n)) == 1]
    return {c.consumer_layer: c.producer_layer for c in find_chains(graph, single)}


def test_chains_are_found_where_nothing_else_reads_or_mixes() -> None:
    found = chains(traced(small_cnn)[0])
    # The stream is read twice, the gate comes between, grouped layers are left out.
    assert found == {"excite": "squeeze"}
    vit = chains(traced(small_vit)[0])
    assert vit == {f"blocks.{i}.mlp.fc2": f"blocks.{i}.mlp.fc1" for i in range(2)}
    for make in BLOCKS.values():
        assert chains(block(make))["second"] == "first"


def test_vit_neurons_are_reconstructed() -> None:
    dense, _ = traced(small_vit)
    module, images = dense.module, pictures(64)[0]
    name = "blocks.1.mlp.fc2"
    gone, kept = (
        [0, 5, 9, 11, 17],
        torch.tensor([i for i in range(24) if i not in (0, 5, 9, 11, 17)]),
    )

    def left(reconstruct: tuple[str, ...]) -> tuple[float, Refit]:
        pruned = dense.on(copy.deepcopy(module))
        mask_weight(pruned.module.get_submodule(name), torch.tensor(gone))  # type: ignore[arg-type]
        done = refit(pruned, dense, {name: kept}, images, reconstruct=reconstruct)
        return distance(pruned, dense, images), done

    alone, _ = left(())
    helped, done = left((name,))
    assert done.producers == ("blocks.1.mlp.fc1",)
    assert helped < alone


def test_wide_producers_are_left_alone() -> None:
    wide = block(lambda: Block(nn.Conv2d(8, 8, 13, padding=6), nn.Conv2d(8, 6, 1), F.relu))
    assert MAX_FEATURES < 8 * 13 * 13
    _, _, done = pruned_pair(wide, [1], reconstruct=True)
    assert done.producers == ()
    assert done.layers == ("second",)


def test_chain_gives_the_consumers_input() -> None:
    graph = block(BLOCKS["strided, 1x1"])
    module = graph.module
    (chain,) = find_chains(graph, ["second"])
    assert isinstance(chain, Chain)
    with torch.no_grad():
        x = torch.tanh(module.stem(IMAGES))  # type: ignore[operator]
        wanted = F.relu6(module.norm(module.first(x)))  # type: ignore[operator]
        torch.testing.assert_close(chain.run(graph, x), wanted)
