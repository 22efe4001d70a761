"""A network with its softmax inside is pruned, exported and reported like the one without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from PIL import Image
from test_api import tensors
from torch import Tensor, nn

import cswap_deploy
from cswap_deploy.errors import ExportError
from cswap_deploy.measure.parity import logits_of, parity, require_parity
from cswap_deploy.progress import Silent
from cswap_deploy.runtime.classifier import Classifier

METHODS: dict[str, dict[str, Any]] = {
    "exact": {"measuring": "exact"},
    "adaptive": {"measuring": "adaptive"},
    "paper": {"method": "paper", "rounds": 2},
}


class Told(Silent):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def without(name: str) -> str:
    return name.removeprefix("0.")


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("kind", ["softmax", "log_softmax"])
def test_the_same_units_go(kind: str, how: str) -> None:
    quick = {"rounds": 2, "scoring_samples": 30, "round_to": 1, "ratio": 0.3} | METHODS[how]
    plain = cswap_deploy.prune(small_models.small(), tensors(), **quick)
    told = Told()
    module = getattr(small_models, f"with_{kind}")()
    done = cswap_deploy.prune(module, tensors(), progress=told, **quick)
    assert [(without(g.name), g.kept) for g in done.plan.groups] == [
        (g.name, g.kept) for g in plain.plan.groups
    ]
    for ours, theirs in zip(done.plan.groups, plain.plan.groups, strict=True):
        for name in ("true_class", "kl"):
            found, wanted = ([getattr(e, name) for e in g.effects] for g in (ours, theirs))
            assert found == pytest.approx(wanted, rel=1e-2, abs=1e-5)
    x, _ = tensors(20, seed=2)
    with torch.no_grad():
        wanted_outputs = plain.module(x).log_softmax(-1)
        got = done.module(x)
    torch.testing.assert_close(
        got if kind == "log_softmax" else got.log(), wanted_outputs, atol=1e-3, rtol=1e-3
    )
    assert not any(m._forward_hooks for m in (*module.modules(), *done.module.modules()))
    (note,) = [n for n in told.notes if "outputs" in n]
    assert ("log-probabilities" if kind == "log_softmax" else "are probabilities") in note
    assert note in done.notes


def test_logits_are_not_spoken_of() -> None:
    told = Told()
    done = cswap_deploy.prune(small_models.small(), tensors(), ratio=0.0, progress=told)
    assert not told.notes
    assert not done.notes


class Dividing(nn.Module):
    """A softmax that no operator of that name stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_models.small()

    def forward(self, x: Tensor) -> Tensor:
        weights = self.net(x).exp()
        return weights / weights.sum(1, keepdim=True)


def test_a_softmax_by_hand_is_one() -> None:
    told = Told()
    cswap_deploy.prune(Dividing(), tensors(), ratio=0.0, progress=told)
    assert "are probabilities" in told.notes[0]


def test_parity_of_probabilities_is_that_of_logits() -> None:
    """With a thousand classes no two rows of probabilities differ by 1e-3."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 1000))
    right, wrong = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logits, -logits))
    names = {"reference_name": "torch", "candidate_name": "onnx", "tolerance": 1e-2}
    images = np.zeros((8, 3, 2, 2), dtype=np.float32)

    def compared(candidate: np.ndarray) -> float:
        runs = (logits_of(lambda _, p=p: p, "probabilities") for p in (right, candidate))  # type: ignore[misc]
        found = parity(*runs, images, batches=(8,), **names)  # type: ignore[arg-type]
        return require_parity(found).max_abs

    assert np.abs(right - wrong).max() < 0.1
    assert compared(right) == 0
    assert compared(right.astype(np.float32)) < 1e-5
    with pytest.raises(ExportError, match="logits differ"):
        compared(wrong)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_whole_build(settings: dict[str, Any], tmp_path: Path, precision: str) -> None:
    given = settings | {"model": "small_models:with_softmax", "target": ("onnxruntime",)}
    bundle = cswap_deploy.build(**given, precision=precision, output=tmp_path / "out")
    assert bundle.manifest.model.output_kind == "probabilities"
    assert any("outputs are probabilities" in note for note in bundle.manifest.fallbacks)
    report = (bundle.path / "report.md").read_text()
    assert "outputs are probabilities" in report
    assert "log-probabilities (the network gives probabilities)" in report
    images, _ = small_models.pictures(4, seed=3)
    x, _ = tensors(4, seed=3)
    with torch.no_grad():
        wanted = bundle.module()(x).numpy()
    assert np.allclose(wanted.sum(1), 1, atol=1e-5)
    classifier = Classifier.open(bundle.path, threads=1)
    for picture, row in zip(images, wanted, strict=True):
        ((best, *_),) = classifier.predict([Image.fromarray(picture)], top=1)
        assert best.probability == pytest.approx(
            row.max(), abs=1e-4 if precision == "fp32" else 0.2
        )
