"""The four functions that Python code calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import small_models
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cswap_deploy
from cswap_deploy.errors import ArtifactError, PruneError, UsageError

if TYPE_CHECKING:
    from conftest import Made

QUICK = {"rounds": 1, "scoring_samples": 10, "round_to": 1, "select": "unit"}


def tensors(count: int = 100, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images as the small network takes them, and their labels."""
    images, labels = small_models.pictures(count, seed=seed)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    return x.contiguous(), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def pruned() -> Any:
    """The small network, pruned by tensors, in the quick way; nobody changes it."""
    return cswap_deploy.prune(small_models.small(), tensors(), ratio=0.4, **QUICK)


# --- prune ---------------------------------------------------------------------------------------


def test_prune_gives_a_smaller_module_of_the_same_class(pruned: Any) -> None:
    dense = small_models.small()
    assert type(pruned.module) is type(dense)
    left = sum(p.numel() for p in pruned.module.parameters())
    assert left == pruned.plan.pruned.params
    assert left < 0.7 * pruned.plan.dense.params
    assert pruned.module.conv1.weight.shape[0] < dense.conv1.weight.shape[0]
    x, labels = tensors(300, seed=1)
    with torch.no_grad():
        right = [(m(x).argmax(1) == labels).float().mean() for m in (dense, pruned.module)]
    assert right[1] > right[0] - 0.1


def test_the_module_given_stays_as_it_was() -> None:
    module = small_models.small().train()
    module.conv1.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    done = cswap_deploy.prune(module, tensors(), ratio=0.3, **QUICK)
    assert module.training
    assert not module.conv1.weight.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert not done.module.training


def forms() -> dict[str, Callable[[Path], tuple[Any, dict[str, Any]]]]:
    """Name -> (folder -> data, settings that it needs)."""

    def arrays(_: Path) -> tuple[Any, dict[str, Any]]:
        x, y = tensors()
        return (x.numpy(), y.numpy()), {}

    def loader(_: Path) -> tuple[Any, dict[str, Any]]:
        return DataLoader(TensorDataset(*tensors()), batch_size=7), {}

    def batches(_: Path) -> tuple[Any, dict[str, Any]]:
        return list(zip(*(t.split(32) for t in tensors()), strict=True)), {}

    def npz(folder: Path) -> tuple[Any, dict[str, Any]]:
        images, labels = small_models.pictures(100)
        np.savez(folder / "images.npz", images=images, labels=labels)
        return folder / "images.npz", PREPARED

    def photos(folder: Path) -> tuple[Any, dict[str, Any]]:
        for i, (image, label) in enumerate(zip(*small_models.pictures(60), strict=True)):
            (folder / "photos" / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / "photos" / str(label) / f"{i}.png")
        return str(folder / "photos"), PREPARED

    return {f.__name__: f for f in (arrays, loader, batches, npz, photos)}


PREPARED = {
    "input_size": small_models.INPUT_SIZE, "mean": small_models.MEAN, "std": small_models.STD,
}  # fmt: skip


@pytest.mark.parametrize("form", forms())
def test_prune_takes_images_in_many_forms(form: str, tmp_path: Path) -> None:
    data, needed = forms()[form](tmp_path)
    done = cswap_deploy.prune(small_models.small(), data, ratio=0.4, **QUICK, **needed)
    assert abs(done.plan.effective("params") - 0.4) < 0.05
    assert done.module(tensors(2)[0]).shape == (2, small_models.CLASSES)


def test_the_same_images_in_another_form_give_the_same_network(pruned: Any) -> None:
    loader = DataLoader(TensorDataset(*tensors()), batch_size=9)
    again = cswap_deploy.prune(small_models.small(), loader, ratio=0.4, **QUICK)
    ours, theirs = again.module.state_dict(), pruned.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_pruned_module_trains_compiles_and_is_pruned_again(pruned: Any) -> None:
    import copy

    module = copy.deepcopy(pruned.module).train()
    x, labels = tensors(50, seed=3)
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(module(x), labels)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]

    module.eval()
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))

    twice = cswap_deploy.prune(module, tensors(), ratio=0.2, **QUICK)
    assert twice.plan.dense.params == pruned.plan.pruned.params
    assert twice.plan.pruned.params < pruned.plan.pruned.params


def test_ratio_zero_prunes_nothing() -> None:
    done = cswap_deploy.prune(small_models.small(), tensors(), ratio=0.0)
    assert done.plan.effective("params") == 0
    x, _ = tensors(4)
    with torch.no_grad():
        assert torch.equal(done.module(x), small_models.small()(x))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((torch.zeros(20, 16, 16), torch.arange(20) % 5), r"\(N, C, H, W\)"),
        ((tensors()[0], tensors()[1][:9]), r"labels have shape \(9,\)"),
        ((tensors()[0], tensors()[1] * 0), "class"),
        ((tensors()[0], tensors()[1] + 90), "label"),
        ((tensors()[0] * float("nan"), tensors()[1]), "finite|NaN"),
        ((tensors(1)[0], tensors(1)[1]), "image"),
        (3, "int"),
        ("nowhere/at/all", "nowhere/at/all"),
    ],
    ids=["no channels", "few labels", "one class", "no such class", "nan", "one", "int", "path"],
)
def test_bad_data_is_named(data: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as err:
        cswap_deploy.prune(small_models.small(), data, ratio=0.4, **QUICK, **PREPARED)
    assert err.value.fix or isinstance(data, str)


def test_bad_settings_are_named() -> None:
    with pytest.raises(UsageError, match="--ratio: Input should be less than 1"):
        cswap_deploy.prune(small_models.small(), tensors(), ratio=1.5)
    with pytest.raises(UsageError, match="--raito: Extra inputs are not permitted"):
        cswap_deploy.prune(small_models.small(), tensors(), raito=0.5)
    with pytest.raises(PruneError):
        cswap_deploy.prune(small_models.rigid(), tensors(), ratio=0.4)


# --- load, check ---------------------------------------------------------------------------------


def test_a_loaded_bundle_gives_its_network_and_its_classifier(made: Made) -> None:
    bundle = cswap_deploy.load(made.bundle)
    assert bundle.manifest.model.name == "small_models:small"
    with pytest.raises(
        UsageError, match=r"bundle\.module\(small\(\)\), with small of small_models"
    ):
        bundle.module()
    module = bundle.module(small_models.small())
    assert sum(p.numel() for p in module.parameters()) == bundle.plan.pruned.params
    images, _ = small_models.pictures(8, seed=5)
    x, _ = tensors(8, seed=5)
    classifier = bundle.classifier()
    with torch.no_grad():
        np.testing.assert_allclose(module(x).numpy(), classifier.logits(images), atol=1e-4)
    own = bundle.module(small_models.SmallNet())
    with torch.no_grad():
        assert torch.equal(own(x), module(x))


def test_a_bundle_of_a_module_in_memory_wants_its_architecture(made: Made, tmp_path: Path) -> None:
    kept = {k: v for k, v in made.settings.items() if k not in ("model", "target")}
    bundle = cswap_deploy.build(small_models.small(), output=tmp_path / "own", **kept)
    with pytest.raises(UsageError, match=r"bundle.module\(architecture\)"):
        bundle.module()
    assert bundle.module(small_models.SmallNet())(tensors(2)[0]).shape == (2, 5)


def test_load_verifies(made: Made, tmp_path: Path) -> None:
    copy = shutil.copytree(made.bundle, tmp_path / "copy")
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match=r"is damaged: model\.onnx has"):
        cswap_deploy.load(copy)


def test_check_gives_the_results_as_values(made: Made, tmp_path: Path) -> None:
    limits = tmp_path / "budgets.toml"
    limits.write_text("params_max = 5_000\nsize_max_mib = 1.0\n")
    for bundle in (made.bundle, cswap_deploy.load(made.bundle)):
        results = cswap_deploy.check(bundle, limits)
        assert {r.name: r.ok for r in results} == {"size_max_mib": True, "params_max": False}


def test_the_package_says_what_is_public() -> None:
    assert set(cswap_deploy.__all__) >= {
        "prune", "build", "load", "check", "Config", "Bundle", "CswapError",
    }  # fmt: skip
    for name in cswap_deploy.__all__:
        assert getattr(cswap_deploy, name) is not None
