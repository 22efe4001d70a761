"""Output errors, decisions and the user's own figure, worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cswap_deploy.errors import ExportError, GateError, StageError, UsageError
from cswap_deploy.measure import metric, outputs
from cswap_deploy.measure.engine import require_outputs
from cswap_deploy.measure.metric import load_metric, measure_metric, metric_digest
from cswap_deploy.measure.outputs import output_change, relative_error, worst_words
from cswap_deploy.measure.parity import parity, require_parity
from cswap_deploy.records.measurements import OutputChange


def floats(*values: Any) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_error_in_decibels_by_hand() -> None:
    """Over two batches: ||o||^2 = 25 + 75 = 100, ||o - o*||^2 = 1, so 20 dB."""
    pairs = [
        ({"a": floats([3, 4]), "b": floats([1.0])}, {"a": floats([3, 3]), "b": floats([1.0])}),
        ({"a": floats([5, 50**0.5]), "b": floats([2.0])},) * 2,
    ]
    change = output_change(pairs, "any")
    assert change.images == 2
    a, b = change.outputs
    assert (a.name, a.agreement) == ("a", None)
    assert a.error_db == pytest.approx(20.0, abs=1e-6)
    assert (b.error_db, change.worst_db) == (None, a.error_db)
    assert relative_error(change) == pytest.approx(0.01)
    assert worst_words(change) == "a 20.0 dB"


@pytest.mark.parametrize(
    ("task", "before", "after", "share"),
    [
        ("binary", floats([1, -1], [2, 3]), floats([1, 1], [2, 3]), 3 / 4),
        # never outside 0..1: probabilities
        ("binary", floats([0.9, 0.2], [0.6, 0.4]), floats([0.9, 0.7], [0.8, 0.1]), 3 / 4),
        ("classify", floats([1, 2], [3, 4]), floats([2, 1], [3, 4]), 1 / 2),
        # (1, 2 channels, 1, 3 pixels)
        ("dense", floats([[[1, 1, 1]], [[0, 2, 0]]]), floats([[[1, 1, 1]], [[2, 2, 0]]]), 2 / 3),
        ("features", floats([1, 2]), floats([2, 1]), None),
        ("any", np.array([[1, 2, 3, 4]]), np.array([[1, 2, 3, 5]]), 3 / 4),
    ],
)
def test_decisions_by_hand(task: Any, before: Any, after: Any, share: float | None) -> None:
    (found,) = output_change([({"o": before}, {"o": after})], task).outputs
    assert found.agreement == share


def test_large_outputs_are_compared_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 5, 3, 4, 4)).astype(np.float32)
    whole = output_change([({"o": before}, {"o": after})], "dense")
    monkeypatch.setattr(outputs, "_PIECE", 100)
    pieces = output_change([({"o": before}, {"o": after})], "dense")
    assert pieces.outputs[0].error_db == pytest.approx(whole.outputs[0].error_db)
    assert pieces.outputs[0].agreement == whole.outputs[0].agreement


def test_outputs_that_do_not_match_or_are_not_finite() -> None:
    one = {"o": floats([1, 2])}
    with pytest.raises(StageError, match=r"output o has shape \(1, 2\) before and nothing after"):
        output_change([(one, {"p": floats([1, 2])})], "any")
    with pytest.raises(StageError, match=r"shape \(1, 3\) after"):
        output_change([(one, {"o": floats([1, 2, 3])})], "any")
    with pytest.raises(StageError, match="1 of 2 values of o are not finite"):
        output_change([(one, {"o": floats([1, math.nan])})], "any")


def test_parity_of_large_outputs_is_relative() -> None:
    def run(shift: float) -> Any:
        return lambda images: {
            "boxes": np.full((len(images), 4), 500, np.float32) + np.float32(shift),
            "best": np.zeros(len(images), np.int64) + int(shift > 0),
        }

    names = {"reference_name": "torch", "candidate_name": "onnx"}
    few = np.zeros((3, 1, 2, 2), np.float32)
    found = parity(run(0), run(0.25), few, tolerance=1e-3, **names)
    assert (found.relative, found.ok) == (True, True)
    assert found.max_abs == pytest.approx(0.25 / 500)
    with pytest.raises(ExportError, match=r"outputs differ by up to 2\.00e-03"):
        require_parity(parity(run(0), run(1), few, tolerance=1e-3, **names))
    with pytest.raises(StageError, match="onnx gives outputs other, torch boxes, best"):
        parity(run(0), lambda _: {"other": few}, few, tolerance=1e-3, **names)


def test_the_gate_of_a_precision_is_on_the_squared_error() -> None:
    change = output_change([({"o": floats([10, 0])}, {"o": floats([10, 1])})], "any")
    require_outputs(change, "onnxruntime", precision="int8", limit=0.01, measured_on="it")
    with pytest.raises(GateError, match=r"by 1\.00e-02 of their squared size \(o 20\.0 dB"):
        require_outputs(change, "onnxruntime", precision="fp16", limit=0.001, measured_on="it")


def test_a_metric_sees_all_outputs_and_labels_once() -> None:
    batches = [{"logits": floats([1, 2], [4, 3])}, {"logits": floats([0, 1])}]
    labels = np.array([1, 0, 0])
    found = measure_metric("small_tasks:share_right", batches, labels, images=3, what="it")
    assert found == pytest.approx(2 / 3)
    several = [{"a": floats([1]), "b": floats([3])}]
    assert measure_metric("small_tasks:mean_of_outputs", several, None, images=1, what="it") == 4
    assert len(metric_digest("small_tasks:share_right")) == 64


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("share_right", "names no function"),
        ("no_such_module_here:f", "does not import"),
        ("small_tasks:absent", "has no function 'absent'"),
    ],
)
def test_a_metric_that_is_not_there(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as err:
        load_metric(name)
    assert "package.module:function" in str(err.value)


def test_a_metric_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [{"o": floats([1, 2])}]
    with pytest.raises(UsageError, match="returned 'good' on the dense network"):
        measure_metric("small_tasks:no_number", batch, None, images=1, what="the dense network")
    with pytest.raises(UsageError, match=r"raised AssertionError.*small_tasks\.py"):
        measure_metric("small_tasks:mean_of_outputs", batch, floats(1), images=1, what="it")
    monkeypatch.setattr(metric, "MOST_BYTES", 79)
    with pytest.raises(UsageError, match="take") as err:
        measure_metric("small_tasks:share_right", batch, None, images=10, what="it")
    assert err.value.fix == "--validation-samples 9"


def test_a_change_can_be_saved() -> None:
    change = output_change([({"o": floats([1, 2])},) * 2], "any")
    assert OutputChange.model_validate_json(change.canonical_json()) == change
