"""Which units go: allocations, candidates, trials, and the candidate whose effect is least."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_models
import torch
import torch.nn.functional as F
from small_networks import ground_of, pictures, small_cnn, small_vit, targets_of
from torch import nn

from cswap_deploy.causal.interventions import input_moments
from cswap_deploy.causal.mixtures import lightly_mixed
from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration
from cswap_deploy.data.sampling import balanced_order
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.units import consumers
from cswap_deploy.progress import Silent
from cswap_deploy.pruning import rounds
from cswap_deploy.pruning.allocation import Goal, Limits, Ranking, Removal, Values
from cswap_deploy.pruning.candidates import (
    Choice,
    best_candidate,
    best_from_dense,
    branches_in_turn,
    proposals,
    rankings,
    search_branches,
)
from cswap_deploy.pruning.importance import View
from cswap_deploy.pruning.prepare import Prepared, prepare
from cswap_deploy.pruning.prune import Pruned, prune
from cswap_deploy.pruning.state import RoundStore, State
from cswap_deploy.pruning.trials import Trial, Trials, less_beyond_chance, refit_behind, remove

IMAGES, LABELS = pictures(40)
CALIBRATION = Calibration(IMAGES, LABELS)
SETTINGS = {
    "rounds": 2, "scoring_samples": 10, "round_to": 1, "measuring": "exact", "branches": False,
}  # fmt: skip


def asked(**settings: Any) -> PruneConfig:
    return PruneConfig(**(SETTINGS | settings))


@cache
def traced(make: Callable[[], nn.Module]) -> Prepared:
    return prepare(make(), IMAGES, asked())


def ready(make: Callable[[], nn.Module]) -> Prepared:
    return traced(make).copy()


def run(module: nn.Module, **settings: Any) -> Pruned:
    return prune(module, CALIBRATION, config=asked(**settings), progress=Silent())


def goal(
    prepared: Prepared,
    *,
    left: float,
    of: Any = "channels",
    alignment: int = 1,
    removed: Removal | None = None,
    split: bool = False,
) -> Goal:
    """So large a part of what is there is to be left; one unit of each group at least."""
    names = [g.name for g in prepared.groups]
    sizes = copy.deepcopy(prepared.sizes)
    for name, units in (removed or {}).items():
        sizes.remove(name, units)
    return Goal(
        groups=prepared.groups,
        limits=Limits(dict.fromkeys(names, alignment), dict.fromkeys(names, 1)),
        sizes=sizes,
        removed=removed or {},
        of=of,
        target=left * sizes.size().amount(of),
        split=split,
    )


def random_values(prepared: Prepared, seed: int) -> Values:
    rng = np.random.default_rng(seed)
    return {g.name: rng.random(g.units) for g in prepared.groups}


def view(prepared: Prepared) -> View:
    return View(prepared.graph, prepared.groups, CALIBRATION, np.random.default_rng(0))


def gone(pruned: Pruned) -> dict[str, set[int]]:
    """Group -> the units that went, where any did."""
    found = {g.name: set(range(g.units)) - set(g.kept) for g in pruned.plan.groups}
    return {name: units for name, units in found.items() if units}


# --- allocations ---------------------------------------------------------------------------------


def test_uniform_takes_the_same_fraction_of_each_group() -> None:
    """However different the values of the groups are."""
    prepared = ready(small_cnn)
    rng = np.random.default_rng(0)
    values = {g.name: 10.0**i * rng.random(g.units) for i, g in enumerate(prepared.groups)}
    half = goal(prepared, left=0.5)

    def fractions(removal: Removal) -> list[float]:
        return [len(removal.get(g.name, [])) / g.units for g in prepared.groups]

    chosen = half.choose(half.uniform(values))
    assert fractions(chosen) == pytest.approx([0.5] * len(prepared.groups), abs=1 / 8 + 1e-9)
    for group in prepared.groups:
        lowest = np.argsort(values[group.name])[: len(chosen[group.name])]
        assert sorted(chosen[group.name]) == sorted(lowest.tolist())
    assert max(fractions(half.choose(Ranking(values)))) > 0.7, "by values alone it is not uniform"


def test_uniform_counts_what_is_gone_already() -> None:
    prepared = ready(small_cnn)
    group = next(g for g in prepared.groups if g.units == 12)
    values = {g.name: np.arange(g.units, dtype=float) for g in prepared.groups}
    ranking = goal(prepared, left=0.5, removed={group.name: [0, 1, 2]}).uniform(values)
    assert not ranking.per_saving
    assert ranking.values[group.name][3:].tolist() == pytest.approx(
        [(3 + i + 0.5) / 12 for i in range(9)]
    )


def test_layer_adaptive_takes_as_many_of_each_group_in_its_own_order() -> None:
    prepared = ready(small_cnn)
    mine, other = random_values(prepared, 2), random_values(prepared, 3)
    first = prepared.groups[0].name
    start = goal(prepared, left=0.6, removed={first: [int(np.argmin(mine[first]))]})
    theirs = start.choose(Ranking(other, per_saving=False))
    ours = start.choose(start.layer_adaptive(mine, other))
    assert {n: len(units) for n, units in ours.items()} == {n: len(u) for n, u in theirs.items()}
    assert ours != theirs
    for group in prepared.groups:
        order = sorted(start.remaining(group), key=lambda u: mine[group.name][u])
        assert set(ours.get(group.name, [])) == set(order[: len(ours.get(group.name, []))])


@pytest.mark.parametrize("of", ["params", "channels", "macs"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_what_is_chosen_meets_the_target_within_the_limits(make: Any, split: bool, of: Any) -> None:
    prepared = ready(make)
    first = prepared.groups[0].name
    start = goal(prepared, left=0.6, of=of, alignment=2, removed={first: [1]}, split=split)
    before = start.sizes.size()
    chosen = start.choose(Ranking(random_values(prepared, 1)))
    assert chosen
    assert start.sizes.size() == before, "the network's own sizes stay"
    assert start.removed == {first: [1]}
    sizes = copy.deepcopy(start.sizes)
    for group in prepared.groups:
        units = chosen.get(group.name, [])
        assert len(units) == len(set(units)), "nothing goes twice"
        assert set(units) <= set(start.remaining(group))
        left = len(start.remaining(group)) - len(units)
        assert left >= 1
        if units and not split:
            assert left % 2 == 0
        sizes.remove(group.name, units)
    assert sizes.size().amount(of) == pytest.approx(start.target, abs=0.13 * start.target / 0.6)


# --- candidates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_candidate_with_the_least_effect_as_a_whole_is_taken(make: Any) -> None:
    """Every candidate is removed by hand; without refit its divergence can be computed."""
    result = run(make(), rounds=1, refit=False, ratio=0.3)
    (log,) = result.plan.rounds
    prepared = ready(make)
    effects = {g.name: np.array([e.kl for e in g.effects]) for g in result.plan.groups}
    start = Goal(
        prepared.groups, prepared.limits, prepared.sizes, {}, "params",
        target=0.7 * prepared.dense_size.params,
    )  # fmt: skip
    candidates = start.candidates(rankings(start, effects, proposals(view(prepared))))
    assert len(candidates) >= 2, "nothing to compare"
    moments = input_moments(
        prepared.graph, consumers(prepared.groups), IMAGES, intervention="predicted", chunk=64
    )
    unseen = IMAGES[20:]
    unseen = torch.cat([unseen, lightly_mixed(unseen, seed=0), lightly_mixed(unseen, seed=1)])

    def divergence(module: nn.Module) -> float:
        with torch.no_grad():
            p = F.log_softmax(make()(unseen).double(), 1)
            q = F.log_softmax(module(unseen).double(), 1)
        return F.kl_div(q, p, log_target=True, reduction="batchmean").item()

    found = {}
    for name, units in candidates.items():
        trial = prepared.copy()
        remove(trial, units, moments)
        found[name] = divergence(trial.module)
    assert log.candidate == min(found, key=lambda name: found[name])
    assert log.kl == pytest.approx(found[log.candidate], rel=1e-3, abs=1e-6)
    assert gone(result) == {n: set(units) for n, units in candidates[log.candidate].items()}
    assert divergence(result.module) == pytest.approx(found[log.candidate], rel=1e-3, abs=1e-6)


def test_all_importances_propose_as_they_are_uniform_together_and_with_streams_whole() -> None:
    prepared = ready(small_cnn)
    start = goal(prepared, left=0.5)
    found = rankings(start, random_values(prepared, 0), proposals(view(prepared)))
    assert found.keys() == {
        "effect", "effect, uniform", "effect, lamp", "magnitude", "magnitude, uniform", "lamp",
        "together, uniform", "magnitude, streams whole", "magnitude, uniform, streams whole",
        "lamp, streams whole",
    }  # fmt: skip
    counted = {name for name, ranking in found.items() if ranking.per_saving}
    assert counted == {"effect", "magnitude", "magnitude, streams whole"}


def test_streams_stay_whole_as_long_as_the_target_is_met_without_them() -> None:
    prepared = ready(small_cnn)
    streams = {g.name for g in prepared.groups if g.stream}
    assert streams
    assert streams != {g.name for g in prepared.groups}
    for left, untouched in (0.9, True), (0.3, False):
        start = goal(prepared, left=left)
        found = rankings(start, random_values(prepared, 0), proposals(view(prepared)))
        gone = start.choose(found["magnitude, uniform, streams whole"])
        assert (not gone.keys() & streams) is untouched
        alike = start.choose(found["magnitude, uniform"])
        assert alike.keys() & streams


def test_branches_are_proposed_by_their_effect_alone_and_beside_it_nothing_but_width() -> None:
    prepared = prepare(small_cnn(), IMAGES, asked(branches=True))
    (branch,) = [g.name for g in prepared.groups if g.kind == "branch"]
    start = replace(goal(prepared, left=0.5), limits=prepared.limits)
    proposed = proposals(view(prepared))
    effects = random_values(prepared, 0) | {branch: np.array([1e-9])}
    found = {n: start.choose(r) for n, r in rankings(start, effects, proposed).items()}
    assert branch not in found["effect, no branches"]
    assert {name for name, units in found.items() if branch in units} == {
        "effect", "effect, branches sooner", "effect, branches first",
    }  # fmt: skip


def test_by_unit_nothing_is_tried_and_the_same_is_measured() -> None:
    by_unit = run(small_cnn(), rounds=1, select="unit", refit=False).plan
    assert [(log.candidate, log.kl) for log in by_unit.rounds] == [("effect", None)]
    by_set = run(small_cnn(), rounds=1, refit=False).plan
    assert by_set.rounds[0].kl is not None
    assert [g.effects for g in by_unit.groups] == [g.effects for g in by_set.groups]
    # What goes is what has the least effect for what it saves.
    assert sum(g.units - len(g.kept) for g in by_unit.groups) == by_unit.rounds[0].removed


# --- the method as published ---------------------------------------------------------------------


def test_paper_adds_no_compensation_to_any_weight() -> None:
    """What is left is what was there, number for number."""
    dense = small_cnn()
    result = run(small_cnn(), method="paper")
    assert result.plan.effective("params") == pytest.approx(0.4, abs=0.07)
    assert result.plan.refitted == ()
    assert result.plan.biased == ()
    groups = {g.name: g for g in ready(small_cnn).groups}
    lost_at: dict[tuple[str, int], set[int]] = {}
    for plan in result.plan.groups:
        for member in groups[plan.name].members:
            lost = {i for u, at in enumerate(member.indices) if u not in plan.kept for i in at}
            lost_at.setdefault((member.tensor, member.dim), set()).update(lost)
    compared = 0
    for name, layer in dense.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            continue
        now: Any = result.module.get_submodule(name)
        rows = torch.tensor(
            [i for i in range(len(layer.weight)) if i not in lost_at.get((f"{name}.weight", 0), ())]
        )
        for key, value in layer.state_dict().items():
            if value.ndim == 0:
                continue
            wanted = value[rows]
            width = value.shape[1] if value.ndim > 1 else 0
            lost = lost_at.get((f"{name}.weight", 1), set()) if width > 1 else set()
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
    result = run(module)
    assert all(p.requires_grad for p in module.parameters())
    assert module.state_dict().keys() == before.keys()
    assert result.plan.refitted
    assert result.plan.pruned.params < result.plan.dense.params
    for side in (module, result.module):
        assert all(p.grad is None and p.grad_fn is None for p in side.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


# --- screening ---------------------------------------------------------------------------------


def test_only_the_best_of_the_screened_candidates_are_refitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = ready(small_cnn)
    moments = input_moments(
        prepared.graph, consumers(prepared.groups), IMAGES, intervention="predicted", chunk=64
    )
    start = goal(prepared, left=0.6)
    given = {str(seed): Ranking(random_values(prepared, seed)) for seed in (3, 1, 2)}
    sets = start.candidates(given)
    assert len(sets) == 3
    tried = []

    def trial(self: Trials, gone: Removal, *args: Any, **settings: Any) -> Any:
        tried.append(gone)
        return whole(self, gone, *args, **settings)

    whole = Trials.trial
    monkeypatch.setattr(Trials, "trial", trial)
    trials = Trials(prepared, {}, ground_of(prepared.dense, IMAGES))
    choice = best_candidate(trials, start, given, moments, progress=Silent())
    by_screening = sorted(sets, key=lambda name: trials.screen(sets[name], moments))
    assert tried == [sets[name] for name in by_screening[:2]]
    effects = {n: whole(trials, sets[n], moments).effect for n in by_screening[:2]}
    assert choice.name == min(effects, key=lambda name: float(effects[name].mean()))
    assert choice.effect == float(effects[choice.name].mean())
    tried.clear()  # without ablation values nothing but the refit makes up for what is gone
    best_candidate(trials, start, given, {}, progress=Silent())
    assert tried == list(sets.values())


def test_screening_leaves_the_network_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = ready(small_cnn)
    moments = input_moments(
        prepared.graph, consumers(prepared.groups), IMAGES, intervention="predicted", chunk=64
    )
    gone = {g.name: [0, 2] for g in prepared.groups}
    dense = prepared.dense  # what candidates from the dense network are screened on
    for network in (prepared, replace(prepared, graph=dense)):
        before = copy.deepcopy(network.module.state_dict())
        trials = Trials(network, {}, ground_of(dense, IMAGES))
        effect = trials.screen(gone, moments)
        assert effect > 0
        assert trials.screen(gone, moments) == effect
        masked = network.on(copy.deepcopy(network.module))
        remove(masked, gone, moments)
        assert effect == float(trials.ground.divergence(masked.graph, parts=1).mean())
        with monkeypatch.context() as m:
            m.setattr(Graph, "run", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                trials.screen(gone, moments)
        assert all(torch.equal(v, before[k]) for k, v in network.module.state_dict().items())


# --- from the dense network ----------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "better"), [(0.3, True), (0.1, False), (-0.3, False)])
def test_better_beyond_chance(gap: float, better: bool) -> None:
    """A hundred differences of standard deviation one have a mean that is known to a tenth."""
    one = torch.linspace(0, 3, 100, dtype=torch.float64)
    noise = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(50)
    assert less_beyond_chance(one, one + noise + gap) is better


def test_last_round_tries_two_as_they_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """With producers, which only the last refit reconstructs: those that meet in the end."""
    tried: list[tuple[bool, float]] = []
    trial = Trials.trial

    def noted(trials: Trials, *args: Any) -> Trial:
        found = trial(trials, *args)
        tried.append((trials.producers, float(found.effect.mean())))
        return found

    monkeypatch.setattr(Trials, "trial", noted)
    last = run(small_cnn(), rounds=2).plan.rounds[-1]
    with_producers = [effect for producers, effect in tried if producers]
    assert [producers for producers, _ in tried] == sorted(producers for producers, _ in tried)
    assert len(tried) - len(with_producers) >= 4, "two in each round"
    assert len(with_producers) == 3, "two from the dense network, and the rounds' own"
    assert last.kl == pytest.approx(min(with_producers))
    tried.clear()
    run(small_cnn(), rounds=2, refit_producers=False)
    assert tried
    assert not any(producers for producers, _ in tried)


class Watched(RoundStore):
    """Keeps what each round had removed, and nothing more."""

    def __init__(self) -> None:
        self.removed: list[Removal] = []

    def load(self, module: nn.Module, path: Sequence[float]) -> None:
        """Nothing is kept."""

    def save(self, state: State, module: nn.Module, path: Sequence[float]) -> None:
        self.removed.append(copy.deepcopy(state.removed))


@pytest.mark.parametrize("better", [False, True])
def test_last_round_can_undo_the_earlier_ones(
    better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate from the dense network on, where its mean is lower, alone shapes the result."""
    means = []

    def shifted(*args: Any, **kwargs: Any) -> Choice:
        """The real candidate, its trial moved to the side that is wanted."""
        found = best_from_dense(*args, **kwargs)
        assert found.trial is not None
        effect = found.trial.effect + (-10 if better else 10)
        means.append(float(effect.mean()))
        return replace(found, trial=replace(found.trial, effect=effect))

    monkeypatch.setattr(rounds, "best_from_dense", shifted)
    pixels, labels = small_models.pictures(64)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    truth = torch.from_numpy(labels)
    watched = Watched()
    config = PruneConfig(
        ratio=0.6,
        rounds=2,
        scoring_samples=32,
        measuring="adaptive",
        ratio_of="macs",
        refit_producers=False,
    )
    result = prune(
        small_models.small(), Calibration(images, truth), config=config, rounds=watched,
        progress=Silent(),
    )  # fmt: skip
    last = result.plan.rounds[-1]
    [from_dense] = means
    if not better:
        assert last.kl is not None
        assert 0 <= last.kl < from_dense
        assert not str(last.candidate).endswith("from dense")
        return
    assert last.kl == pytest.approx(from_dense)
    assert last.candidate == "magnitude, uniform, from dense", "choose a network where one wins"
    first, second = watched.removed
    back = {(n, u) for n, units in first.items() for u in units if u not in second.get(n, [])}
    assert back, "an earlier round had removed something that is there again"

    alone = prepare(small_models.small(), images, config)
    start = Goal(
        alone.groups, alone.limits, alone.sizes, {}, "macs",
        target=0.4 * alone.dense_size.macs, split=True,
    )  # fmt: skip
    wanted = start.choose(start.uniform(proposals(view(alone))["magnitude"]))
    assert gone(result) == {name: set(units) for name, units in wanted.items()}
    remove(alone, wanted, {})
    order = torch.from_numpy(balanced_order(labels))
    targets = targets_of(alone.dense, images[order])
    refit_behind(alone, wanted, targets, most_bytes=1 << 30, progress=Silent())
    with torch.no_grad():
        torch.testing.assert_close(
            result.module(images), alone.module(images), rtol=1e-4, atol=1e-4
        )


class Told:
    """A fake: what a set of branches does is known, and width does nothing."""

    ground = SimpleNamespace(possible=True)

    def __init__(self, effects: dict[frozenset[str], float]) -> None:
        self.effects, self.tried = effects, 0

    def screen(self, gone: Removal, _moments: Any) -> float:
        return self.effects.get(frozenset(name for name in gone if name in self.names), 9.0)

    def trial(self, gone: Removal, moments: Any) -> Trial:
        self.tried += 1
        noise = torch.linspace(-0.01, 0.01, 50, dtype=torch.float64)
        return Trial(self.screen(gone, moments) + noise, nn.Identity(), None)

    names: frozenset[str] = frozenset()


def test_branches_go_and_stay_together_where_that_is_better() -> None:
    """From one branch to another pair, one at a time."""
    prepared = prepare(small_vit(), CALIBRATION.images, PruneConfig(round_to=1))
    branches = frozenset(g.name for g in prepared.groups if g.kind == "branch")
    a, b, c = sorted(branches)[:3]
    found = {(): 1.0, (a,): 0.5, (a, b): 0.4, (b,): 0.3, (b, c): 0.1, (c,): 0.8, (a, c): 0.7}
    trials = Told({frozenset(names): effect for names, effect in found.items()})
    trials.names = branches
    start = replace(goal(prepared, left=0.6, of="macs"), limits=prepared.limits)
    values = {
        name: np.full(1, 0.0 if name == a else np.inf) if name in branches else value
        for name, value in random_values(prepared, 0).items()
    }
    first = start.choose(Ranking(values))
    assert first.keys() & branches == {a}
    tried = trials.trial(first, {})
    choice = Choice("start", first, {}, tried, start, Ranking(values))
    best = search_branches(trials, start, choice, {}, progress=Silent())  # type: ignore[arg-type]
    assert best.gone.keys() & branches == {b, c}
    assert best.effect == pytest.approx(0.1)
    assert best.gone == start.choose(best.ranking), "and it can be had at another target"


def test_branches_are_counted_with_those_that_go_before_them() -> None:
    """Two that carry the same are harmless, each of them; a third is dearer alone, not after."""
    prepared = prepare(small_vit(), CALIBRATION.images, PruneConfig(round_to=1))
    branches = [g.name for g in prepared.groups if g.kind == "branch"]
    start = replace(goal(prepared, left=0.1, of="channels"), limits=prepared.limits)
    worth = {g.name: start.worth(g) for g in prepared.groups}
    one, twin, third = branches[:3]
    alone = {one: 0.01, twin: 0.02, third: 0.05} | dict.fromkeys(branches[3:], 0.5)
    trials = Told({})
    trials.names = frozenset(branches)
    for count in range(len(branches) + 1):
        for gone in map(frozenset, combinations(branches, count)):
            both = 0.2 * worth[twin] * ({one, twin} <= gone)
            trials.effects[gone] = 0.1 + both + sum(alone[name] * worth[name] for name in gone)
    values = random_values(prepared, 0) | {n: np.full(1, alone[n] * worth[n]) for n in branches}
    found = branches_in_turn(trials, start, values, {}, Silent())  # type: ignore[arg-type]
    cost = {name: float(found[name][0]) / worth[name] for name in branches}
    assert cost == pytest.approx(alone | {twin: 0.22})
    assert all(found[group.name] is values[group.name] for group in start.layers)


class Alike:
    """A fake: every candidate has nearly the same effect."""

    ground = SimpleNamespace(possible=True)

    def __init__(self, worse: float) -> None:
        self.effects = iter((1.0, worse))

    def trial(self, *_: Any) -> Trial:
        return Trial(torch.full((4,), next(self.effects), dtype=torch.float64), nn.Identity(), None)


@pytest.mark.parametrize("second_is_faster", [True, False])
@pytest.mark.parametrize("worse", [1.005, 1.2])
def test_of_equal_effects_the_faster_one_goes(second_is_faster: bool, worse: float) -> None:
    prepared = ready(small_cnn)
    start = goal(prepared, left=0.8, of="channels")
    found = [Ranking(random_values(prepared, seed)) for seed in range(2)]
    found.sort(key=lambda ranking: -start.without(start.choose(ranking)).macs)
    slow, fast = found
    first, second = (slow, fast) if second_is_faster else (fast, slow)
    trials = Alike(worse)
    choice = best_candidate(
        trials,
        start,
        {"first": first, "second": second},
        {},
        progress=Silent(),  # type: ignore[arg-type]
    )
    assert choice.name == ("second" if second_is_faster and worse < 1.01 else "first")


class Padded:
    """A fake: what a call takes falls by one where so many units are gone."""

    def __init__(self, *stairs: int) -> None:
        self.stairs = stairs

    def saving(self, _group: str, units: Sequence[int], _of: str) -> float:
        return sum(len(units) >= stair for stair in self.stairs)


@pytest.mark.parametrize(
    ("stairs", "counts"),
    [((16, 32, 48), [16, 16, 16]), ((8, 16, 24, 32, 40, 48, 56), [8] * 7), ((16,), [16])],
)
def test_steps_end_where_the_device_saves_time(stairs: tuple[int, ...], counts: list[int]) -> None:
    """Widths that are padded to sixteen, to eight; and what saves nothing further down."""
    (group,) = [g for g in traced(small_cnn).groups if g.kind != "branch"][:1]
    group = replace(group, root_indices=tuple((unit,) for unit in range(64)))
    limits = Limits({group.name: 8}, {group.name: 8})
    start = Goal((group,), limits, Padded(*stairs), {}, "latency", 0.0)  # type: ignore[arg-type]
    steps = start.steps[group.name]
    assert [count for count, _ in steps[: len(counts)]] == counts
    assert all(saved == pytest.approx(1.0) for _, saved in steps[: len(counts)])
    assert all(saved < 1e-3 for _, saved in steps[len(counts) :])
    assert start.worth(group) == pytest.approx(1 / counts[0])
