"""What outputs are, by their values, and turned into one another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from made_up_bundle import reseal
from small_bundle import picture, write_bundle
from small_onnx import small_onnx

from cswap_deploy.runtime.classifier import Classifier
from cswap_deploy.runtime.preprocess import normalise
from cswap_deploy.runtime.probabilities import recognise, to_logits, to_probabilities


def logits(classes: int = 1000, count: int = 32) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 4, (count, classes))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_outputs_are_recognised(classes: int, dtype: type) -> None:
    x = logits(classes)
    assert recognise(x.astype(dtype)) == "logits"
    assert recognise(softmax(x).astype(dtype)) == "probabilities"
    assert recognise(np.log(softmax(x)).astype(dtype)) == "log-probabilities"


@pytest.mark.parametrize(
    "values",
    [
        logits(10) - logits(10).mean(1, keepdims=True) + 0.1,  # sums to one, but below zero
        1 / (1 + np.exp(-logits(10))),  # one sigmoid a class
        np.maximum(logits(10), 0),
        np.full((4, 3), np.nan),
        np.ones((4, 1)),
        np.full((2, 3, 4), 1 / 3),
        np.zeros((0, 5)),
    ],
    ids=["sum", "sigmoids", "relu", "nan", "one", "maps", "none"],
)
def test_what_is_not_a_softmax_counts_as_logits(values: np.ndarray) -> None:
    assert recognise(values) == "logits"


def test_each_becomes_the_other() -> None:
    x = logits(10)
    p = softmax(x)
    for kind, values in (("logits", x), ("probabilities", p), ("log-probabilities", np.log(p))):
        np.testing.assert_allclose(to_probabilities(values, kind), p, atol=1e-12)  # type: ignore[arg-type]
        as_logits = to_logits(values, kind)  # type: ignore[arg-type]
        np.testing.assert_allclose(softmax(as_logits), p, atol=1e-12)
    zero = to_logits(np.array([[1.0, 0.0]], dtype=np.float32), "probabilities")
    assert zero.dtype == np.float32
    assert np.isfinite(zero).all()


def test_a_bundle_of_probabilities_is_shown_as_it_is(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", onnx=small_onnx(last="Softmax"))
    told = (bundle / "manifest.json").read_text()
    assert '"output_kind": "logits"' in told
    changed = told.replace('"output_kind": "logits"', '"output_kind": "probabilities"')
    reseal(bundle / "manifest.json", json.loads(changed))
    classifier = Classifier.open(bundle, threads=1)
    pixels = classifier.prepare(picture(0))[None]
    given = classifier._session.run(normalise(pixels, classifier.bundle.transform))
    assert recognise(given) == "probabilities"
    (guesses,) = classifier.predict([picture(0)], top=5)
    assert [g.probability for g in guesses] == pytest.approx(sorted(given[0].tolist())[::-1])
    np.testing.assert_allclose(classifier.logits(pixels), np.log(given), rtol=1e-6)
