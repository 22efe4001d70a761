"""The importances that the accuracy benchmark compares with, each held against what it must be."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration
from cswap_deploy.errors import MissingDependencyError
from cswap_deploy.network.units import Reader
from cswap_deploy.pruning.allocation import Values
from cswap_deploy.pruning.importance import View
from cswap_deploy.pruning.prepare import Prepared, prepare

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests/causal")]

import accuracy_figure  # noqa: E402
import accuracy_results  # noqa: E402
import bench_accuracy  # noqa: E402
import peers  # noqa: E402
from small_networks import CLASSES, lively, pictures, small_cnn, small_vit  # noqa: E402

SETTINGS = PruneConfig(ratio=0.3, ratio_of="channels", round_to=1, branches=False)
NEEDS_BATCH_NORM = {"bn-scale"}
NO_GROUPED = {"fpgm"}


class Plain(nn.Module):
    """Two convolutions with batch norm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, 2, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.norm2(self.second(x)))
        return self.classifier(x.mean((2, 3)))


def plain() -> Plain:
    torch.manual_seed(0)
    module = Plain()
    lively(module)
    return module


def ready(module: nn.Module, images: Tensor) -> Prepared:
    if isinstance(module, Plain):  # one trace serves all of these, whatever their weights
        net = traced_plain()
        return replace(net.on(module), dense=net.dense.on(module))
    return prepare(module, images, SETTINGS)


@cache
def traced_plain() -> Prepared:
    return prepare(plain(), pictures(24)[0], SETTINGS)


def view(net: Prepared, images: Tensor, labels: Tensor) -> View:
    return View(net.graph, net.groups, Calibration(images, labels), np.random.default_rng(0))


def importance(name: str, module: nn.Module, images: Tensor, labels: Tensor) -> Values:
    return peers.PEERS[name].of(view(ready(module, images), images, labels))


@pytest.fixture(scope="module")
def prepared() -> dict[str, Prepared]:
    images, _ = pictures(24)
    makers = {"cnn": small_cnn, "vit": small_vit, "plain": plain}
    return {name: ready(make(), images) for name, make in makers.items()}


@pytest.mark.parametrize("network", ["cnn", "vit", "plain"])
@pytest.mark.parametrize("name", peers.PEERS)
def test_every_unit_gets_one_finite_value(
    name: str, network: str, prepared: dict[str, Prepared]
) -> None:
    if name == "integrated-gradients":
        pytest.importorskip("captum")
    images, labels = pictures(24)
    net = prepared[network]
    before = copy.deepcopy(net.module.state_dict())
    if (name in NEEDS_BATCH_NORM and network == "vit") or (name in NO_GROUPED and network == "cnn"):
        with pytest.raises(peers.NotApplicableError):
            peers.PEERS[name].of(view(net, images, labels))
        return
    found = peers.PEERS[name].of(view(net, images, labels))
    assert list(found) == [g.name for g in net.groups]
    for group in net.groups:
        assert found[group.name].shape == (group.units,)
        assert np.isfinite(found[group.name]).all()
        assert (found[group.name] >= 0).all()
        assert found[group.name].std() > 0 or name == "bn-scale"
    assert all(torch.equal(v, before[k]) for k, v in net.module.state_dict().items())
    assert all(p.grad is None for p in net.dense.module.parameters())


@pytest.mark.parametrize("name", ["magnitude-l1", "magnitude-l2", "lamp", "wanda", "taylor", "obs"])
def test_a_zeroed_filter_comes_last(name: str) -> None:
    images, labels = pictures(24)
    module = plain()
    with torch.no_grad():
        module.first.weight[2] = 0.0
        module.norm.weight[2] = 0.0  # torch-pruning's magnitude counts it too
        module.second.weight[:, 2] = 0.0
    found = importance(name, module, images, labels)["first"]
    assert found.argmin() == 2
    assert found[2] == pytest.approx(0.0, abs=1e-9)


def test_a_silent_channel_comes_last_by_activation_and_attribution() -> None:
    pytest.importorskip("captum")
    images, labels = pictures(24)
    module = plain()
    with torch.no_grad():
        module.norm.weight[4] = 0.0
        module.norm.bias[4] = -1.0  # the ReLU cuts it off
    for name in ("activation", "wanda", "integrated-gradients", "obs"):
        found = importance(name, module, images, labels)["first"]
        assert found.argmin() == 4
        # obs: the ridge leaves a thousandth of what an average channel would
        assert found[4] == pytest.approx(0.0, abs=1e-2 if name == "obs" else 1e-9)


def test_a_channel_with_no_batch_norm_scale_comes_last() -> None:
    images, labels = pictures(24)
    module = plain()
    with torch.no_grad():
        module.norm.weight[5] = 0.0
    found = importance("bn-scale", module, images, labels)["first"]
    assert found.argmin() == 5
    gamma = module.norm.weight.detach().abs().double()
    np.testing.assert_allclose(found, gamma / gamma.mean(), rtol=1e-6)


def test_a_duplicate_has_no_importance_by_obs_and_the_largest_by_magnitude() -> None:
    images, labels = pictures(24)
    module = plain()
    with torch.no_grad():  # channels 0 and 1 are one, and large
        module.first.weight[1] = module.first.weight[0]
        for values in (module.norm.weight, module.norm.bias, module.norm.running_mean,
                       module.norm.running_var):  # fmt: skip
            values[1] = values[0]
        module.second.weight[:, :2] *= 4.0
    assert set(importance("magnitude-l2", module, images, labels)["first"].argsort()[-2:]) == {0, 1}
    assert set(importance("obs", module, images, labels)["first"].argsort()[:2]) == {0, 1}


def test_taylor_equals_a_computation_by_hand() -> None:
    """Linear(2, 2) -> Linear(2, 2) with no bias on one image: every gradient on paper.

    x = (1, 2), A = [[1, 0], [0, 2]], so h = (1, 4); B = [[1, 0], [0, 0.25]], so the logits are
    (1, 1) and p = (1/2, 1/2). The true class is 0: dL/dz = (-1/2, 1/2).
    dL/dB = dz h' = [[-1/2, -2], [1/2, 2]]; dL/dh = B' dz = (-1/2, 1/8); dL/dA = dh x'
    = [[-1/2, -1], [1/8, 1/4]].
    Unit 0: A gives |1 * -1/2| + 0 = 1/2, B's column 0 |1 * -1/2| + 0 = 1/2; the mean is 1/2.
    Unit 1: A gives 0 + |2 * 1/4| = 1/2, B's column 1 0 + |1/4 * 2| = 1/2; the mean is 1/2.
    """
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    module = nn.Sequential(first, second).eval()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        second.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.25]]))
    image, label = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
    images, labels = image.repeat(2, 1), label.repeat(2)
    found = importance("taylor", module, images, labels)["0"]
    np.testing.assert_allclose(found, [1.0, 1.0], rtol=1e-6)  # over the group's mean
    with torch.no_grad():
        second.weight[0, 1] = 0.5
    # z = (3, 1), p = (q, 1 - q) with q = e^2 / (1 + e^2), dz = (q - 1, 1 - q) = s * (-1, 1).
    # dB = dz h' = s * [[-1, -4], [1, 4]]; dh = B' dz = s * (-1, -1/2 + 1/4);
    # dA = dh x' = s * [[-1, -2], [-1/4, -1/2]].
    # Unit 0: (1 + 1) / 2 = 1. Unit 1: A |2 * -1/2| = 1, B |1/2 * -4| + |1/4 * 4| = 3: 4 / 2 = 2.
    found = importance("taylor", module, images, labels)["0"]
    np.testing.assert_allclose(found, np.array([1.0, 2.0]) / 1.5, rtol=1e-5)


def test_obs_is_the_error_of_the_layer_solved_again_without_the_unit() -> None:
    """Against least squares on the patches themselves; the convolution strides and pads."""
    images, labels = pictures(24)
    module = plain()
    net = ready(module, images)
    with torch.no_grad():
        x = F.relu(module.norm(module.first(images)))
        patches = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 54).double()
    wanted = patches @ module.second.weight.detach().flatten(1).double().T
    ones = torch.ones(len(patches), 1, dtype=torch.float64)
    by_hand = []
    for unit in range(6):
        kept = [i for i in range(54) if i // 9 != unit]
        left = torch.cat([patches[:, kept], ones], 1)
        solved = torch.linalg.lstsq(left, wanted, driver="gelsd").solution
        by_hand.append(float((left @ solved - wanted).pow(2).sum(1).mean()))
    covariance = peers.input_covariances(view(net, images, labels))["second"]
    (group,) = (g for g in net.groups if g.name == "first")
    errors, variance = peers.removal_errors(
        net.dense.module.get_submodule("second"), covariance, group.consumers[0], ridge=1e-9
    )
    np.testing.assert_allclose(errors, by_hand, rtol=1e-4)
    assert variance == pytest.approx(float(wanted.var(0, unbiased=False).sum()), rel=1e-4)


def test_obs_of_grouped_convolutions_adds_up_their_parts() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    x = torch.randn(2, 500, 2, dtype=torch.float64)
    covariance = torch.stack([torch.cov(part.T, correction=0) for part in x])
    unit = Reader("layer", ((0, 2), (1, 3)))  # one slot of each group
    errors, _ = peers.removal_errors(layer, covariance, unit, ridge=1e-12)
    weight = layer.weight.detach().double().flatten(1).view(2, 2, 2)
    for slot in range(2):
        # The variance that the slot beside it cannot predict, times the squared weights.
        other = 1 - slot
        left = covariance[:, slot, slot] - covariance[:, 0, 1] ** 2 / covariance[:, other, other]
        by_hand = (left * weight[:, :, slot].pow(2).sum(1)).sum()
        assert errors[slot] == pytest.approx(float(by_hand), rel=1e-6)


def test_attributions_of_a_linear_end_are_weight_times_activation() -> None:
    pytest.importorskip("captum")
    images, labels = pictures(24)
    module = plain()
    with torch.no_grad():
        x = F.relu(module.norm(module.first(images)))
        pooled = F.relu(module.norm2(module.second(x))).mean((2, 3))
    by_hand = (pooled * module.classifier.weight[labels]).abs().mean(0).detach().double()
    found = importance("integrated-gradients", module, images, labels)["second"]
    np.testing.assert_allclose(found, by_hand / by_hand.mean(), rtol=1e-4)


def test_heads_take_the_sum_of_their_positions(prepared: dict[str, Prepared]) -> None:
    images, labels = pictures(24)
    net = prepared["vit"]
    found = peers.wanda(view(net, images, labels))
    (group, *_) = (g for g in net.groups if g.kind == "heads")
    proj = net.dense.module.get_submodule(group.consumers[0].layer)
    seen: list[Tensor] = []
    handle = proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        net.dense.module(images)
    handle.remove()
    rms = seen[0].flatten(0, 1).pow(2).mean(0).sqrt()
    by_hand = (proj.weight.norm(dim=0) * rms).view(group.units, -1).sum(1).detach().numpy()
    shares = found[group.name] / found[group.name].sum()
    np.testing.assert_allclose(shares, by_hand / by_hand.sum(), rtol=1e-4)


def test_without_captum_the_error_says_what_to_install(
    prepared: dict[str, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cswap-deploy\[bench\]'"):
        peers.integrated_gradients(view(prepared["plain"], *pictures(4)))


# --- the benchmark around them -------------------------------------------------------------------


def test_a_plain_ranking_ignores_what_a_unit_costs(prepared: dict[str, Prepared]) -> None:
    """Both ways through the package's loop: it divides by what is saved, a plain ranking does not.

    A neuron saves 24 + 1 + 24 = 49 parameters, a head 24 * 25 + 8 * 24 = 792, for 24 positions. A
    head scores 0.9 a position, so 0.9 * 24 / 792 = 0.027 a parameter; a neuron 1, so 0.020.
    """
    images, labels = pictures(24)
    net = ready_by_parameters(small_vit(), images)
    given = {
        g.name: np.full(g.units, (0.9 if g.kind == "heads" else 1.0) * len(g.root_indices[0]))
        + 1e-6 * np.arange(g.units)
        for g in net.groups
    }
    for cost_aware in (False, True):
        case = bench_accuracy.Case("vit", "random", False, cost_aware, 0.2, 0)
        model = bench_accuracy.Model("vit", "params", 1, (0.2,))
        ranking = bench_accuracy.ranking(given, case, model, net)
        module, removed = bench_accuracy.prune_copy(
            net, Calibration(images, labels), bench_accuracy.settings(case, model),
            seed=0, values=ranking, progress=bench_accuracy.Silent(),
        )  # fmt: skip
        assert removed == pytest.approx(0.2, abs=0.03)
        lost = {
            g.kind
            for g in net.groups
            for c in g.consumers
            if not module.get_submodule(c.layer).weight.abs().sum(0).all()
        }
        assert ("heads" in lost) is not cost_aware
    assert all(
        torch.equal(v, net.dense.module.state_dict()[k]) for k, v in net.module.state_dict().items()
    )


def test_a_row_is_measured_from_end_to_end() -> None:
    module, images = small_vit(), pictures(24)
    net, told = ready_by_parameters(module, images[0]), Calibration(*images)
    draw = SimpleNamespace(
        calibration=told, test=told, seconds={}, dense=bench_accuracy.logits(module, images[0]),
        values=lambda *_: {g.name: np.arange(g.units, dtype=float) for g in net.groups},
    )  # fmt: skip
    case = bench_accuracy.Case("vit", "random", True, False, 0.2, 0)
    model = bench_accuracy.Model("vit", "params", 1, (0.2,))
    row = bench_accuracy.measure(case, model, net, draw, "c", bench_accuracy.Silent())  # type: ignore[arg-type]
    assert row.removed == pytest.approx(0.2, abs=0.03)
    assert row.images == 24
    assert row.kl > 0
    assert row.agreement <= 1


def test_peers_are_asked_about_no_branches_whatever_ran_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, images = small_vit(), pictures(24)
    draw = SimpleNamespace(seed=0, calibration=Calibration(*images))
    seen: dict[str, set[str]] = {}

    def measure(
        case: bench_accuracy.Case, _: object, network: Prepared, *__: object
    ) -> accuracy_results.Result:
        seen[case.method] = seen.get(case.method, set()) | {g.kind for g in network.groups}
        if case.refit:
            raise peers.NotApplicableError("that is enough")
        return result(model="m", method=case.method, ratio=case.ratio, removed=case.ratio)

    monkeypatch.setattr(bench_accuracy, "load", lambda _: SimpleNamespace(module=module))
    monkeypatch.setattr(bench_accuracy, "Draw", lambda *_: draw)
    monkeypatch.setattr(bench_accuracy, "measure", measure)
    config = bench_accuracy.Config(methods=("cswap", "obs"), ratios=(0.2,), results=tmp_path)
    silent = bench_accuracy.Silent()
    rows = list(bench_accuracy.measure_model("demo-vit", config, silent))
    assert {row.method for row in rows} == {"cswap", "obs"}
    assert "branch" in seen["cswap"]
    assert seen["obs"]
    assert "branch" not in seen["obs"]


def ready_by_parameters(module: nn.Module, images: Tensor) -> Prepared:
    return prepare(module, images, PruneConfig(ratio=0.1, round_to=1, branches=False))


def result(**changes: object) -> accuracy_results.Result:
    values: dict[str, object] = {
        "model": "m", "method": "cswap", "refit": True, "cost_aware": False, "ratio": 0.4,
        "ratio_of": "params", "removed": 0.4, "seed": 0, "calibration": 512, "top1": 0.9,
        "top1_dense": 0.93, "agreement": 0.95, "kl": 0.1, "images": 1000, "seconds": 1.0,
        "code": "c", "torch": "t",
    }  # fmt: skip
    return accuracy_results.Result(**(values | changes))  # type: ignore[arg-type]


def test_rows_are_merged_by_what_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for row in (result(), result(seed=1), result(top1=0.8, code="d"), result(refit=False)):
        accuracy_results.write_result(path, row)
    rows = accuracy_results.read_results(path)
    assert len(rows) == 3
    assert rows[result().key] == result(top1=0.8, code="d")
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]


def test_a_digest_changes_with_the_code_and_not_with_its_words() -> None:
    spoken = accuracy_results.code(
        '"""Says."""\ndef f(x):\n    """Adds."""\n    return x + 1  # so\n'
    )
    assert spoken == accuracy_results.code("def f(x): return (x\n + 1)")
    assert spoken != accuracy_results.code("def f(x): return x + 2")


def test_the_table_takes_a_peers_better_way_and_pairs_the_margin_by_seed() -> None:
    rows = [
        result(seed=0, top1=0.90), result(seed=1, top1=0.92),
        result(method="obs", seed=0, top1=0.80), result(method="obs", seed=1, top1=0.80),
        result(method="obs", seed=0, top1=0.87, cost_aware=True),
        result(method="obs", seed=1, top1=0.89, cost_aware=True),
        result(method="lamp", seed=0, top1=0.70),
    ]  # fmt: skip
    table = accuracy_figure.tables("m", rows)
    assert "| with the same refit, 512 calibration images | 40 % |" in table
    assert "| cswap | **91.0** ±1.4 |" in table
    assert "| obs | 88.0 ±1.4* |" in table
    assert "| lamp | 70.0 |" in table
    assert "| *cswap − best peer* | +3.0 ±0.0 |" in table


def test_sizes_of_calibration_are_not_mixed_in_one_table() -> None:
    native = [result(refit=False, calibration=64)]
    most = [result(calibration=128, seed=seed) for seed in (0, 1)]
    rows = [*native, result(calibration=256), *most]
    assert accuracy_figure.main_rows(rows) == native + most
    assert accuracy_figure.main_rows([]) == []
    alone = [result(calibration=512, seed=seed) for seed in range(5)]
    shared = [result(calibration=128, method=m) for m in ("cswap", "lamp")]
    assert accuracy_figure.main_rows([*alone, *shared]) == shared


def test_the_figure_is_one_drawing_with_every_method_named() -> None:
    rows = [result(method=m, ratio=r) for m in ("cswap", "obs", "random") for r in (0.4, 0.5)]
    svg = accuracy_figure.draw("m", rows)
    assert svg.startswith("<svg")
    assert svg == accuracy_figure.draw("m", rows)
    for name in ("cswap", "obs", "random", "dense 93.0 %"):
        assert name in svg
