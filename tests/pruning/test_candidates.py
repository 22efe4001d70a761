"""Which set of units goes: orders, limits, and the set whose own effect is least."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import pictures, small_cnn, small_vit
from torch import Tensor, nn

from cswap_deploy.causal.mixtures import lightly_mixed
from cswap_deploy.network.sizes import amount
from cswap_deploy.old_config import BuildConfig
from cswap_deploy.progress import Silent
from cswap_deploy.pruning import candidates as sets
from cswap_deploy.pruning import rounds as progressive
from cswap_deploy.pruning.allocation import Limits, Ranking, choose, even, remaining, spread_like
from cswap_deploy.pruning.plan import Prepared, Pruned, prepare, prune
from cswap_deploy.pruning.state import Settings
from cswap_deploy.pruning.trials import Trials, clearly_less, solve_behind, take_out

IMAGES, LABELS = pictures(40)
SETTINGS = Settings(ratio=0.4, rounds=2, scoring_samples=10)


def ready(module: nn.Module, settings: Settings = SETTINGS) -> Prepared:
    return prepare(
        module, images=IMAGES, ratio=settings.ratio, ratio_of=settings.ratio_of, round_to=1
    )


def run(settings: Settings = SETTINGS, criterion: str = "cswap", make: Any = small_cnn) -> Pruned:
    return prune(
        ready(make(), settings), images=IMAGES, labels=LABELS, settings=settings,
        criterion=criterion, watcher=Silent(),
    )  # fmt: skip


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The effect of everything that was tried."""
    found: list[float] = []
    real = Trials.effect

    def spy(self: Trials, gone: Any, moments: Any, *, ridge: float | None) -> Tensor:
        effect = real(self, gone, moments, ridge=ridge)
        found.append(float(effect.mean()))
        return effect

    monkeypatch.setattr(Trials, "effect", spy)
    return found


# --- orders --------------------------------------------------------------------------------------


def test_even_takes_the_same_fraction_of_each_group() -> None:
    """However different the scores of the groups are."""
    prepared = ready(small_cnn())
    rng = np.random.default_rng(0)
    scores = {g.name: 10.0**i * rng.random(g.units) for i, g in enumerate(prepared.groups)}
    limits = Limits(dict.fromkeys(scores, 1), dict.fromkeys(scores, 1))
    total = sum(g.units for g in prepared.groups)

    def fractions(ranking: Ranking, removed: dict[str, list[int]]) -> list[float]:
        sizes = copy.deepcopy(prepared.sizes)
        choose(
            prepared.groups, sizes, removed, ranking, limits,
            target=total / 2, of="channels", fine=False,
        )  # fmt: skip
        return [len(removed.get(g.name, [])) / g.units for g in prepared.groups]

    removed: dict[str, list[int]] = {}
    assert fractions(even(prepared.groups, {}, scores), removed) == pytest.approx(
        [0.5] * len(prepared.groups), abs=1 / 8 + 1e-9
    )
    for group in prepared.groups:
        lowest = np.argsort(scores[group.name])[: len(removed[group.name])]
        assert sorted(removed[group.name]) == sorted(lowest.tolist())
    assert max(fractions(Ranking(scores), {})) > 0.7, "by scores alone it is not even"


def test_even_counts_what_is_gone_already() -> None:
    prepared = ready(small_cnn())
    group = next(g for g in prepared.groups if g.units == 12)
    scores = {g.name: np.arange(g.units, dtype=float) for g in prepared.groups}
    ranking = even(prepared.groups, {group.name: [0, 1, 2]}, scores)
    assert not ranking.per_saving
    assert ranking.scores[group.name][3:].tolist() == pytest.approx(
        [(3 + i + 0.5) / 12 for i in range(9)]
    )


@pytest.mark.parametrize("of", ["params", "channels", "macs"])
@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_choose_leaves_sizes_and_removed_consistent(make: Any, fine: bool, of: Any) -> None:
    prepared = ready(make())
    rng = np.random.default_rng(1)
    ranking = Ranking({g.name: rng.random(g.units) for g in prepared.groups})
    limits = Limits({g.name: 2 for g in prepared.groups}, {g.name: 1 for g in prepared.groups})
    first = prepared.groups[0].name
    removed = {first: [1]}
    sizes = copy.deepcopy(prepared.sizes)
    sizes.remove(first, [1])
    begun = amount(sizes.size(), of)
    gone = choose(
        prepared.groups, sizes, removed, ranking, limits, target=0.6 * begun, of=of, fine=fine
    )
    assert gone
    again = copy.deepcopy(prepared.sizes)
    for group in prepared.groups:
        mine = removed.get(group.name, [])
        assert len(mine) == len(set(mine)), "nothing goes twice"
        assert mine == ([1] if group.name == first else []) + gone.get(group.name, [])
        left = remaining(group, removed)
        assert sorted([*left, *mine]) == list(range(group.units))
        assert len(left) >= 1
        if group.name in gone and not fine:
            assert len(left) % 2 == 0
        again.remove(group.name, mine)
    assert again.size() == sizes.size()
    assert amount(sizes.size(), of) == pytest.approx(0.6 * begun, abs=0.13 * begun)


def test_spread_like_takes_as_many_from_each_group_by_its_own_order() -> None:
    prepared = ready(small_cnn())
    groups = prepared.groups
    rng = np.random.default_rng(2)
    mine = {g.name: rng.random(g.units) for g in groups}
    other = {g.name: rng.random(g.units) for g in groups}
    removed = {groups[0].name: [int(np.argmin(mine[groups[0].name]))]}
    limits = Limits(dict.fromkeys(mine, 1), dict.fromkeys(mine, 1))
    sizes = copy.deepcopy(prepared.sizes)
    sizes.remove(groups[0].name, removed[groups[0].name])

    def chosen(ranking: Ranking) -> dict[str, list[int]]:
        return choose(
            groups, copy.deepcopy(sizes), copy.deepcopy(removed), ranking, limits,
            target=0.6 * amount(sizes.size(), "channels"), of="channels", fine=False,
        )  # fmt: skip

    theirs = chosen(Ranking(other, per_saving=False))
    ours = chosen(spread_like(groups, removed, mine, other))
    assert {n: len(units) for n, units in ours.items()} == {n: len(u) for n, u in theirs.items()}
    assert ours != theirs
    for group in groups:
        order = sorted(remaining(group, removed), key=lambda u: mine[group.name][u])
        gone = ours.get(group.name, [])
        assert set(gone) == set(order[: len(gone)])


# --- sets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_set_with_the_least_effect_as_a_whole_is_taken(make: Any, tried: list[float]) -> None:
    """Without refit the pruned network is the trial itself: its divergence is known afterwards."""
    settings = replace(SETTINGS, rounds=1, refit=False, ratio=0.3)
    result = run(settings, make=make)
    (log,) = result.plan.rounds
    assert len(tried) >= 2, "nothing was compared"
    assert log.kl == min(tried)
    assert log.kl < max(tried)
    unseen = IMAGES[20:]
    unseen = torch.cat([unseen, lightly_mixed(unseen, seed=0), lightly_mixed(unseen, seed=1)])
    with torch.no_grad():
        p = F.log_softmax(make()(unseen).double(), 1)
        q = F.log_softmax(result.module(unseen).double(), 1)
    by_hand = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert log.kl == pytest.approx(by_hand, rel=1e-3, abs=1e-6)


def test_every_round_takes_the_least_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tried: list[float]
) -> None:
    """The last one a set from the dense network on, unless its own is better beyond chance."""
    rounds: list[dict[str, float]] = []
    compared: list[bool] = []
    real = sets.least

    def compare(one: Tensor, other: Tensor) -> bool:
        compared.append(clearly_less(one, other))
        return compared[-1]

    def spy(trials: Trials, proposed: Any, moments: Any, **rest: Any) -> tuple[str, Tensor | None]:
        begun = len(tried)
        chosen = real(trials, proposed, moments, **rest)
        measured = len(proposed) > 1 or "always" in rest
        rounds.append(dict(zip(proposed, tried[begun:], strict=measured)))
        return chosen

    for module in (progressive, sets):
        monkeypatch.setattr(module, "least", spy)
    monkeypatch.setattr(progressive, "clearly_less", compare)
    logs = run(replace(SETTINGS, rounds=3)).plan.rounds
    assert len(logs) == 3
    assert len(rounds) == 4, "the last round also starts afresh"
    assert max(map(len, rounds)) >= 3
    afresh = rounds.pop()
    assert afresh.keys() <= {"magnitude, afresh", "magnitude, even, afresh", "lamp, afresh"}
    (better,) = compared
    if not better:
        rounds[2] = afresh
    for log, found in zip(logs, rounds, strict=True):
        if not found:
            assert log.order == "effect", "all orders proposed the same set"
            continue
        assert found.keys() <= {
            "effect", "effect, even", "magnitude", "magnitude, even", "lamp",
            "effect, lamp", "together, even",
            *afresh,
        }  # fmt: skip
        order, effect = min(found.items(), key=lambda f: f[1])
        assert log.order == order
        assert log.kl is not None
        assert log.kl <= effect, "another ridge may have brought it nearer still"


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude-l1", "random"])
def test_baselines_never_try_rivals(criterion: str, tried: list[float]) -> None:
    logs = run(replace(SETTINGS, refit=False), criterion=criterion).plan.rounds
    assert tried == []
    assert {(log.order, log.kl, log.measured) for log in logs} == {("effect", None, 0)}


def test_by_unit_nothing_is_tried_and_the_same_is_measured(tried: list[float]) -> None:
    by_unit = run(replace(SETTINGS, rounds=1, select="unit", refit=False)).plan
    assert tried == []
    assert [(log.order, log.kl) for log in by_unit.rounds] == [("effect", None)]
    by_set = run(replace(SETTINGS, rounds=1, refit=False)).plan
    assert tried
    assert [g.effects for g in by_unit.groups] == [g.effects for g in by_set.groups]
    # What goes is what has the least effect for what it saves.
    assert sum(g.units - len(g.kept) for g in by_unit.groups) == by_unit.rounds[0].removed


# --- the method as published ---------------------------------------------------------------------


def test_paper_adds_no_compensation_to_any_weight() -> None:
    """What is left is what was there, number for number."""
    config = BuildConfig(model="m", method="paper")
    settings = replace(
        SETTINGS, intervention=config.intervention, effect=config.effect, select=config.select,
        refit=config.refit,
    )  # fmt: skip
    dense = small_cnn()
    result = run(settings)
    assert result.plan.effective("params") == pytest.approx(0.4, abs=0.07)
    assert result.plan.refitted == ()
    assert result.plan.biased == ()
    groups = {g.name: g for g in ready(small_cnn()).groups}
    gone: dict[tuple[str, str], set[int]] = {}
    for plan in result.plan.groups:
        for member in groups[plan.name].members:
            lost = {i for u, at in enumerate(member.indices) if u not in plan.kept for i in at}
            gone.setdefault((member.layer, member.side), set()).update(lost)
    compared = 0
    for name, layer in dense.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            continue
        now: Any = result.module.get_submodule(name)
        rows = torch.tensor(
            [i for i in range(len(layer.weight)) if i not in gone.get((name, "out"), ())]
        )
        for key, value in layer.state_dict().items():
            if value.ndim == 0:
                continue
            wanted = value[rows]
            width = value.shape[1] if value.ndim > 1 else 0
            lost = {i % width for i in gone.get((name, "in"), ())} if width > 1 else set()
            if lost:
                wanted = wanted[:, [i for i in range(width) if i not in lost]]
            assert torch.equal(now.state_dict()[key], wanted), f"{name}.{key}"
            compared += wanted.shape != value.shape
    assert compared > 5, "nothing shrank"


# --- no training ---------------------------------------------------------------------------------


@pytest.fixture
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a gradient, or takes a step of an optimiser, fails."""

    def fail(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    monkeypatch.setattr(torch.autograd, "backward", fail)
    monkeypatch.setattr(torch.autograd, "grad", fail)
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            monkeypatch.setattr(kind, "step", fail)


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_whole_pruning_without_a_gradient(make: Any) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(AssertionError, match="a gradient was asked for"):
        module(IMAGES[:2]).sum().backward()
    with pytest.raises(AssertionError, match="a gradient was asked for"):
        torch.optim.SGD(module.parameters(), lr=1.0).step()
    prepared = ready(module)
    result = prune(
        prepared, images=IMAGES, labels=LABELS, settings=SETTINGS, criterion="cswap",
        watcher=Silent(),
    )  # fmt: skip
    assert result.plan.refitted
    assert result.plan.pruned.params < result.plan.dense.params
    for side in (module, prepared.dense.module, prepared.module, result.module):
        assert all(p.grad is None and p.grad_fn is None for p in side.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


# --- the ridge -----------------------------------------------------------------------------------


def test_ridge_is_better_than_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last round steps tenfold up or down until neither side is better, and says so."""
    seen: list[dict[float | None, float]] = []
    effect, choose_ridge = Trials.effect, progressive.best_ridge

    def spy(self: Trials, gone: Any, moments: Any, *, ridge: float | None) -> Tensor:
        found = effect(self, gone, moments, ridge=ridge)
        if seen:
            seen[-1][ridge] = float(found.mean())
        return found

    def begin(*found: Any, ridge: float, effect: float | None, watcher: Any) -> Any:
        seen.append({} if effect is None else {ridge: effect})
        return choose_ridge(*found, ridge=ridge, effect=effect, watcher=watcher)

    monkeypatch.setattr(Trials, "effect", spy)
    monkeypatch.setattr(progressive, "best_ridge", begin)
    logs = run(replace(SETTINGS, rounds=2)).plan.rounds
    (tried,) = seen
    best = min(tried, key=lambda r: tried[r])
    assert logs[-1].ridge == best
    assert logs[-1].kl == tried[best]
    for neighbour in (best / 10, best * 10):
        inside = 1e-4 <= neighbour <= 1.0
        assert inside == any(r == pytest.approx(neighbour) for r in tried)


# --- afresh --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "better"), [(0.3, True), (0.1, False), (-0.3, False)])
def test_better_beyond_chance(gap: float, better: bool) -> None:
    """A hundred differences of standard deviation one have a mean that is known to a tenth."""
    one = torch.linspace(0, 3, 100, dtype=torch.float64)
    noise = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(50)
    assert clearly_less(one, one + noise + gap) is better


def test_last_round_can_undo_the_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a better set from the dense network on leaves is what that set alone leaves."""
    wanted: dict[str, list[int]] = {}
    earlier: dict[str, list[int]] = {}
    real = sets.start_afresh

    def best_of_all(trials: Trials, *rest: Any, **settings: Any) -> Any:
        earlier.update({name: [*units] for name, units in trials.removed.items()})
        found = real(trials, *rest, **settings)
        assert found is not None
        wanted.update(found.gone)
        return replace(found, effect=torch.full_like(found.effect, -1.0))

    settings = replace(SETTINGS, rounds=3, refit_producers=False)
    monkeypatch.setattr(progressive, "start_afresh", best_of_all)
    result = run(settings)
    kept = {g.name: set(range(g.units)) - set(g.kept) for g in result.plan.groups}
    assert {name: gone for name, gone in kept.items() if gone} == {
        name: set(units) for name, units in wanted.items()
    }
    back = {(n, u) for n, units in earlier.items() for u in units if u not in wanted.get(n, [])}
    assert back, "an earlier round had removed something that is there again"
    assert result.plan.rounds[-1].order.endswith(", afresh")

    alone = ready(small_cnn())
    take_out(alone.graph, alone.groups, wanted, {})
    order = torch.from_numpy(progressive.balanced_order(LABELS.numpy()))
    assert result.plan.rounds[-1].ridge is not None
    solve_behind(
        alone.graph, alone.dense, alone.groups, wanted, IMAGES[order],
        ridge=result.plan.rounds[-1].ridge, watcher=Silent(),
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(
            result.module(IMAGES), alone.module(IMAGES), rtol=1e-4, atol=1e-4
        )
