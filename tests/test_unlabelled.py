"""A folder of photos without classes gives a bundle, and a report that says what is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import small_models
import torch
from PIL import Image

import cswap_deploy
from cswap_deploy.errors import UsageError

if TYPE_CHECKING:
    from conftest import Made, Ran

SHORT = ("--rounds", 1, "--round-to", 1, "--scoring-samples", 20, "--latency-runs", 20)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nested folders, odd names, a file that is no picture."""
    root = tmp_path_factory.mktemp("field")
    pixels, _ = small_models.pictures(120, seed=5)
    for at, each in enumerate(pixels):
        folder = root / ("", "monday", "monday/site b", "2024")[at % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(folder / f"IMG {at:04}.png")
    (root / "notes.txt").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def trained(made: Made) -> tuple[Any, ...]:
    """The model's flags without any labelled data."""
    flags = list(made.flags)
    kept, at = [], 0
    drop = {"--data", "--validation-data", "--rounds", "--round-to", "--scoring-samples",
            "--latency-runs"}  # fmt: skip
    while at < len(flags):
        if flags[at] in drop:
            at += 2
            continue
        kept.append(flags[at])
        at += 1
    return (*kept, *SHORT)


@pytest.fixture(scope="module")
def bundle(made: Made, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    kept = {k: v for k, v in made.settings.items() if k not in ("data", "validation_data")}
    settings = kept | {
        "calibration_data": str(photos), "output": folder / "out", "store": folder / "store",
    }  # fmt: skip
    return cswap_deploy.build(**settings).path


def test_only_photos_give_a_bundle_that_says_what_cannot_be_known(bundle: Path) -> None:
    opened = cswap_deploy.load(bundle)
    manifest = opened.manifest
    for images in (manifest.calibration, manifest.validation):
        assert images is not None
        assert not images.labelled
        assert images.count > 30
    assert manifest.torch_accuracy is None
    result = manifest.targets[0]
    assert result.accuracy is None
    for found in (manifest.torch_agreement, result.agreement):
        assert found is not None
        assert 0.5 < found.share <= 1
        assert found.low <= found.share <= found.high
        assert found.kl is not None
        assert found.kl >= 0
    assert manifest.dense_checks == ()
    text, page = ((bundle / name).read_text() for name in ("report.md", "report.html"))
    for written in (text, page):
        assert "have no labels" in written
        assert "top-1 is not known" in written
        assert "on the class that the dense network predicts" in written
    assert "| same class |" in text
    with np.load(bundle / "predictions.npz") as kept:
        assert "labels" not in kept


def test_the_agreement_is_that_of_the_networks(bundle: Path, photos: Path) -> None:
    """By hand, on the photos that were tested on, found again by the predictions kept."""
    with np.load(bundle / "predictions.npz") as kept:
        dense, pruned = kept["dense.classes"], kept["pruned.classes"]
    found = cswap_deploy.load(bundle).manifest.torch_agreement
    assert found is not None
    assert found.images == len(dense)
    assert found.share == pytest.approx(float((dense == pruned).mean()))


def test_limits_on_agreement_need_no_labels_and_those_on_accuracy_do(
    command: Callable[..., Ran], bundle: Path, tmp_path: Path
) -> None:
    limits = tmp_path / "budgets.toml"
    limits.write_text("agreement_min = 0.01\n")
    assert command("check", bundle, "--budget", limits).code == 0
    limits.write_text("top1_min = 0.01\n")
    done = command("check", bundle, "--budget", limits)
    assert done.code == 3
    assert "the validation images have no labels; agreement_min needs none" in done.err


def test_labelled_images_test_what_photos_pruned(
    command: Callable[..., Ran], made: Made, trained: tuple[Any, ...], photos: Path, tmp_path: Path
) -> None:
    done = command(
        "build", *trained, "--calibration-data", photos, "--validation-data",
        made.settings["validation_data"], "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "out/manifest.json").read_text())
    assert not told["calibration"]["labelled"]
    assert told["validation"]["labelled"]
    assert told["torch_accuracy"]["pruned"]["images"] == told["validation"]["count"]


def test_photos_that_are_all_alike_are_refused_before_anything_takes_long(
    command: Callable[..., Ran], trained: tuple[Any, ...], tmp_path: Path
) -> None:
    folder = alike(tmp_path)
    done = command("build", *trained, "--calibration-data", folder, "-o", tmp_path / "out")
    assert done.code == 2
    assert "for all 20 photos" in done.err
    assert "fix: pass photos of more kinds" in done.err
    assert "prune" not in done.err
    shutil.rmtree(folder)
    done = command("build", *trained, "--calibration-data", folder, "-o", tmp_path / "out")
    assert done.code == 2
    assert "does not exist" in done.err


def alike(tmp_path: Path) -> Path:
    """Forty pictures of one colour, each a little redder than the last."""
    folder = tmp_path / "alike"
    folder.mkdir()
    for at in range(40):
        Image.new("RGB", (16, 16), (at, 0, 0)).save(folder / f"{at}.png")
    return folder


def test_random_weights_that_say_one_thing_need_classes(
    command: Callable[..., Ran], tmp_path: Path
) -> None:
    """More photos would not help: such a network says the same to all of them."""
    photos = alike(tmp_path)
    flags = ("--no-pretrained", "--input-size", "3,32,32", "--calibration-data", photos)
    done = command("build", "starnet_s1", *flags, "-o", tmp_path / "out")
    assert done.code == 2
    assert "fix: its weights are random: pass any photos in class folders with --data" in done.err


def test_in_memory_images_alone_will_do() -> None:
    module = small_models.small()
    images = torch.randn(60, *small_models.INPUT_SIZE)
    settings = {"rounds": 1, "round_to": 1, "scoring_samples": 20}
    for data in (images, images.numpy(), list(images.split(20))):
        pruned = cswap_deploy.prune(module, data, ratio=0.2, **settings)
        assert pruned.plan.pruned.params < pruned.plan.dense.params
        assert any("own predictions stand for them" in note for note in pruned.notes)
    with_labels = cswap_deploy.prune(
        module, (images, module(images).argmax(1)), ratio=0.2, **settings
    )
    assert [g.kept for g in with_labels.plan.groups] == [g.kept for g in pruned.plan.groups]
    with pytest.raises(UsageError, match="effects are compared between classes"):
        cswap_deploy.prune(module, torch.zeros(60, *small_models.INPUT_SIZE), ratio=0.2)
