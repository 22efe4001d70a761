"""A dense network that only guesses is found before anything is pruned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from made_up_bundle import made_up_manifest, made_up_plan
from torch import nn

import cswap_deploy
from cswap_deploy.measure.chance import check_dense, verdict
from cswap_deploy.progress import Silent
from cswap_deploy.records.measurements import DenseCheck
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.report.pages import render_markdown

CLASSES = small_models.CLASSES


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "images", "classes", "wanted"),
    [
        # P(X >= 4; 20, .1) = .133 and P(X >= 5) = .043; P(X <= 4; 20, .55) = .0015.
        (4, 20, 10, "at"),
        (5, 20, 10, "above"),
        (13, 20, 10, "above"),
        # P(X >= 19; 128, .1) = .056 and P(X >= 20) = .033.
        (7, 128, 10, "at"),
        (19, 128, 10, "at"),
        (20, 128, 10, "above"),
        # Two classes: P(X >= 15; 20, .5) = .021, P(X >= 14) = .058; P(X <= 12; 20, .75) = .102.
        (15, 20, 2, "above"),
        (13, 20, 2, "few"),
        (11, 20, 2, "at"),
        # One right of 128 classes is what guessing gives; four are more.
        (1, 128, 128, "at"),
        (4, 128, 128, "above"),
        # Few images, or one class: never stopped.
        (4, 4, 2, "few"),
        (0, 8, 8, "few"),
        (0, 15, 10, "few"),
        (0, 16, 10, "at"),
        (0, 100, 1, "few"),
        (100, 100, 1, "few"),
    ],
)
def test_verdicts_by_hand(right: int, images: int, classes: int, wanted: str) -> None:
    assert verdict(right, images, classes) == wanted


@pytest.mark.parametrize("images", [4, 16, 20, 50, 128])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_a_good_network_is_hardly_ever_stopped_and_a_guessing_one_mostly(
    images: int, classes: int
) -> None:
    from scipy.stats import binom

    occur = min(images, classes)
    verdicts = [verdict(k, images, occur) for k in range(images + 1)]
    stopped = np.array([v == "at" for v in verdicts])
    good = binom.pmf(np.arange(images + 1), images, 0.5 + 0.5 / occur)
    assert (good * stopped).sum() <= 0.05
    guessing = binom.pmf(np.arange(images + 1), images, 1 / occur)
    assert (guessing * stopped).sum() >= (0.9 if images >= 50 else 0.0)
    assert "at" not in verdicts[verdicts.index("above") :] if "above" in verdicts else True


class Told(nn.Module):
    """Says what it was made with."""

    def __init__(self, predicted: np.ndarray, classes: int) -> None:
        super().__init__()
        self.logits = torch.nn.functional.one_hot(torch.from_numpy(predicted), classes).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[x[:, 0, 0, 0].long()]


def checked(predicted: np.ndarray, labels: np.ndarray, classes: int) -> DenseCheck:
    images = np.zeros((len(labels), 1, 1, 1), np.float32)
    images[:, 0, 0, 0] = np.arange(len(labels))
    made = check_dense(Told(predicted, classes), images, labels, part="calibration", batch=7)
    assert made is not None
    return made


def test_another_order_of_the_classes_is_seen() -> None:
    labels = np.arange(120) % 10
    as_text = np.array([int(n) - 1 for n in sorted(map(str, range(1, 11)))])
    made = checked(as_text[labels], labels, 12)
    assert (made.right, made.images, made.classes) == (12, 120, 10)  # class_1 keeps its index
    assert (made.verdict, made.reordered) == ("at", 1.0)
    assert made.words == (
        "the dense network is right on 12 of 120 calibration images (10.0%), guessing among their "
        "10 classes on 10.0%; with its classes in another order it would be right on 100.0%"
    )
    noise = np.random.default_rng(0).integers(0, 10, 120)
    assert checked(noise, labels, 10).reordered is None
    assert checked(as_text[labels][:20], labels[:20], 10).reordered is None
    assert checked(as_text[labels][1:5], labels[1:5], 10).words.endswith(
        "too few images to tell the two apart"
    )


class NotFinite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) * torch.nan


class OneImage(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(1, 3)


class NoLogits(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"maps": x}


@pytest.mark.parametrize("module", [NotFinite(), OneImage(), NoLogits(), nn.Identity()])
def test_what_is_no_classifier_is_left_to_the_stages_that_name_it(module: nn.Module) -> None:
    x, labels = np.ones((4, 1, 1, 3), np.float32), np.arange(4) % 3
    assert check_dense(module, x, labels, part="calibration", batch=16) is None


# --- a build -------------------------------------------------------------------------------------

ARGUMENTS = (
    "prune", "small_models:small", "--criterion", "magnitude", "--rounds", "1", "--round-to", "1",
    "--no-refit", "--calibration-samples", "100", "--validation-samples", "100",
)  # fmt: skip


def shifted(path: Path, by: int, *, seed: int = 0) -> Path:
    images, labels = small_models.pictures(200, seed=seed)
    np.savez(path, images=images, labels=(labels + by) % CLASSES)
    return path


@pytest.fixture
def prune(command: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def prune(*more: object) -> Any:
        return command(*ARGUMENTS, *small_models.FLAGS, "-o", tmp_path / "out", *more)

    return prune


def test_labels_in_another_order_stop_the_build(prune: Callable[..., Any], tmp_path: Path) -> None:
    file = shifted(tmp_path / "a.npz", 1)
    done = prune("--data", file)
    assert done.code == 2
    assert "error: the dense network is right on " in done.err
    assert "guessing among their 5 classes on 20.0%; with its classes in another order" in done.err
    assert "(here: labels are class indices), or another --mean and --std than in" in done.err
    assert "or wrong weights (here: as made by small_models:small)" in done.err
    assert "\n  fix: pass the class order with --class-map FILE" in done.err
    assert "tracing the network" not in done.err  # nothing took long
    assert not (tmp_path / "out").exists()
    # The fix works in each of its parts.
    order = tmp_path / "map.json"
    order.write_text(json.dumps({str((k + 1) % CLASSES): k for k in range(CLASSES)}))
    assert prune("--data", file, "--class-map", order).code == 0
    done = prune("--data", file, "--allow-chance")
    assert done.code == 0
    assert done.err.count("! the dense network is right on ") == 1


def test_so_do_other_means_and_deviations(command: Callable[..., Any], tmp_path: Path) -> None:
    file = shifted(tmp_path / "a.npz", 0)
    wrong = ("--input-size", "3,16,16", "--mean", "9,9,9", "--std", "0.01,0.01,0.01")
    done = command(*ARGUMENTS, *wrong, "--data", file, "-o", tmp_path / "out")
    assert done.code == 2
    assert "or another --mean and --std than in training" in done.err


def test_a_dry_run_stops_too_and_says_what_it_found(
    prune: Callable[..., Any], command: Callable[..., Any], tmp_path: Path
) -> None:
    told = ("build", "small_models:small", *small_models.FLAGS, "--dry-run", "--json", "--ratio", 0)
    done = command(*told, "--data", shifted(tmp_path / "a.npz", 1))
    assert done.code == 2
    assert "--allow-chance" in done.err
    done = command(*told, "--data", shifted(tmp_path / "b.npz", 0))
    assert done.code == 0, done.err
    assert done.json()["dense_top1"]["calibration"] > 0.5


def test_validation_images_of_their_own_are_checked_too(
    prune: Callable[..., Any], tmp_path: Path
) -> None:
    right, wrong = shifted(tmp_path / "a.npz", 0), shifted(tmp_path / "b.npz", 1, seed=5)
    done = prune("--data", right, "--validation-data", wrong)
    assert done.code == 2
    assert "validation images (" in done.err
    done = prune("--data", right, "--validation-data", shifted(tmp_path / "c.npz", 0, seed=5))
    assert done.code == 0, done.err
    assert "guessing" not in done.err


def test_random_weights_are_called_that_and_go_on(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    done = command(
        "prune", "demo-resnet", "--no-pretrained", "--criterion", "magnitude", "--rounds", "1",
        "--no-refit", "--calibration-samples", 100, "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "! the weights are random (seed 0): accuracy says nothing" in done.err
    assert "guessing" not in done.err


def test_a_finished_build_says_it_in_its_summary(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    done = command(
        "build", "small_models:small", *small_models.FLAGS, *ARGUMENTS[2:], "--latency-runs", 10,
        "--data", shifted(tmp_path / "a.npz", 1), "--allow-chance", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "\ndoubt the dense network is right on " in done.err
    inspected = command("inspect", tmp_path / "out", "--json").json()
    assert ["guessing among their 5 classes" in doubt for doubt in inspected["doubts"]] == [True]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "The dense network is no better than guessing on these images." in report
    # Going on from it does not ask again.
    own = ("--model", "small_models:small", "--data", tmp_path / "a.npz")
    assert command("validate", tmp_path / "out", *own, "--latency-runs", 11).code == 0


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_in_memory_it_is_a_note() -> None:
    images, labels = small_models.pictures(60)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    settings: dict[str, Any] = {"criterion": "magnitude", "rounds": 1, "refit": False}
    for by, count in ((0, 0), (1, 1)):
        told = Notes()
        pruned = cswap_deploy.prune(
            small_models.small(), (x, (labels + by) % CLASSES), progress=told, **settings
        )
        found = [note for note in pruned.notes if "guessing among their 5 classes" in note]
        assert len(found) == count
        assert [note for note in told.said if "guessing" in note] == found


# --- what is told of it --------------------------------------------------------------------------


def test_the_report_calls_it_out() -> None:
    check = DenseCheck(part="calibration", right=7, images=128, classes=10, verdict="at")
    manifest = made_up_manifest(dense_checks=(check,))
    said = render_markdown(manifest, made_up_plan())
    assert "The dense network is no better than guessing on these images." in said
    assert "The dense network is right on 7 of 128 calibration images (5.5%), guessing" in said
    fine = check.model_copy(update={"right": 90, "verdict": "above"})
    assert "guessing" not in render_markdown(made_up_manifest(dense_checks=(fine,)), made_up_plan())


def test_the_report_says_that_weights_are_random() -> None:
    spec = made_up_manifest().model
    random = spec.model_copy(update={"weights": "random (seed 3)"})
    said = render_markdown(made_up_manifest(model=random), made_up_plan())
    assert "The weights are random (seed 3): accuracy says nothing." in said


@pytest.mark.parametrize(
    ("weights", "random"),
    [("random (seed 0)", True), ("random (seed -3)", True), ("random (seed 0).pt", False),
     ("random.safetensors", False), ("as made by random:net", False)],
)  # fmt: skip
def test_only_weights_that_were_drawn_are_random(weights: str, random: bool) -> None:
    spec: ModelSpec = made_up_manifest().model.model_copy(update={"weights": weights})
    assert spec.is_random is random
