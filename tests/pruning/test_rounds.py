"""The loop: reaches the ratio, in rounds, the same every time, and goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import pictures, slow_effect, slow_means, small_cnn, small_vit
from torch import Tensor, nn

from cswap_deploy.causal.mixtures import lightly_mixed
from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration
from cswap_deploy.data.sampling import balanced_order
from cswap_deploy.progress import Silent
from cswap_deploy.pruning.job import ratios_by_round
from cswap_deploy.pruning.prepare import Prepared, prepare
from cswap_deploy.pruning.prune import Pruned, prune
from cswap_deploy.pruning.state import RoundStore, State
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.store import Store

IMAGES, LABELS = pictures(40)
SETTINGS = {"rounds": 2, "scoring_samples": 10, "round_to": 1, "measuring": "exact"}


def asked(**settings: Any) -> PruneConfig:
    return PruneConfig(**(SETTINGS | settings))


@cache
def traced(make: Callable[[], nn.Module], round_to: int) -> Prepared:
    return prepare(make(), IMAGES, asked(round_to=round_to))


def ready(make: Callable[[], nn.Module], round_to: int = 1) -> Prepared:
    return traced(make, round_to).copy()


def run(
    module: nn.Module, *, seed: int = 0, store: RoundStore | None = None, **settings: Any
) -> Pruned:
    return prune(
        module, Calibration(IMAGES, LABELS), config=asked(**settings), seed=seed,
        rounds=store, progress=Silent(),
    )  # fmt: skip


def path_of(ratio: float, rounds: int) -> tuple[float, ...]:
    return ratios_by_round(PruneConfig(ratio=ratio), rounds)


class Watched(RoundStore):
    """Shows every finished round to a function, and keeps none."""

    def __init__(self, see: Callable[[State], None]) -> None:
        self.see = see

    def load(self, module: nn.Module, path: Sequence[float]) -> None:
        """Nothing is kept."""

    def save(self, state: State, module: nn.Module, path: Sequence[float]) -> None:
        self.see(state)


def logits(module: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return module(images)


def half_a_step(prepared: Prepared, size: int = 1) -> float:
    """How far from its target a round may end: what is taken lands nearer than what is not."""
    groups = [g for g in prepared.groups if g.units > size]
    most = max(prepared.sizes.saving(g.name, range(size), "params") for g in groups)
    return most / prepared.dense_size.params / 2 + 1e-9


def without_times(plan: PrunePlan) -> dict[str, Any]:
    found = plan.model_dump(mode="json")
    for log in found["rounds"]:
        del log["seconds"]
    return found


@pytest.fixture(scope="module")
def whole() -> Pruned:
    """Three rounds without an interruption."""
    return run(small_cnn(), rounds=3)


# --- the ratio -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "ratio", "of"),
    [(small_cnn, 0.15, "channels"), (small_cnn, 0.55, "macs"), (small_vit, 0.15, "macs"),
     (small_vit, 0.55, "params")],
)  # fmt: skip
def test_ratio_is_reached_within_a_step(make: Any, ratio: float, of: Any) -> None:
    module = make()
    prepared = ready(make)
    total = prepared.dense_size.amount(of)
    step = max(prepared.sizes.saving(g.name, [0], of) for g in prepared.groups)
    result = run(module, ratio=ratio, ratio_of=of)
    # What is taken lands nearer than what is not: half a step at most.
    assert abs(result.plan.effective(of) - ratio) <= step / total / 2 + 1e-9
    counted = sum(p.numel() for p in result.module.parameters())
    assert result.plan.pruned.params == counted < result.plan.dense.params
    assert result.plan.dense.params == sum(p.numel() for p in module.parameters())
    kept = sum(len(g.kept) for g in result.plan.groups)
    assert result.plan.pruned.units == kept


def test_any_number_of_rounds_reaches_the_ratio() -> None:
    """A round is smaller than most units: some remove nothing, none goes too far."""
    near = half_a_step(ready(small_cnn))
    rounds = 25
    result = run(small_cnn(), rounds=rounds, scoring_samples=5, refit=False)
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


def test_step_that_overshoots_the_last_target_early_ends_the_measuring() -> None:
    """Many small rounds of coarse steps: one goes past the final ratio before the last round."""
    plan = run(
        small_cnn(), ratio=0.5, ratio_of="macs", rounds=30, scoring_samples=5, round_to=2,
        refit=False, select="unit",
    ).plan  # fmt: skip
    beyond = [log for log in plan.rounds if log.measured == 0]
    assert beyond, "this network and ratio do not overshoot any more: choose others"
    assert all(log.removed == 0 for log in beyond)
    assert plan.effective("macs") == pytest.approx(0.5, abs=0.06)


def test_rounds_take_equal_shares(whole: Pruned) -> None:
    near = half_a_step(ready(small_cnn))
    dense = whole.plan.dense.params
    assert len(whole.plan.rounds) == 3
    for log in whole.plan.rounds:
        assert 1 - log.params / dense == pytest.approx(0.4 / 3 * log.round, abs=near)


def test_kept_units_are_multiples() -> None:
    round_to = 4
    near = half_a_step(ready(small_cnn, round_to=round_to), round_to)
    result = run(small_cnn(), round_to=round_to)
    shrunk = [g for g in result.plan.groups if len(g.kept) < g.units]
    assert len(shrunk) >= 2
    for group in shrunk:
        assert len(group.kept) % round_to == 0, group.name
    assert result.plan.effective("params") == pytest.approx(0.4, abs=near)


def test_whole_heads_leave_and_round_to_is_for_channels() -> None:
    result = run(small_vit(), ratio_of="channels", ratio=0.5, round_to=4)
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
    result = run(module, ratio_of="channels", ratio=5 / 42, rounds=1, refit=False)
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
    groups = {g.name: g for g in ready(small_cnn).groups}
    plan = run(module, rounds=1, intervention="mean", mix=mix, select="unit", refit=False).plan
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
    plan = run(small_cnn(), rounds=3, select="unit", refit=False).plan
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

    def check(state: State) -> None:
        measured.append(state.rounds[-1].measured)
        for name, units in state.removed.items():
            now = set(units) - set(gone.get(name, ()))
            assert {state.effects[name][u].round for u in now} <= {state.round}
            gone[name] = [*units]

    plan = run(
        small_cnn(), store=Watched(check), rounds=6, select="unit", refit=False, **settings
    ).plan
    assert sum(map(len, gone.values())) == sum(g.units - len(g.kept) for g in plan.groups)
    assert measured[0] == 42
    assert all(0 < count < 42 for count in measured[1:]), "the others are not measured for nothing"


def test_refit_and_means_bring_the_output_nearer() -> None:
    module = small_cnn()
    dense = logits(module)

    def distance(**settings: Any) -> float:
        result = run(module, criterion="magnitude", **settings)
        return float((logits(result.module) - dense).square().mean())

    plain = distance(intervention="zero", refit=False)
    mean = distance(intervention="mean", refit=False)
    refitted = distance(intervention="mean", refit=True)
    assert refitted < mean < plain
    assert refitted < plain / 4


def test_true_class_and_kl_may_choose_differently_and_zero_is_not_mean() -> None:
    plans = {
        (effect, intervention): run(
            small_cnn(), effect=effect, intervention=intervention, select="unit", refit=False
        ).plan
        for effect in ("kl", "true-class")
        for intervention in ("zero", "mean")
    }
    kept = {key: tuple(g.kept for g in plan.groups) for key, plan in plans.items()}
    assert len(set(kept.values())) >= 3


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude-l1", "lamp", "random"])
def test_importances_without_images_take_one_round_and_measure_nothing(criterion: str) -> None:
    plan = run(small_cnn(), rounds=3, ratio_of="channels", criterion=criterion).plan
    assert plan.effective("channels") == pytest.approx(0.4, abs=0.5 / 42)
    assert plan.criterion == criterion
    assert [(log.candidate, log.measured) for log in plan.rounds] == [(criterion, 0)]
    assert not any(g.effects for g in plan.groups)


# --- again ---------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_plan_and_weights() -> None:
    first, second, other = (run(small_cnn(), seed=s, criterion="random") for s in (0, 0, 1))
    assert without_times(first.plan) == without_times(second.plan)
    assert_same_weights(first.module, second.module)
    assert [g.kept for g in first.plan.groups] != [g.kept for g in other.plan.groups]


class Interrupted(RoundStore):
    """Stops the run once it has kept two rounds."""

    def save(self, state: State, module: nn.Module, path: Sequence[float]) -> None:
        super().save(state, module, path)
        if state.round == 2:
            raise KeyboardInterrupt


def test_interrupted_run_goes_on_to_the_same_result(whole: Pruned, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(small_cnn(), rounds=3, store=Interrupted(Store(tmp_path), "a" * 64))

    rounds = RoundStore(Store(tmp_path), "a" * 64)
    kept = rounds.load(ready(small_cnn).module, path_of(0.4, 3))
    assert kept is not None
    assert kept.round == 2
    resumed = run(small_cnn(), rounds=3, store=rounds)
    times = [log.seconds for log in resumed.plan.rounds[:2]]
    assert times == [log.seconds for log in kept.rounds], "these rounds did not run again"
    assert without_times(resumed.plan) == without_times(whole.plan)
    assert_same_weights(resumed.module, whole.module)


def test_rounds_of_another_pruning_and_damaged_ones_are_not_taken(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(small_cnn(), store=RoundStore(store, "a" * 64), refit=False)
    module = ready(small_cnn).module
    assert RoundStore(store, "b" * 64).load(module, path_of(0.4, 2)) is None
    found = RoundStore(store, "a" * 64).load(module, path_of(0.4, 2))
    assert found is not None
    assert found.round == 2

    (latest,) = [p for p in tmp_path.rglob("state.json") if '"round":2' in p.read_text()[:20]]
    latest.write_text(latest.read_text().replace('"round":2', '"round":7', 1))
    found = RoundStore(store, "a" * 64).load(ready(small_cnn).module, path_of(0.4, 2))
    assert found is not None
    assert found.round == 1
    assert len(store.damaged) == 1


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)
