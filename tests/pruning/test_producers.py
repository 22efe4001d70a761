"""Producer reconstruction: the solution against one written out, and never a worse network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from small_networks import lively, pictures, small_cnn, small_vit, targets_of, traced
from small_networks import refitted as fit
from torch import Tensor, nn

from cswap_deploy.config import PruneConfig
from cswap_deploy.models.torchvision_shim import import_timm
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.unfolding import at, draw, laid_out
from cswap_deploy.network.units import mask_weight
from cswap_deploy.progress import Silent
from cswap_deploy.pruning import producers
from cswap_deploy.pruning.chains import Chain, find_chains
from cswap_deploy.pruning.linear_maps import OwnInputs, SharedInputs, Through
from cswap_deploy.pruning.prepare import prepare
from cswap_deploy.pruning.producers import (
    HELD_OUT,
    MAX_FEATURES,
    RIDGE,
    Reads,
    best_change,
    reconstruct_producer,
)
from cswap_deploy.pruning.refit import Refit, solvable
from cswap_deploy.pruning.trials import refit_behind

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


class Gate(nn.Module):
    """An activation, then squeeze-and-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


BLOCKS = {
    "3x3, 3x3": lambda: Block(
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 6, 3, padding=1), F.relu
    ),
    "strided, 1x1": lambda: Block(nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 6, 1), F.relu6),
    "1x1, strided": lambda: Block(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3, 2, 1), F.hardswish),
    "depthwise, 1x1": lambda: Block(
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 6, 1), F.silu
    ),
    "depthwise, gate, 1x1": lambda: Block(
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 6, 1), Gate()
    ),
    "1x1, gate, 3x3": lambda: Block(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3, padding=1), Gate()),
    "1x1, grouped": lambda: Block(
        nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3, padding=1, groups=2), F.relu
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
    inputs = layer.weight.shape[1] * getattr(layer, "groups", 1)  # type: ignore[index, union-attr]
    kept = torch.tensor([i for i in range(inputs) if i not in gone])
    done = fit(
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


@pytest.mark.parametrize("own", [False, True])
def test_change_is_the_damped_least_squares_solution(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The problem of the module's docstring, written out by loops and solved directly."""
    monkeypatch.setattr(producers, "ITERATIONS", 60)
    torch.manual_seed(2)
    rows, taps, features, units, outputs = 50, 4, 3, 2, 5
    shape = (features, rows * taps, units) if own else (rows * taps, features)
    seen, slope = torch.randn(shape), torch.rand(rows, taps, units)
    read, lacking = torch.randn(taps, units, outputs), torch.randn(rows, outputs)
    known = features + 1
    moves = torch.zeros(rows, outputs, units * known, dtype=torch.float64)
    for r in range(rows):
        for s in range(taps):
            for k in range(units):
                at_tap = seen[:, r * taps + s, k] if own else seen[r * taps + s]
                x = torch.cat([at_tap, torch.ones(1)])
                part = slice(k * known, (k + 1) * known)
                moves[r, :, part] += slope[r, s, k] * read[s, k, :, None] * x
    far = (slope.square() * read.square().sum(2)).sum((0, 1))
    variance = seen.var(1, correction=0).mean(0) if own else seen.var(0, correction=0).mean()
    damping = (RIDGE * far * variance)[:, None].expand(units, known)
    pull = torch.diag_embed(damping.flatten().double())
    for k in range(units):
        pull[k * known + features, k * known + features] = 1e-6 * far[k]
    jacobian = (moves - moves.mean(0)).flatten(0, 1)
    aim = (lacking - lacking.mean(0)).flatten().double()
    wanted = torch.linalg.solve(jacobian.T @ jacobian + pull, jacobian.T @ aim).view(units, known)

    # What is held out is what is solved for.
    both = [torch.cat([v, v]) for v in (slope.flatten(0, 1), lacking)]
    reads = OwnInputs(torch.cat([seen, seen], 1)) if own else SharedInputs(torch.cat([seen, seen]))
    index = torch.arange(2 * rows * taps).view(-1, taps)
    through = Through(index, torch.ones(2 * rows, taps), read)
    ends = rows, rows * taps
    found = best_change(reads, both[0], through, both[1], ends)
    assert found is not None

    def left(change: Tensor) -> float:
        """What is lacking, and the damping."""
        change = change.double().flatten()
        return float((aim - jacobian @ change).square().sum() + change @ pull @ change)

    most = left(torch.zeros_like(wanted)) - left(wanted)
    solved = torch.cat([found.weight, found.constant[:, None]], 1)
    assert most > 5
    assert left(torch.zeros_like(wanted)) - left(solved) == pytest.approx(most, rel=0.01)
    assert best_change(reads, torch.zeros_like(both[0]), through, both[1], ends) is None
    nothing = Through(index, through.exists, torch.zeros_like(read))
    assert best_change(reads, both[0], nothing, both[1], ends) is None


@pytest.mark.parametrize("make", [BLOCKS["3x3, 3x3"], BLOCKS["depthwise, 1x1"]])
def test_adjoint_is_the_transpose(make: Callable[[], nn.Module]) -> None:
    graph = block(make)
    (chain,) = find_chains(graph, ["second"])
    reads = noted(graph, chain, torch.arange(8))
    torch.manual_seed(0)
    weight = torch.randn_like(reads.linear.adjoint(torch.zeros(1, 8)))
    given = torch.randn(len(reads.places), 8)
    left = (reads.linear(weight) * given).sum()
    torch.testing.assert_close(
        left, (weight * reads.linear.adjoint(given)).sum(), rtol=1e-4, atol=0.1
    )
    consumer = graph.layer("second").weight.detach().flatten(2).permute(2, 1, 0)
    through = Through(reads.index, reads.exists, consumer)
    for rows, places in (reads.solve_on, (len(reads.rows), len(reads.places))):
        wanted = torch.randn(rows, 6)
        torch.testing.assert_close(
            (through(given)[:rows] * wanted).sum(),
            (given[:places] * through.adjoint(wanted, places)).sum(), rtol=1e-4, atol=0.1,
        )  # fmt: skip


def noted(graph: Graph, chain: Chain, units: Tensor) -> Reads:
    """What the producer of a block reads, on all images."""
    targets = targets_of(graph, IMAGES, rows=64)
    size = targets.shape("first")[1:]
    reads = Reads.of(graph, chain, targets.places("second"), size, units, None)
    assert reads is not None
    with torch.no_grad():
        x = torch.tanh(graph.module.stem(IMAGES))  # type: ignore[operator]
    for begin in (0, 40):  # in two parts of uneven size
        part = slice(begin, min(begin + 40, len(IMAGES)))
        reads.take(x[part], part)
    return reads


def test_change_that_does_not_help_other_images_is_not_made() -> None:
    """What is wanted is noise: it can be followed on some images, and is wrong on the others."""
    module = copy.deepcopy(block(BLOCKS["3x3, 3x3"]).module)
    graph = block(BLOCKS["3x3, 3x3"]).on(module)
    (chain,) = find_chains(graph, ["second"])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    reads = noted(graph, chain, torch.arange(8))

    def said() -> Tensor:
        x = F.relu(module.norm(module.first(torch.tanh(module.stem(IMAGES)))))  # type: ignore[operator]
        return laid_out(module.second(x), module.second)  # type: ignore[operator, arg-type]

    with torch.no_grad():
        where = draw(said().shape, 64)
        wanted = at(said(), where)
        noise = wanted + torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
        for rounding in (0, 1e-6, -1e-6):
            done = reconstruct_producer(graph, chain, reads, wanted * (1 + rounding))
            assert not done, "nothing lacks"
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        reconstruct_producer(graph, chain, reads, noise)
    held_out = where.image >= len(IMAGES) - int(HELD_OUT * len(IMAGES))
    assert 0 < held_out.sum() < len(where) / 3
    with torch.no_grad():
        now = at(said(), where)

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
    done = fit(pruned, graph, kept, images, reconstruct=kept)
    assert "squeeze" in done.producers
    after = module.squeeze.weight  # type: ignore[union-attr]
    assert not after[:, [2, 7]].any()  # type: ignore[index]
    assert not torch.equal(after, before)  # type: ignore[arg-type]


def chains(graph: Graph) -> dict[str, str]:
    single = [n for n in graph.layers() if len(graph.readers(n)) == 1]
    return {c.consumer_layer: c.producer_layer for c in find_chains(graph, single)}


def test_chains_are_found_where_nothing_else_reads_or_mixes() -> None:
    found = chains(traced(small_cnn)[0])
    # The stream is read twice; a gate may come between, and a grouped layer read but not produce.
    assert found == {"excite": "squeeze", "project.0": "depthwise.0", "grouped.0": "down.0"}
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
        done = fit(pruned, dense, {name: kept}, images, reconstruct=reconstruct)
        return distance(pruned, dense, images), done

    alone, _ = left(())
    helped, done = left((name,))
    assert done.producers == ("blocks.1.mlp.fc1",)
    assert helped < alone


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "efficientnet_b0", "regnety_002"])
def test_producers_before_gates_and_groups_help_on_images_never_seen(name: str) -> None:
    """Whole timm networks; a third of what a layer reads behind a gate, or in groups, is gone."""
    torch.manual_seed(0)
    network = lively(import_timm().create_model(name, num_classes=10))
    for path, layer in network.named_modules():
        if path.endswith(("se.conv_expand", "se.fc2")):  # else most gates are shut, or wide open
            layer.weight.data *= 0.3  # type: ignore[union-attr, operator]
    images = torch.randn(160, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    dense = trace(network, images[:2])
    chains = find_chains(dense, solvable(dense))
    through = [
        c for c in chains if c.gates or getattr(dense.layer(c.consumer_layer), "groups", 1) > 1
    ]
    assert len(through) >= 9
    for chain in through[1:3]:
        name = chain.consumer_layer
        width = len(dense.layer(chain.producer_layer).weight)
        gone, kept = torch.arange(0, width, 3), torch.arange(width)[torch.arange(width) % 3 > 0]
        error = {}
        for reconstruct in (False, True):
            pruned = dense.on(copy.deepcopy(network))
            mask_weight(pruned.layer(name), gone)
            done = fit(pruned, dense, {name: kept}, images[:128], reconstruct=(name,) * reconstruct)
            assert done.producers == (chain.producer_layer,) * reconstruct
            said, wanted = (given(g, name, images[128:]) for g in (pruned, dense))
            error[reconstruct] = float((said - wanted).square().sum())
        assert error[True] < 0.96 * error[False]


def given(graph: Graph, layer: str, images: Tensor) -> Tensor:
    """What a convolution gives, less its means, which may be made right in the norm behind it."""
    node = graph.readers(layer)[0]
    with torch.no_grad():
        output = next(
            graph.execute(now, env, batch=len(images))
            for now, env in graph.step(images)
            if now is node
        )
    return output - output.mean((0, 2, 3), keepdim=True)


def test_wide_producers_are_left_alone() -> None:
    wide = block(lambda: Block(nn.Conv2d(8, 8, 13, padding=6), nn.Conv2d(8, 6, 1), F.relu))
    assert MAX_FEATURES < 8 * 13 * 13
    _, _, done = pruned_pair(wide, [1], reconstruct=True)
    assert done.producers == ()
    assert done.layers == ("second",)


class Residual(nn.Module):
    """Three blocks behind one another, of which any may go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
                nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12),
            )
            for _ in range(3)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


def test_blocks_behind_a_branch_that_is_gone_have_their_producers_reconstructed() -> None:
    """They lost no input themselves, but have to make up for what the branch added."""
    torch.manual_seed(5)
    many = pictures(256, 9)[0]
    prepared = prepare(lively(Residual()), many, PruneConfig(ratio=0.2, round_to=1))
    (branch,) = [g.name for g in prepared.groups if "blocks.1" in g.name and g.kind == "branch"]
    effects = {}
    for producers_too in (False, True):
        network = prepared.copy()
        done = refit_behind(
            network, {branch: [0]}, targets_of(prepared.dense, many[:192]),
            producers=producers_too, most_bytes=1 << 30, progress=Silent(),
        )  # fmt: skip
        assert done.producers == (("blocks.2.0",) if producers_too else ())
        said, wanted = (g.run(many[192:])[0].detach() for g in (network.graph, prepared.dense))
        effects[producers_too] = float((said - wanted).square().sum())
    assert effects[True] < 0.9 * effects[False]
