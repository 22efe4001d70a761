"""Units that stay take over: each solution against one written out, and never a worse network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_networks import lively, pictures, small_cnn, small_vit
from torch import Tensor, nn

from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.groups import find_groups
from cswap_deploy.network.unfolding import at, draw, laid_out
from cswap_deploy.network.units import mask_weight
from cswap_deploy.pruning import producers
from cswap_deploy.pruning.producers import Chain, find_chains, take_over
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


def block(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return lively(make())


def pruned_pair(
    module: nn.Module, gone: list[int], *, taken_over: bool, consumer: str = "second"
) -> tuple[Graph, Graph, Refit]:
    """The network, and a copy of it that has lost some units and was solved again."""
    dense = trace(module, IMAGES[:2])
    pruned = dense.on(copy.deepcopy(module))
    layer = pruned.module.get_submodule(consumer)
    mask_weight(layer, torch.tensor(gone))  # type: ignore[arg-type]
    inputs = layer.weight.shape[1]  # type: ignore[index, union-attr]
    kept = torch.tensor([i for i in range(inputs) if i not in gone])
    done = refit(
        pruned, dense, {consumer: kept}, IMAGES, taken_over=(consumer,) if taken_over else ()
    )
    return pruned, dense, done


def distance(pruned: Graph, dense: Graph, images: Tensor) -> float:
    with torch.no_grad():
        return float((pruned.module(images) - dense.module(images)).square().mean())


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_less_is_lacking_on_images_never_seen(make: Callable[[], nn.Module]) -> None:
    fresh = torch.randn(200, 3, 9, 9, generator=torch.Generator().manual_seed(9))
    alone, dense, _ = pruned_pair(block(make), [1, 4, 6], taken_over=False)
    helped, _, done = pruned_pair(block(make), [1, 4, 6], taken_over=True)
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
    few = producers._DIRECTIONS
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
    pull = producers._RIDGE * gram.diagonal().mean() * torch.eye(features + 1)
    wanted = torch.linalg.solve(gram + pull, u.T @ y)
    found = producers._best_change(sees.clone(), slope, read, lacking)
    assert found is not None
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    assert producers._best_change(sees, torch.zeros_like(slope), read, lacking) is None
    assert producers._best_change(sees, slope, torch.zeros_like(read), lacking) is None


def test_change_that_does_not_help_other_images_is_not_made() -> None:
    """What is wanted is noise: it can be followed on some images, and is wrong on the others."""
    module = block(BLOCKS["3x3, 3x3"])
    graph = trace(module, IMAGES[:2])
    (chain,) = find_chains(graph, ["second"])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        x = torch.tanh(module.stem(IMAGES))  # type: ignore[operator]
        said = laid_out(module.second(chain.run(graph, x)), module.second)  # type: ignore[operator, arg-type]
        where = draw(said.shape, 64)
        wanted = at(said, where)
        noise = wanted + torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
        solved = len(where) - producers._to_solve_on(where.image)
        assert 0 < solved < len(where) / 3
        for rounding in (0, 1e-6, -1e-6):
            nearly = wanted * (1 + rounding)
            assert not take_over(graph, chain, x, torch.arange(8), where, nearly), "nothing lacks"
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        take_over(graph, chain, x, torch.arange(8), where, noise)
    judges = slice(producers._to_solve_on(where.image), None)
    with torch.no_grad():
        now = at(laid_out(module.second(chain.run(graph, x)), module.second), where)  # type: ignore[operator, arg-type]

    def lacking(said: Tensor) -> float:
        return float(producers._power((noise - said)[judges]))

    assert lacking(now) <= lacking(wanted) * (1 + 1e-5)


def test_inputs_that_the_producer_lost_stay_lost() -> None:
    """The producer is a consumer too: what it does not read any more must not come back."""
    module = small_cnn()
    images = pictures(40)[0]
    graph = trace(copy.deepcopy(module), images[:2])
    groups = {g.name: g for g in find_groups(module, images[:2]).groups}
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
    done = refit(pruned, graph, kept, images, taken_over=kept)
    assert done.producers == ("squeeze",)
    after = module.squeeze.weight  # type: ignore[union-attr]
    assert not after[:, [2, 7]].any()  # type: ignore[index]
    assert not torch.equal(after, before)  # type: ignore[arg-type]


def chains(module: nn.Module, size: int = 16) -> dict[str, str]:
    images = pictures(2, size)[0]
    graph = trace(module, images)
    single = [n for n in graph.layers() if len(graph.readers(n)) == 1]
    return {c.consumer_layer: c.producer_layer for c in find_chains(graph, single)}


def test_chains_are_found_where_nothing_else_reads_or_mixes() -> None:
    found = chains(small_cnn())
    # The stream is read twice, the gate comes between, grouped layers are left out.
    assert found == {"excite": "squeeze"}
    vit = chains(small_vit())
    assert vit == {f"blocks.{i}.mlp.fc2": f"blocks.{i}.mlp.fc1" for i in range(2)}
    for make in BLOCKS.values():
        assert chains(block(make), 9)["second"] == "first"


def test_vit_neurons_take_over() -> None:
    module = small_vit()
    images = pictures(64)[0]
    dense = trace(module, images[:2])
    name = "blocks.1.mlp.fc2"
    gone, kept = (
        [0, 5, 9, 11, 17],
        torch.tensor([i for i in range(24) if i not in (0, 5, 9, 11, 17)]),
    )

    def left(taken_over: tuple[str, ...]) -> tuple[float, Refit]:
        pruned = dense.on(copy.deepcopy(module))
        mask_weight(pruned.module.get_submodule(name), torch.tensor(gone))  # type: ignore[arg-type]
        done = refit(pruned, dense, {name: kept}, images, taken_over=taken_over)
        return distance(pruned, dense, images), done

    alone, _ = left(())
    helped, done = left((name,))
    assert done.producers == ("blocks.1.mlp.fc1",)
    assert helped < alone


def test_wide_producers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producers, "MAX_FEATURES", 71)
    _, _, done = pruned_pair(block(BLOCKS["3x3, 3x3"]), [1], taken_over=True)
    assert done.producers == ()
    assert done.layers == ("second",)


def test_chain_gives_the_consumers_input() -> None:
    module = block(BLOCKS["strided, 1x1"])
    graph = trace(module, IMAGES[:2])
    (chain,) = find_chains(graph, ["second"])
    assert isinstance(chain, Chain)
    with torch.no_grad():
        x = torch.tanh(module.stem(IMAGES))  # type: ignore[operator]
        wanted = F.relu6(module.norm(module.first(x)))  # type: ignore[operator]
        torch.testing.assert_close(chain.run(graph, x), wanted)
