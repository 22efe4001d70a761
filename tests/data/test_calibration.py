"""Calibration sets from what a caller has in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cswap_deploy.config import DataConfig, ModelConfig
from cswap_deploy.data import Calibration, calibration_from
from cswap_deploy.errors import UsageError
from cswap_deploy.progress import Silent

SIZE = (3, 8, 8)
CLASSES = 4


def network(classes: int = CLASSES) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, classes, 3), nn.BatchNorm2d(classes), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


def images(labels: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """(N, 3, 8, 8) float32; the first value of each image is its position."""
    made = np.random.default_rng(seed).normal(size=(len(labels), *SIZE)).astype(np.float32)
    made[:, 0, 0, 0] = np.arange(len(labels))
    return made


def draw(
    data: Any, samples: int = 12, *, seed: int = 0, module: nn.Module | None = None, **given: Any
) -> Calibration:
    return calibration_from(
        data,
        network() if module is None else module,
        model=ModelConfig(model="mine", **given),
        config=DataConfig(calibration_samples=samples),
        seed=seed,
        progress=Silent(),
    )


def positions(drawn: Calibration) -> list[int]:
    return drawn.images[:, 0, 0, 0].int().tolist()


@pytest.mark.parametrize("kind", ["arrays", "tensors", "list", "batches", "generator", "loader"])
def test_every_form_gives_a_balanced_set(kind: str) -> None:
    labels = np.random.default_rng(1).permutation(np.arange(60) % CLASSES)
    x = images(labels)
    tensors = TensorDataset(torch.from_numpy(x), torch.from_numpy(labels))
    batches = [(x[i : i + 7], labels[i : i + 7]) for i in range(0, 60, 7)]
    forms: dict[str, Any] = {
        "arrays": (x.astype(np.float64), labels.astype(np.int32)),
        "tensors": (torch.from_numpy(x).requires_grad_(), torch.from_numpy(labels)),
        "list": [x, labels.tolist()],
        "batches": batches,
        "generator": iter(batches),
        "loader": DataLoader(tensors, batch_size=16, shuffle=True),
    }
    drawn = draw(forms[kind])
    assert (drawn.images.shape, drawn.images.dtype) == ((12, *SIZE), torch.float32)
    assert drawn.images.is_contiguous(memory_format=torch.channels_last)
    assert not drawn.images.requires_grad
    assert (drawn.labels.shape, drawn.labels.dtype) == ((12,), torch.int64)
    assert torch.bincount(drawn.labels).tolist() == [3] * CLASSES
    assert sorted(drawn.labels[:4].tolist()) == [0, 1, 2, 3]  # so is any beginning
    taken = positions(drawn)
    assert len(set(taken)) == 12
    np.testing.assert_array_equal(drawn.labels, labels[taken])
    np.testing.assert_array_equal(drawn.images, x[taken])


def test_the_seed_decides() -> None:
    labels = np.arange(60) % CLASSES
    data = (images(labels), labels)
    assert positions(draw(data, seed=3)) == positions(draw(data, seed=3))
    assert positions(draw(data, seed=3)) != positions(draw(data, seed=4))


def test_the_callers_data_and_network_stay_as_they_are() -> None:
    labels = np.arange(20) % CLASSES
    x, module = images(labels), network()
    kept, state = x.copy(), {k: v.clone() for k, v in module.state_dict().items()}
    drawn = draw((x, labels), 20, module=module)
    drawn.images.zero_()
    drawn.labels.zero_()
    np.testing.assert_array_equal(x, kept)
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3]
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_all_images_of_small_data_are_taken() -> None:
    labels = np.array([0, 0, 0, 0, 0, 1, 3])
    drawn = draw((images(labels), labels), 100)
    assert sorted(positions(drawn)) == list(range(7))
    assert torch.bincount(drawn.labels).tolist() == [5, 1, 0, 1]


def endless() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        yield torch.randn(8, *SIZE), torch.arange(8) % 2


def test_a_shuffled_loader_is_left_early_and_a_sorted_one_read_to_its_end() -> None:
    read = 0

    def counted(labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal read
        for start in range(0, len(labels), 10):
            read += 1
            part = labels[start : start + 10]
            yield images(part), part

    draw(counted(np.arange(1000) % CLASSES))
    assert read == 2
    read = 0
    drawn = draw(counted(np.arange(400) // 100))
    assert read == 40 - 9  # the last class is full after its first batch
    assert torch.bincount(drawn.labels).tolist() == [3] * CLASSES
    # Two of four classes, without end: what is missing comes from the classes there are.
    assert torch.bincount(draw(endless()).labels).tolist() == [6, 6]


def test_a_path_needs_preprocessing_and_chooses_as_arrays_do(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).permutation(np.arange(60) % CLASSES)
    pixels = np.random.default_rng(2).integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    steps: dict[str, Any] = {"input_size": SIZE, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    drawn = draw(tmp_path / "a.npz", **steps)
    x = (pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - np.float32(0.5)) / (
        np.float32(0.25)
    )
    same = draw((x, labels))
    np.testing.assert_array_equal(drawn.images, same.images)
    np.testing.assert_array_equal(drawn.labels, same.labels)
    with pytest.raises(UsageError, match="mine does not say how its pictures are prepared"):
        draw(str(tmp_path / "a.npz"))
    with pytest.raises(UsageError, match="nothing does not exist"):
        draw(tmp_path / "nothing", **steps)


LABELS = np.arange(20) % CLASSES
X = images(LABELS)
BROKEN = X.copy()
BROKEN[3, 1, 2, 2] = np.nan


@pytest.mark.parametrize(
    ("data", "words", "fix"),
    [
        (None, "is of type NoneType", r"pass \(images, labels\), images alone, a DataLoader"),
        (TensorDataset(torch.from_numpy(X)), "is of type TensorDataset", "a DataLoader"),
        ([{"x": X}], "is a dict, not a pair", "a DataLoader"),
        ([], "has no batches", "a DataLoader"),
        ((X[0], LABELS), r"have shape \(3, 8, 8\), \(N, C, H, W\) is wanted", "a DataLoader"),
        ((X.astype(np.uint8), LABELS), "are uint8, normalised float32 is wanted", "normalise them"),
        ((X, LABELS[:-1]), r"labels have shape \(19,\) and type int64 for 20", "class indices"),
        ((X, np.eye(4)[LABELS]), r"labels have shape \(20, 4\)", r"labels.argmax\(1\)"),
        ((X, LABELS / 2), "type float64 for 20 images", "class indices"),
        ((X, LABELS + 1), r"out of range in .*: 4; mine has 4 classes, 0\.\.3", "indices: labels"),
        ((X, LABELS - 1), "out of range in the calibration data: -1", "class indices"),
        ((X, LABELS * 0), "has 20 images, all of class 0: effects are", "images of all classes"),
        ((X[:1], LABELS[:1]), "has 1 image, all of class 0", "images of all classes"),
        ((X[:0], LABELS[:0]), "has 0 images: effects are compared", "images of all classes"),
        ((X[:, :2], LABELS), r"mine does not take an image of .* \(2, 8, 8\)", None),
        ([(X, LABELS), (X[..., :7], LABELS)], r"\(3, 8, 8\) and \(3, 8, 7\)", "one size"),
        ((BROKEN, LABELS), "1 of 20 calibration images have values that are not finite", "normal"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_is_refused(data: Any, words: str, fix: str | None) -> None:
    with pytest.raises(UsageError, match=words) as err:
        draw(data, 40)
    if fix is not None:
        with pytest.raises(UsageError, match=f"fix: .*{fix}"):
            raise err.value


def test_one_image_cannot_be_of_two_classes() -> None:
    with pytest.raises(UsageError, match=r"has 1 image, .*\n.*raise calibration_samples"):
        draw((X, LABELS), 1)
