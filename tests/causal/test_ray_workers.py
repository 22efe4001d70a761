"""Measuring over Ray: the same bits as one process, whoever dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cswap_deploy.causal.experiment import Experiment
from cswap_deploy.causal.interventions import input_moments
from cswap_deploy.causal.measurement import LocalMeasurement
from cswap_deploy.causal.memory import Budget
from cswap_deploy.causal.ray_workers import Recipe, WorkerPool, pool_of, shares
from cswap_deploy.config import ModelConfig, PruneConfig
from cswap_deploy.errors import StageError, UsageError
from cswap_deploy.models.load import load_model, wrap_module
from cswap_deploy.network.units import consumers
from cswap_deploy.pruning.prepare import Prepared, prepare
from cswap_deploy.records.bundle import read_plan

pytest.importorskip("ray", reason="the ray extra is not installed")
pytestmark = pytest.mark.slow

BUDGET = Budget(1 << 28, 1 << 22)


@pytest.fixture(scope="module")
def prepared() -> tuple[Recipe, Prepared, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    loaded = load_model(ModelConfig(model="demo-resnet"))
    size = loaded.spec.preprocessing.input_size
    images = torch.randn(72, *size).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(72) % 10
    net = prepare(loaded.module, images, PruneConfig())
    return Recipe(loaded.spec, net.biased, net.example.numpy()), net, images, labels


@pytest.fixture(scope="module")
def pool(prepared) -> Iterator[WorkerPool]:
    with pool_of("2", prepared[0], memory_budget=BUDGET.total) as found:
        yield found


@pytest.fixture
def one_thread(pool) -> Iterator[None]:
    """As the workers have."""
    before = torch.get_num_threads()
    torch.set_num_threads(pool.threads)
    yield
    torch.set_num_threads(before)


def _both(prepared, pool):
    _, net, images, labels = prepared
    moments = input_moments(
        net.graph, consumers(net.groups), images, intervention="predicted", chunk=64
    )
    budget = Budget(BUDGET.total, BUDGET.variant_bytes)
    experiment = Experiment(net.graph, images, labels, moments, budget)
    return LocalMeasurement(experiment), pool.measurement(experiment)


def _wanted(net: Prepared, step: int = 64):
    return {g: list(range(0, g.units, step)) for g in net.groups}


def _assert_same_bits(here, there) -> None:
    assert [e.group for e in here] == [e.group for e in there]
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a.units, b.units)
        np.testing.assert_array_equal(a.kl, b.kl)
        np.testing.assert_array_equal(a.true_class, b.true_class)


def test_two_workers_give_the_bits_of_one_process(prepared, pool, one_thread) -> None:
    local, remote = _both(prepared, pool)
    wanted = _wanted(prepared[1])
    for bfloat16 in (False, True):
        ticks: list[int] = []
        there = remote.effects(wanted, bfloat16=bfloat16, tick=ticks.append)
        _assert_same_bits(local.effects(wanted, bfloat16=bfloat16), there)
        assert sum(ticks) == 72 * sum(map(len, wanted.values()))
    rows = torch.tensor([3, 70, 11])
    _assert_same_bits(local.effects(wanted, rows), remote.effects(wanted, rows))


def test_later_rounds_see_the_weights_as_they_are_then(prepared, pool, one_thread) -> None:
    net = prepared[1]
    wanted = _wanted(net)
    layer = net.module.get_submodule(net.groups[0].consumers[0].layer)
    before = layer.weight.detach().clone()
    first = _both(prepared, pool)[1].effects(wanted)
    with torch.no_grad():
        layer.weight.mul_(1.5)
    try:
        local, remote = _both(prepared, pool)
        there = remote.effects(wanted)
        _assert_same_bits(local.effects(wanted), there)
        assert any(not np.array_equal(a.kl, b.kl) for a, b in zip(first, there, strict=True))
    finally:
        with torch.no_grad():
            layer.weight.copy_(before)


def test_a_worker_that_is_killed_costs_nothing_but_its_piece(prepared, pool, one_thread) -> None:
    local, remote = _both(prepared, pool)
    wanted = _wanted(prepared[1], 32)
    victim = pool.ray.get(pool.workers[0].__ray_call__.remote(lambda _: os.getpid()))
    lost = pool.lost
    ticks: list[int] = []

    def tick(count: int) -> None:
        if not ticks:  # the first piece has come back, the others have not
            os.kill(victim, signal.SIGKILL)
        ticks.append(count)

    there = remote.effects(wanted, tick=tick)
    assert pool.lost == lost + 1
    assert len(pool.workers) == 2
    _assert_same_bits(local.effects(wanted), there)
    assert sum(ticks) == 72 * sum(map(len, wanted.values())), "nothing counts twice"


def test_an_error_of_the_network_comes_back_with_its_words(prepared, pool) -> None:
    net = prepared[1]
    layer = net.module.get_submodule(net.groups[0].consumers[0].layer)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight[0] = float("nan")
    try:
        _, remote = _both(prepared, pool)
        with pytest.raises(StageError, match=r"first to go wrong is .* \(NaN\)") as caught:
            remote.effects(_wanted(net))
        assert "--mean" in caught.value.fix
    finally:
        with torch.no_grad():
            layer.weight.copy_(before)


def test_shares_are_even_and_whole_groups(prepared) -> None:
    asked = list(_wanted(prepared[1]).items())
    for most in (1, 2, 5, 100):
        found = list(shares(asked, most))
        assert [entry for share in found for entry in share] == asked
        assert len(found) <= max(most, 1)


def test_a_network_that_was_passed_as_an_object_is_refused() -> None:
    loaded = wrap_module(
        load_model(ModelConfig(model="demo-resnet")).module,
        ModelConfig(model="mine", input_size=(1, 28, 28), mean=(0.5,), std=(0.5,)),
    )
    recipe = Recipe(loaded.spec, (), np.zeros((2, 1, 28, 28), np.float32))
    with (
        pytest.raises(UsageError, match="built from its name"),
        pool_of("2", recipe, memory_budget=None),
    ):
        raise AssertionError


def test_prune_with_workers_gives_the_same_plan(tmp_path, command) -> None:
    """The whole command; what is measured elsewhere decides alike."""
    settings = tmp_path / "settings.toml"
    settings.write_text('[prune]\nselect = "unit"\n')  # no trials: workers have no part in them
    plans = []
    for name, more in (("one", []), ("two", ["--workers", "2"])):
        ran = command(
            "prune", "demo-resnet", "--ratio", "0.3", "--scoring-samples", "8", "--rounds", "1",
            "--calibration-samples", "16", "--measuring", "adaptive", "--config", settings,
            "-o", tmp_path / name, "--store", tmp_path / f"store-{name}", *more,
        )  # fmt: skip
        assert ran.code == 0, ran.err
        plans.append(read_plan(tmp_path / name))
    one, two = plans
    assert [g.kept for g in one.groups] == [g.kept for g in two.groups]
    for a, b in zip(one.groups, two.groups, strict=True):
        assert [e.kl for e in a.effects] == pytest.approx([e.kl for e in b.effects], rel=1e-3)
    assert 0 < one.rounds[0].forwards == two.rounds[0].forwards <= one.rounds[0].forwards_exact
