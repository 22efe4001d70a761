"""The loop: reaches the ratio, in rounds, the same every time, and goes on where it stopped."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import pictures, slow_effect, slow_means, small_cnn, small_vit
from torch import Tensor, nn

from cswap_deploy.causal.mixtures import lightly_mixed
from cswap_deploy.network.sizes import amount
from cswap_deploy.progress import Silent
from cswap_deploy.pruning.plan import Prepared, Pruned, prepare, prune
from cswap_deploy.pruning.rounds import balanced_order
from cswap_deploy.pruning.saved_rounds import RoundStore
from cswap_deploy.pruning.state import Settings, State
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.store import Store

IMAGES, LABELS = pictures(40)
SETTINGS = Settings(ratio=0.4, rounds=2, scoring_samples=10)


def run(
    module: nn.Module,
    settings: Settings = SETTINGS,
    *,
    round_to: int | str = 1,
    criterion: str = "cswap",
    **more: Any,
) -> Pruned:
    prepared = more.pop("prepared", None) or ready(module, settings, round_to)
    return prune(
        prepared, images=IMAGES, labels=LABELS, settings=settings, criterion=criterion,
        watcher=Silent(), **more,
    )  # fmt: skip


def ready(module: nn.Module, settings: Settings, round_to: int | str = 1) -> Prepared:
    return prepare(
        module, images=IMAGES, ratio=settings.ratio, ratio_of=settings.ratio_of, round_to=round_to
    )


def logits(module: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return module(images)


def half_a_bundle(prepared: Prepared, size: int = 1) -> float:
    """How far from its target a round may end: what is taken lands nearer than what is not."""
    groups = [g for g in prepared.groups if g.units > size]
    most = max(prepared.sizes.saving(g.name, range(size), "params") for g in groups)
    return most / prepared.dense_size.params / 2 + 1e-9


def without_times(plan: PrunePlan) -> dict[str, Any]:
    found = plan.model_dump(mode="json")
    for log in found["rounds"]:
        del log["seconds"]
    return found


# --- the ratio -----------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["params", "channels", "macs"])
@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.55])
@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_ratio_is_reached_within_a_bundle(make: Any, ratio: float, of: Any) -> None:
    settings = replace(SETTINGS, ratio=ratio, ratio_of=of)
    module = make()
    prepared = ready(module, settings)
    total = amount(prepared.dense_size, of)
    bundle = max(prepared.sizes.saving(g.name, [0], of) for g in prepared.groups)
    result = run(module, settings, prepared=prepared)
    # What is taken lands nearer than what is not: half a bundle at most.
    assert abs(result.plan.effective(of) - ratio) <= bundle / total / 2 + 1e-9
    counted = sum(p.numel() for p in result.module.parameters())
    assert result.plan.pruned.params == counted < result.plan.dense.params
    assert result.plan.dense.params == sum(p.numel() for p in module.parameters())
    kept = sum(len(g.kept) for g in result.plan.groups)
    assert result.plan.pruned.units == kept


@pytest.mark.parametrize("rounds", [1, 5, 25])
def test_any_number_of_rounds_reaches_the_ratio(rounds: int) -> None:
    """With 25 rounds a round is smaller than most units: some remove nothing, none goes too far."""
    settings = replace(SETTINGS, rounds=rounds, scoring_samples=5, refit=False)
    prepared = ready(small_cnn(), settings)
    near = half_a_bundle(prepared)
    result = run(small_cnn(), settings, prepared=prepared)
    assert result.plan.effective("params") == pytest.approx(0.4, abs=near)
    logs = result.plan.rounds
    assert [log.round for log in logs] == list(range(1, rounds + 1))
    assert sum(log.removed for log in logs) == sum(
        g.units - len(g.kept) for g in result.plan.groups
    )
    left = [log.params for log in logs]
    assert left == sorted(left, reverse=True)
    assert left[-1] == result.plan.pruned.params
    assert logs[0].measured == sum(g.units for g in result.plan.groups)
    assert all(log.measured < logs[0].measured for log in logs[1:])


def test_bundle_that_overshoots_the_last_target_early_ends_the_measuring() -> None:
    """Many small rounds of coarse bundles: one goes past the final ratio before the last round."""
    settings = replace(SETTINGS, ratio=0.5, ratio_of="macs", rounds=30, scoring_samples=5)
    plan = run(small_cnn(), settings, round_to=2).plan
    beyond = [log for log in plan.rounds if log.measured == 0]
    assert beyond, "this network and ratio do not overshoot any more: choose others"
    assert all(log.removed == 0 for log in beyond)
    assert plan.effective("macs") == pytest.approx(0.5, abs=0.06)


def test_rounds_take_equal_shares() -> None:
    settings = replace(SETTINGS, rounds=4)
    prepared = ready(small_cnn(), settings)
    near = half_a_bundle(prepared)
    result = run(small_cnn(), settings, prepared=prepared)
    dense = result.plan.dense.params
    for log in result.plan.rounds:
        assert 1 - log.params / dense == pytest.approx(0.1 * log.round, abs=near)


@pytest.mark.parametrize("round_to", [2, 4])
def test_kept_units_are_multiples(round_to: int) -> None:
    prepared = ready(small_cnn(), SETTINGS, round_to)
    near = half_a_bundle(prepared, round_to)
    result = run(small_cnn(), prepared=prepared)
    shrunk = [g for g in result.plan.groups if len(g.kept) < g.units]
    assert len(shrunk) >= 2
    for group in shrunk:
        assert len(group.kept) % round_to == 0, group.name
    assert result.plan.effective("params") == pytest.approx(0.4, abs=near)


def test_whole_heads_leave_and_round_to_is_for_channels() -> None:
    result = run(small_vit(), replace(SETTINGS, ratio_of="channels", ratio=0.5), round_to=4)
    heads = [g for g in result.plan.groups if g.kind == "heads"]
    neurons = [g for g in result.plan.groups if g.kind == "neurons"]
    assert all(1 <= len(g.kept) <= 3 for g in heads)
    assert all(len(g.kept) % 4 == 0 for g in neurons)
    for block, group in zip(result.module.blocks, heads, strict=True):
        assert block.attn.num_heads == len(group.kept)
        assert block.attn.qkv.out_features == 3 * 8 * len(group.kept)
        assert block.attn.scale == pytest.approx(8**-0.5), "whole heads keep the softmax's scale"


# --- what is removed -----------------------------------------------------------------------------


def test_useless_units_go_first() -> None:
    """Five channels that nothing reads are planted; a ratio of five channels removes just them."""
    module = small_cnn()
    useless = {"expand.0": [1, 6, 11], "out.0": [2, 9]}
    for layer in ("squeeze", "project.0"):
        module.get_submodule(layer).weight.data[:, useless["expand.0"]] = 0.0
    module.classifier.weight.data[:, useless["out.0"]] = 0.0
    before = logits(module)
    settings = replace(SETTINGS, ratio_of="channels", ratio=5 / 42, rounds=1, refit=False)
    result = run(module, settings)
    gone = {
        g.name: sorted(set(range(g.units)) - set(g.kept))
        for g in result.plan.groups
        if len(g.kept) < g.units
    }
    assert gone == useless
    torch.testing.assert_close(logits(result.module), before, rtol=1e-4, atol=1e-5)
    verdicts = {(g.name, e.unit): e.verdict for g in result.plan.groups for e in g.effects}
    assert {verdicts[name, u] for name, units in useless.items() for u in units} == {"neutral"}


@pytest.mark.parametrize("mix", [False, True])
def test_recorded_effects_are_the_slow_ones(mix: bool) -> None:
    """What the plan says of a unit is what the obvious computation says, in the first round."""
    module = small_cnn()
    settings = replace(SETTINGS, rounds=1, intervention="mean", mix=mix)
    prepared = ready(module, settings)
    groups = {g.name: g for g in prepared.groups}
    plan = run(module, settings, prepared=prepared).plan
    rows = torch.from_numpy(balanced_order(LABELS.numpy())[:10])
    shown = IMAGES[rows]
    if mix:  # every second half: its images' larger parts keep their labels
        shown = torch.cat([shown[:5], lightly_mixed(shown, seed=1)[5:]])
    layers = {c.layer for g in groups.values() for c in g.consumers}
    means = slow_means(module, layers, IMAGES)
    for entry in plan.groups:
        for effect in entry.effects[:3]:
            xi, kl = slow_effect(
                module, groups[entry.name], effect.unit, shown, LABELS[rows], means
            )
            assert effect.true_class == pytest.approx(float(xi.mean()), abs=1e-5)
            assert effect.kl == pytest.approx(float(kl.mean()), abs=1e-5)
            assert effect.low <= effect.true_class <= effect.high
            assert effect.round == 1


def test_later_rounds_measure_the_network_as_it_is_then() -> None:
    plan = run(small_cnn(), replace(SETTINGS, rounds=3, select="unit")).plan
    rounds = {e.round for g in plan.groups for e in g.effects}
    assert rounds == {1, 2, 3}
    for group in plan.groups:
        assert {e.unit for e in group.effects} == set(range(group.units))
        gone = set(range(group.units)) - set(group.kept)
        assert gone == {e.unit for e in group.effects if e.unit not in group.kept}


@pytest.mark.parametrize("settings", [{}, {"effect": "true-class", "intervention": "zero"}])
def test_no_unit_goes_on_an_old_effect(settings: dict[str, Any]) -> None:
    """Nothing makes up for what goes, so effects grow, and old ones would look small."""
    gone: dict[str, list[int]] = {}
    measured: list[int] = []

    def check(state: State, _: nn.Module) -> None:
        measured.append(state.rounds[-1].measured)
        for name, units in state.removed.items():
            now = set(units) - set(gone.get(name, ()))
            assert {state.measured[name][u].round for u in now} <= {state.round}
            gone[name] = [*units]

    whole = replace(SETTINGS, rounds=6, select="unit", refit=False, **settings)
    plan = run(small_cnn(), whole, checkpoint=check).plan
    assert sum(map(len, gone.values())) == sum(g.units - len(g.kept) for g in plan.groups)
    assert measured[0] == 42
    assert all(0 < count < 42 for count in measured[1:]), "the others are not measured for nothing"


def test_refit_and_means_bring_the_output_nearer() -> None:
    module = small_cnn()
    dense = logits(module)

    def distance(**settings: Any) -> float:
        result = run(module, replace(SETTINGS, **settings), criterion="magnitude")
        return float((logits(result.module) - dense).square().mean())

    plain = distance(intervention="zero", refit=False)
    mean = distance(intervention="mean", refit=False)
    refitted = distance(intervention="mean", refit=True)
    assert refitted < mean < plain
    assert refitted < plain / 4


def test_true_class_and_kl_may_choose_differently_and_zero_is_not_mean() -> None:
    plans = {
        (effect, intervention): run(
            small_cnn(), replace(SETTINGS, effect=effect, intervention=intervention)
        ).plan
        for effect in ("kl", "true-class")
        for intervention in ("zero", "mean")
    }
    kept = {key: tuple(g.kept for g in plan.groups) for key, plan in plans.items()}
    assert len(set(kept.values())) >= 3


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude-l1", "random"])
def test_baselines_reach_the_ratio_and_measure_nothing(criterion: str) -> None:
    settings = replace(SETTINGS, rounds=1, ratio_of="channels")
    plan = run(small_cnn(), settings, criterion=criterion).plan
    assert plan.effective("channels") == pytest.approx(0.4, abs=0.5 / 42)
    assert plan.criterion == criterion
    assert [log.measured for log in plan.rounds] == [0]
    assert not any(g.effects for g in plan.groups)


def test_network_of_the_caller_is_not_changed() -> None:
    module = small_cnn()
    before = copy.deepcopy(module.state_dict())
    run(module)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


# --- again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["cswap", "random"])
def test_same_seed_gives_the_same_plan_and_weights(criterion: str) -> None:
    first, second = run(small_cnn(), criterion=criterion), run(small_cnn(), criterion=criterion)
    assert without_times(first.plan) == without_times(second.plan)
    assert_same_weights(first.module, second.module)


def test_seed_matters_to_the_random_baseline() -> None:
    plans = [
        run(small_cnn(), replace(SETTINGS, seed=seed), criterion="random").plan for seed in (0, 1)
    ]
    assert [g.kept for g in plans[0].groups] != [g.kept for g in plans[1].groups]


@pytest.mark.parametrize("finished", [1, 2])
def test_interrupted_run_goes_on_to_the_same_result(tmp_path: Path, finished: int) -> None:
    settings = replace(SETTINGS, rounds=3)
    whole = run(small_cnn(), settings)

    rounds = RoundStore(Store(tmp_path), "a" * 64)

    def interrupt(state: State, module: nn.Module) -> None:
        rounds.save(state, module)
        if state.round == finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small_cnn(), settings, checkpoint=interrupt)

    prepared = ready(small_cnn(), settings)
    state = RoundStore(Store(tmp_path), "a" * 64).load(prepared.module, most=3)
    assert state is not None
    assert state.round == finished
    seen: list[int] = []
    resumed = run(
        small_cnn(), settings, prepared=prepared, state=state,
        checkpoint=lambda state, module: seen.append(state.round),
    )  # fmt: skip
    assert seen == list(range(finished + 1, 4)), "only what was left"
    assert without_times(resumed.plan) == without_times(whole.plan)
    assert_same_weights(resumed.module, whole.module)


def test_rounds_of_another_pruning_are_not_taken(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(small_cnn(), checkpoint=RoundStore(store, "a" * 64).save)
    module = ready(small_cnn(), SETTINGS).module
    assert RoundStore(store, "b" * 64).load(module, most=2) is None
    found = RoundStore(store, "a" * 64).load(module, most=2)
    assert found is not None
    assert found.round == 2


def test_damaged_round_is_not_taken(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(small_cnn(), checkpoint=RoundStore(store, "a" * 64).save)
    (latest,) = [p for p in tmp_path.rglob("state.json") if '"round":2' in p.read_text()[:20]]
    latest.write_text(latest.read_text().replace('"round":2', '"round":7', 1))
    found = RoundStore(store, "a" * 64).load(ready(small_cnn(), SETTINGS).module, most=2)
    assert found is not None
    assert found.round == 1
    assert len(store.damaged) == 1


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


# --- images --------------------------------------------------------------------------------------


def test_every_prefix_of_the_order_is_balanced() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [10, 10, 10]))
    order = balanced_order(labels)
    assert sorted(order.tolist()) == list(range(30))
    for n in range(3, 31):
        counts = np.bincount(labels[order[:n]], minlength=3)
        assert counts.max() - counts.min() <= 1
