"""Recovery: training that was asked for, on held-out images never worse, and gone on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import small_models
import torch
from torch import nn

import cswap_deploy
from cswap_deploy.config import PruneConfig
from cswap_deploy.data import Calibration
from cswap_deploy.errors import UsageError
from cswap_deploy.progress import Silent
from cswap_deploy.pruning import recover as module_
from cswap_deploy.pruning.prune import prune
from cswap_deploy.pruning.recover import (
    Lesson,
    Progressed,
    ProgressStore,
    divergence,
    recover,
    varied,
)
from cswap_deploy.records.store import Store

if TYPE_CHECKING:
    from conftest import Made, Ran

IMAGES = torch.randn(60, *small_models.INPUT_SIZE, generator=torch.Generator().manual_seed(0))


def lesson(minutes: float) -> Lesson:
    return Lesson(minutes, "classify", 0, torch.device("cpu"))


def damaged(module: nn.Module) -> nn.Module:
    """The network with a layer shaken."""
    other = small_models.small()
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        other.conv2.weight *= 0.5
    return other


def trained(**more: Any) -> Any:
    dense = small_models.small()
    found = recover(damaged(dense), dense, IMAGES, lesson(0.05), progress=Silent(), **more)
    return (*found, dense)


def test_it_comes_nearer_to_the_dense_network_and_says_how() -> None:
    module, found, dense = trained()
    assert found.divergence < found.divergence_before
    assert found.held_out == 10
    assert found.images == 50
    assert found.steps > 0
    assert found.checks[0].divergence == found.divergence_before
    assert found.divergence == min(check.divergence for check in found.checks)
    held_out = IMAGES[5::6]
    with torch.no_grad():
        own = divergence({"y": dense(held_out)}, {"y": module(held_out)}, "classify").mean()
    assert float(own) == pytest.approx(found.divergence, rel=1e-4), "it is what was kept"
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_it_never_ends_worse_than_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate that breaks everything."""
    monkeypatch.setattr(module_, "_RATE", 10.0)
    dense = small_models.small()
    before = damaged(dense)
    module, found = recover(before, dense, IMAGES, lesson(0.02), progress=Silent())
    assert found.divergence == found.divergence_before
    for one, other in zip(module.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_neither_network_is_changed_and_the_dense_one_does_not_learn() -> None:
    dense = small_models.small()
    pruned = damaged(dense)
    kept = [{n: v.clone() for n, v in m.state_dict().items()} for m in (dense, pruned)]
    recover(pruned, dense, IMAGES, lesson(0.01), progress=Silent())
    for module, before in zip((dense, pruned), kept, strict=True):
        assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    store = ProgressStore(Store(tmp_path), "key")
    assert store.load() is None
    seen: list[int] = []

    def stops(state: Progressed) -> None:
        store.save(state)
        seen.append(state.step)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(save=stops)
    before = store.load()
    assert before is not None
    assert before.step == seen[-1]
    assert 0 < before.seconds < 3
    assert before.moments
    _, found, _ = trained(before=before, save=store.save)
    assert found.steps > seen[-1]
    assert found.seconds < 4
    assert len(found.checks) > 4
    store.forget()
    assert store.load() is None


def test_too_few_images_are_refused() -> None:
    dense = small_models.small()
    with pytest.raises(UsageError, match="--recover needs 24 calibration images, there are 20"):
        recover(dense, dense, IMAGES[:20], lesson(1), progress=Silent())


def test_pictures_are_shifted_mirrored_and_mixed_within_their_range() -> None:
    images = torch.rand(32, 3, 16, 16)
    found = varied(images, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert not torch.equal(found, images)
    again = varied(images, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


@pytest.mark.parametrize(("count", "few"), [(30, True), (60, False)])
def test_where_images_are_few_those_that_judge_are_fitted_to_by_nothing_before(
    count: int, few: bool
) -> None:
    """Whatever they are, the same network comes out of the pruning; else they serve it too."""
    settings = {"ratio": 0.2, "rounds": 1, "round_to": 1, "scoring_samples": 20}
    images = IMAGES[:count]
    other = images.clone()
    other[5::6] = 7 * torch.randn(other[5::6].shape, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % 5
    config = PruneConfig(recover=0.01, **settings)
    one, two = (
        prune(small_models.small(), Calibration(x, labels), config=config, progress=Silent())
        for x in (images, other)
    )
    mine, theirs = list(one.module.parameters()), list(two.module.parameters())
    same = len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
    assert few == same
    if few:
        assert one.plan.groups == two.plan.groups


def test_no_gradient_step_without_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a step was taken")

    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(optimizer, "step", never)
    settings = {"ratio": 0.2, "rounds": 1, "round_to": 1, "scoring_samples": 20}
    done = cswap_deploy.prune(small_models.small(), IMAGES, **settings)
    assert done.plan.recovery is None
    with pytest.raises(AssertionError, match="a step was taken"):
        cswap_deploy.prune(small_models.small(), IMAGES, recover=0.01, **settings)


def test_a_build_says_that_it_was_trained(
    command: Callable[..., Ran], made: Made, store: Path, tmp_path: Path
) -> None:
    done = command(
        "build", *made.flags, "--target", "onnxruntime", "--recover", "0.05", "--store", store,
        "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json()["stages"]["prune"] == "run", "what judges was pruned on before"
    assert done.json()["stages"]["recover"] == "run"
    bundle = cswap_deploy.load(tmp_path / "out")
    found = bundle.plan.recovery
    assert found is not None
    assert found.divergence <= found.divergence_before
    text = (tmp_path / "out/report.md").read_text()
    assert "it was trained for" in text
    assert "## Recovery (training)" in text
    assert "--recover 0.05" in text
    assert "Nothing was trained." in (made.bundle / "report.md").read_text()
    module = bundle.module(small_models.small())
    with torch.no_grad():
        assert torch.isfinite(module(IMAGES)).all()
    for minutes, recovering in (("0.05", "reused"), ("0.04", "run")):
        again = command(
            "build", *made.flags, "--target", "onnxruntime", "--recover", minutes,
            "--store", store, "-o", tmp_path / minutes, "--json",
        )  # fmt: skip
        assert again.json()["stages"]["recover"] == recovering
        assert again.json()["stages"]["prune"] == "reused", "whatever the minutes"


def test_a_softmax_inside_is_no_logits() -> None:
    """The divergence is that of the network without it, not of a softmax of a softmax."""
    dense = small_models.small()
    plain = damaged(dense)
    inside = [nn.Sequential(module, nn.Softmax(1)).eval() for module in (plain, dense)]
    _, expected = recover(plain, dense, IMAGES, lesson(0.005), progress=Silent())
    module, found = recover(*inside, IMAGES, lesson(0.005), progress=Silent())
    assert found.divergence_before == pytest.approx(expected.divergence_before, rel=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(module(IMAGES).sum(1), torch.ones(len(IMAGES)))


def test_a_classifier_is_taught_its_logits_but_for_what_all_have_in_common() -> None:
    wanted = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    moved = {"y": wanted + torch.arange(6.0)[:, None]}
    assert float(module_._loss({"y": wanted}, moved, "classify")) < 1e-10
    assert float(module_._loss({"y": wanted}, moved, "features")) > 1
    # A class that the prediction is deaf to counts as much as any other.
    far = wanted.clone()
    far[:, 0] -= 40
    other = far.clone()
    other[:, 0] += 10
    assert float(divergence({"y": far}, {"y": other}, "classify").max()) < 1e-6
    assert float(module_._loss({"y": far}, {"y": other}, "classify")) > 0.01
