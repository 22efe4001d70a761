from __future__ import annotations

import gc
import platform
from pathlib import Path

import numpy as np
import pytest

from cswap_deploy.errors import StageError
from cswap_deploy.measure.accuracy import Predicted, accuracy, accuracy_change, predict
from cswap_deploy.measure.device import describe_device, list_gpus
from cswap_deploy.measure.latency import SETTLED, WARMUP_LIMIT, measure_latency
from cswap_deploy.measure.parity import parity
from cswap_deploy.runtime.host import cuda_problem
from cswap_deploy.runtime.session import CallTimes, Session

NAMES = {"reference_name": "torch", "candidate_name": "onnx", "tolerance": 1e-3}


def first_pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)[:, :3].copy()


def numbered(count: int) -> np.ndarray:
    return np.arange(count * 12, dtype=np.float32).reshape(count, 3, 2, 2)


# --- parity --------------------------------------------------------------------------------------


def test_parity_finds_the_largest_difference() -> None:
    def candidate(images: np.ndarray) -> np.ndarray:
        logits = first_pixels(images)
        logits[images[:, 0, 0, 0] == 60, 1] -= 0.5  # image 5
        return logits

    result = parity(first_pixels, candidate, numbered(10), **NAMES, batches=(1, 4))
    assert result.max_abs == 0.5
    assert not result.ok
    assert (result.images, result.batches) == (10, (1, 4))
    assert parity(first_pixels, first_pixels, numbered(10), **NAMES).max_abs == 0.0


def test_parity_sees_what_goes_wrong_at_one_batch_size_only() -> None:
    def candidate(images: np.ndarray) -> np.ndarray:
        return first_pixels(images) + (len(images) == 8)

    assert parity(first_pixels, candidate, numbered(10), **NAMES, batches=(1, 8)).max_abs == 1.0
    assert parity(first_pixels, candidate, numbered(10), **NAMES, batches=(1, 4)).ok


def test_parity_says_which_batches_it_really_compared() -> None:
    assert parity(first_pixels, first_pixels, numbered(3), **NAMES).batches == (1, 3)
    with pytest.raises(ValueError, match="0 images"):
        parity(first_pixels, first_pixels, numbered(0), **NAMES)


def test_parity_refuses_what_cannot_be_compared() -> None:
    def broken(images: np.ndarray) -> np.ndarray:
        logits = first_pixels(images)
        logits[-1, :2] = np.nan, np.inf
        return logits

    with pytest.raises(StageError) as caught:
        parity(first_pixels, broken, numbered(4), **NAMES, batches=(4,))
    assert str(caught.value) == "2 of 12 logits of onnx are not finite, on images 0 to 3 at batch 4"
    with pytest.raises(StageError, match="logits of torch are not finite"):
        parity(broken, broken, numbered(4), **NAMES)
    with pytest.raises(
        StageError, match=r"onnx gives outputs of shape \(1, 2\), torch of \(1, 3\)"
    ):
        parity(first_pixels, lambda x: first_pixels(x)[:, :2], numbered(4), **NAMES)


# --- accuracy ------------------------------------------------------------------------------------


def test_predict_batches_arrays_and_iterators_alike() -> None:
    seen: list[int] = []

    def run(images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return first_pixels(images)

    images = numbered(7)
    expected = first_pixels(images)
    assert np.array_equal(predict(run, images, batch=3), expected)
    assert seen == [3, 3, 1]
    parts = (images[:5], images[5:])
    assert np.array_equal(predict(run, iter(parts), batch=3), expected)
    assert seen[3:] == [3, 2, 2]


def test_predict_refuses_nan() -> None:
    def run(images: np.ndarray) -> np.ndarray:
        return np.where(images[:, 0, 0, :1] == 48, np.nan, first_pixels(images))

    with pytest.raises(StageError, match=r"3 of 6 logits of the network .* on images 4 to 5"):
        predict(run, numbered(7), batch=2)


def sure(classes: np.ndarray, confidence: float = 1.0) -> Predicted:
    return Predicted(classes, np.full(len(classes), confidence, dtype=np.float32))


def test_accuracy_by_hand() -> None:
    predicted = np.array([0, 1, 2, 2, 4, 5, 6, 7, 9, 9])
    result = accuracy(sure(predicted), np.arange(10))
    assert (result.top1, result.images) == (0.8, 10)
    assert (result.low, result.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert result.calibration_error == pytest.approx(0.2), "sure of all, right on four fifths"
    perfect = accuracy(sure(np.arange(4)), np.arange(4))
    assert (perfect.top1, perfect.high, perfect.calibration_error) == (1.0, 1.0, 0.0)
    modest = accuracy(sure(predicted, 0.8), np.arange(10))
    assert modest.calibration_error == pytest.approx(0.0, abs=1e-6)


def test_accuracy_change_by_hand() -> None:
    """98 images: dense alone right on 9, pruned alone on 3, both wrong alike on 2, unlike on 1."""
    labels = np.zeros(98, dtype=np.int64)
    dense, pruned = labels.copy(), labels.copy()
    pruned[:9] = 1
    dense[9:12] = 1
    dense[12:14] = pruned[12:14] = 2
    dense[14], pruned[14] = 3, 4
    change = accuracy_change(sure(dense), sure(pruned), labels)
    assert change.dense.top1 == pytest.approx((98 - 6) / 98)
    assert change.pruned.top1 == pytest.approx((98 - 12) / 98)
    assert change.drop == pytest.approx(6 / 98)
    half = 1.959963984540054 * ((0.14 - 0.0036) / 100) ** 0.5
    assert (change.low, change.high) == pytest.approx((0.06 - half, 0.06 + half))
    assert change.agreement == pytest.approx((98 - 13) / 98)
    # Exact: 3 or fewer, or 9 or more, of 12 throws of a coin.
    assert change.p_value == pytest.approx(2 * (1 + 12 + 66 + 220) / 2**12)


def test_accuracy_refuses_logits_and_nothing() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2,\)"):
        accuracy(sure(np.zeros((2, 3), dtype=np.int64)), np.zeros(2, dtype=np.int64))
    with pytest.raises(ValueError, match="N > 0"):
        accuracy(sure(np.zeros(0, dtype=np.int64)), np.zeros(0, dtype=np.int64))


# --- latency -------------------------------------------------------------------------------------


class Recorder(Session):
    """A session that notes the order of the calls."""

    provider = "CPUExecutionProvider"
    threads = 1

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def run(self, images: np.ndarray) -> np.ndarray:
        assert not gc.isenabled()
        self.calls.append(self.name)
        return first_pixels(images)


def test_latency_interleaves_and_keeps_the_samples() -> None:
    calls: list[str] = []
    sessions = {name: Recorder(name, calls) for name in ("dense", "pruned")}
    result = measure_latency(sessions, images=numbered(2), runs=30, warmup=5)
    assert calls == ["dense", "pruned"] * (len(calls) // 2)
    assert gc.isenabled()
    for latency in result.values():
        assert len(latency.samples_ms) == 30
        assert len(calls) == 2 * (latency.warmup + 30)
        assert 5 <= latency.warmup <= WARMUP_LIMIT * 5
        assert latency.p50_ms == pytest.approx(float(np.percentile(latency.samples_ms, 50)))
        assert min(latency.samples_ms) <= latency.p50_ms <= latency.p90_ms <= latency.p99_ms
        assert latency.mean_ms == pytest.approx(sum(latency.samples_ms) / 30)
        assert (latency.batch, latency.threads) == (2, 1)
        assert latency.provider == "CPUExecutionProvider"


def test_latency_turns_the_collector_on_again_after_an_error() -> None:
    class Failing(Recorder):
        def run(self, images: np.ndarray) -> np.ndarray:
            raise StageError("refused")

    with pytest.raises(StageError, match="refused"):
        measure_latency({"a": Failing("a", [])}, images=numbered(1), runs=10)
    assert gc.isenabled()


class Scripted(Recorder):
    """Its device times (milliseconds) are those of a script, whose last entry repeats."""

    def __init__(self, script: list[float]) -> None:
        super().__init__("scripted", [])
        self.script = script

    def timed(self, images: np.ndarray) -> tuple[np.ndarray, CallTimes]:
        logits = self.run(images)
        time = self.script[min(len(self.calls), len(self.script)) - 1]
        return logits, CallTimes(0.0, time, 0.0)


@pytest.mark.parametrize(
    ("script", "least"),
    [
        ([1.0], 20),  # two windows of ten
        ([1.0 + 2 * SETTLED] * 10 + [1.0], 25),  # the older window's median is half way down
        ([9.0] * 10 + [1.0], 26),  # and at 1.0
    ],
)
def test_warm_up_goes_on_until_the_median_stands_still(script: list[float], least: int) -> None:
    """The host's own times may keep it going for longer."""
    sessions = {"a": Scripted(script)}
    latency = measure_latency(sessions, images=numbered(1), runs=1, warmup=15)["a"]
    assert least <= latency.warmup <= 15 * WARMUP_LIMIT


# --- device --------------------------------------------------------------------------------------


def test_device_is_described() -> None:
    device = describe_device()
    assert device.cpu
    assert device.cores >= 1
    assert device.memory_mib > 100
    assert device.platform == platform.platform()
    assert device.gpus == list_gpus()


def test_gpus_are_listed_as_nvidia_smi_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted nvidia-smi, first one that lists two GPUs, then one that finds no driver."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    tool.write_text(
        "#!/bin/sh\necho 'NVIDIA L4, 570.1, 23034 MiB'\necho 'NVIDIA A2, 570.1, [N/A]'\n"
    )
    tool.chmod(0o755)
    assert list_gpus() == ("NVIDIA L4 (driver 570.1, 23034 MiB)", "NVIDIA A2 (driver 570.1, [N/A])")
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert list_gpus() == ()


def test_without_a_driver_the_loaders_words_are_told() -> None:
    problem = cuda_problem()
    if not problem:
        pytest.skip("this machine has a GPU")
    assert "driver" in problem
