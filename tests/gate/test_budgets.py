"""Budgets pass, fail, and never pass unseen."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from made_up_bundle import accuracy_change, made_up_manifest, made_up_targets

from cswap_deploy.errors import GateError, UsageError
from cswap_deploy.gate.budgets import (
    Budgets,
    EngineBudget,
    LatencyBudget,
    check_budgets,
    read_budgets,
    require,
)
from cswap_deploy.gate.junit import to_junit
from cswap_deploy.records.manifest import Manifest

EXAMPLE = """
accuracy_drop_max = 0.02
top1_min = 0.9
parity_max = 1e-3
size_max_mib = 4.0
params_max = 200_000
macs_max = 30_000_000

[latency.onnxruntime]
p50_ms = 5
p99_ms = 9.0
speedup_min = 1.1
batch = 1

[engine.tensorrt-rtx]
size_max_mib = 5.0
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "budgets.toml"
    path.write_text(text)
    return path


# --- reading -------------------------------------------------------------------------------------


def test_the_documented_file_is_read_and_met(tmp_path: Path) -> None:
    budgets = read_budgets(written(tmp_path, EXAMPLE))
    assert budgets.latency["onnxruntime"].p50_ms == 5.0
    results = check_budgets(made_up_manifest(), budgets)
    assert [result.name for result in results] == [
        "accuracy_drop_max",
        "top1_min",
        "parity_max",
        "size_max_mib",
        "params_max",
        "macs_max",
        "latency.onnxruntime.p50_ms",
        "latency.onnxruntime.p99_ms",
        "latency.onnxruntime.speedup_min",
        "engine.tensorrt-rtx.size_max_mib",
    ]
    assert all(result.ok for result in results)
    require(results)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "size_max = 4",
            "size_max: no such budget; did you mean size_max_mib? known here: inconclusive, "
            "accuracy_drop_max, "
            "top1_min, agreement_min, output_db_min, parity_max, size_max_mib, params_max, "
            "macs_max, latency, engine",
        ),
        (
            "[latency.onnxruntime]\np95_ms = 1",
            "latency.onnxruntime.p95_ms: no such budget; did you mean p99_ms? known here: p50_ms, "
            "p90_ms, p99_ms, throughput_min, memory_max_mib, speedup_min, slowdown_max, batch",
        ),
        ("accuracy_drop_max = 2", "accuracy_drop_max: Input should be less than or equal to 1"),
        ("size_max_mib = -1", "(got -1)"),
        ("size_max_mib = nan", "size_max_mib: Input should be a finite number"),
        ("size_max_mib = true", "size_max_mib: Input should be a valid number (got True)"),
        ("params_max = 1.5", "params_max: Input should be a valid integer"),
        ("[latency]\np50_ms = 1", "latency.p50_ms: "),
    ],
)
def test_a_bad_budget_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_budgets(path)
    assert str(caught.value).startswith(f"bad budgets in {path}:\n  ")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "[latency.onnxruntime]\nbatch = 1", "[engine.x]"])
def test_a_file_without_limits_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="sets no limit, so it would pass anything\n  fix: set"):
        read_budgets(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the budgets .*No such file"):
        read_budgets(tmp_path / "budgets.toml")
    with pytest.raises(UsageError, match=r"cannot read the budgets .*Invalid value"):
        read_budgets(written(tmp_path, "size_max_mib ="))


# --- results -------------------------------------------------------------------------------------


def only(budgets: Budgets, manifest: Manifest | None = None) -> tuple[bool, str]:
    (result,) = check_budgets(manifest or made_up_manifest(), budgets)
    return result.ok, result.text


def test_a_limit_holds_up_to_its_value() -> None:
    size = made_up_manifest().onnx.size_bytes / 2**20
    assert only(Budgets(size_max_mib=size))[0]
    assert not only(Budgets(size_max_mib=math.nextafter(size, 0)))[0]
    assert only(Budgets(params_max=163_120))[0]
    assert not only(Budgets(params_max=163_119))[0]


def test_the_drop_is_the_worst_of_where_it_was_measured() -> None:
    manifest = made_up_manifest(torch_accuracy=accuracy_change(0.031))
    assert only(Budgets(accuracy_drop_max=0.02), manifest) == (
        False,
        "top-1 drop (PyTorch) 3.10 points, limit at most 2.00 points; not run: tensorrt-rtx",
    )
    ok, text = only(Budgets(top1_min=0.89), manifest)
    assert not ok
    assert text.startswith("top-1 (PyTorch, 2,000 images) 88.95 %, limit at least 89.00 %")


def test_accuracy_in_pytorch_alone_is_not_that_of_the_engines() -> None:
    manifest = made_up_manifest(targets=made_up_targets()[1:])
    assert only(Budgets(accuracy_drop_max=0.5), manifest) == (
        False,
        "not measured: no engine was run on validation images (targets: tensorrt-rtx); "
        "limit at most 50.00 points",
    )
    assert only(Budgets(accuracy_drop_max=0.5), made_up_manifest(targets=()))[0]


def test_what_was_not_measured_fails() -> None:
    nothing = made_up_manifest(targets=(), torch_accuracy=None, export_parity=())
    assert only(Budgets(accuracy_drop_max=1.0), nothing) == (
        False,
        "not measured: no validation images were scored; limit at most 100.00 points",
    )
    assert only(Budgets(parity_max=1.0), nothing) == (
        False,
        "not measured: no graph was compared; limit at most 1",
    )
    assert only(Budgets(latency={"tensorrt": LatencyBudget(p50_ms=1.0)})) == (
        False,
        "not measured: the bundle has no target tensorrt (it has: onnxruntime, tensorrt-rtx); "
        "limit at most 1.000 ms",
    )
    assert only(Budgets(latency={"tensorrt-rtx": LatencyBudget(p50_ms=1e9)})) == (
        False,
        "not measured: the engine was not run: no NVIDIA driver is present, so the engine was "
        "built ahead of time and not run; limit at most 1000000000.000 ms",
    )
    ok, text = only(Budgets(engine={"tensorrt": EngineBudget(size_max_mib=1.0)}))
    assert not ok
    assert text.startswith("not measured: the bundle has no target tensorrt")


@pytest.mark.parametrize(
    ("limit", "p50", "text"),
    [
        (0.0001, 0.61, "0.6100 ms, limit at most 0.0001 ms"),
        (0.0001, 0.00005, "0.00005 ms, limit at most 0.0001 ms"),
        (5.0004, 5.0005, "5.0005 ms, limit at most 5.0004 ms"),
        (5.0, 5.00001, "5.00001 ms, limit at most 5.000 ms"),
        (5.0, 5.0, "5.000 ms, limit at most 5.000 ms"),
    ],
)
def test_small_numbers_keep_their_digits(limit: float, p50: float, text: str) -> None:
    ran = made_up_targets()[0]
    latency = ran.latency.model_copy(update={"p50_ms": p50})  # type: ignore[union-attr]
    manifest = made_up_manifest(targets=(ran.model_copy(update={"latency": latency}),))
    results = check_budgets(manifest, Budgets(latency={"onnxruntime": LatencyBudget(p50_ms=limit)}))
    assert results[0].text == f"p50 (onnxruntime, batch 1) {text}"
    assert text in to_junit(results, suite="x")


def test_every_limit_keeps_its_digits() -> None:
    budgets = Budgets(
        accuracy_drop_max=0.00001, top1_min=0.000002, parity_max=1e-9, size_max_mib=0.00004,
        params_max=1, macs_max=2, latency={"onnxruntime": LatencyBudget(speedup_min=0.0003)},
        engine={"onnxruntime": EngineBudget(size_max_mib=0.00005)},
    )  # fmt: skip
    texts = {r.name: r.text for r in check_budgets(made_up_manifest(), budgets)}
    for name, limit in {
        "accuracy_drop_max": "0.001 points", "top1_min": "0.0002 %", "parity_max": "1e-09",
        "size_max_mib": "0.00004 MiB", "params_max": "1 parameters", "macs_max": "2 MACs",
        "latency.onnxruntime.speedup_min": "0.0003x",
        "engine.onnxruntime.size_max_mib": "0.00005 MiB",
    }.items():  # fmt: skip
        assert texts[name].partition("; ")[0].endswith(f" {limit}")


def test_latency_of_another_batch_does_not_count() -> None:
    assert only(Budgets(latency={"onnxruntime": LatencyBudget(p50_ms=9.0, batch=8)})) == (
        False,
        "not measured: measured at batch 1, the budget is for batch 8; limit at most 9.000 ms",
    )


def test_speed_up_needs_the_dense_graph() -> None:
    budgets = Budgets(latency={"onnxruntime": LatencyBudget(speedup_min=1.0)})
    assert only(budgets)[0]
    ran = made_up_targets()[0].model_copy(update={"dense_latency": None})
    assert only(budgets, made_up_manifest(targets=(ran,))) == (
        False,
        "not measured: the dense graph was not timed; limit at least 1.00x",
    )


def test_not_a_number_fails() -> None:
    worst = made_up_manifest().export_parity[0].model_copy(update={"max_abs": math.nan})
    for others in ((), (made_up_manifest().export_parity[0],)):
        manifest = made_up_manifest(export_parity=(*others, worst))
        assert not only(Budgets(parity_max=1.0), manifest)[0]


def test_failed_budgets_end_in_exit_code_3_with_all_their_names() -> None:
    budgets = Budgets(
        size_max_mib=0.5, params_max=1, latency={"onnxruntime": LatencyBudget(p50_ms=5.0)}
    )
    with pytest.raises(GateError) as caught:
        require(check_budgets(made_up_manifest(), budgets))
    assert str(caught.value) == (
        "2 of 3 budgets failed:\n"
        "  size_max_mib: model.onnx 0.638 MiB, limit at most 0.500 MiB\n"
        "  params_max: pruned network 163,120 parameters, limit at most 1 parameters"
    )
    assert caught.value.exit_code == 3


def test_without_classes_outputs_are_held_in_decibels() -> None:
    from cswap_deploy.records.measurements import OutputChange, OutputError

    def change(*errors: float | None) -> OutputChange:
        named = (OutputError(name=f"o{i}", error_db=e) for i, e in enumerate(errors))
        return OutputChange(outputs=tuple(named), images=10)

    whole = made_up_manifest()
    (first, *_) = whole.targets
    model = whole.model.model_copy(update={"task": "features"})
    target = first.model_copy(update={"accuracy": None, "outputs": change(41.0, None, 35.5)})
    manifest = whole.model_copy(
        update={"model": model, "torch_accuracy": None, "targets": (target,),
                "torch_outputs": change(50.0)}
    )  # fmt: skip
    (met,) = check_budgets(manifest, Budgets(output_db_min=35.0))
    assert (met.ok, met.measured) == (True, 35.5)
    assert "35.5 dB, limit at least 35.0 dB" in met.text
    (missed,) = check_budgets(manifest, Budgets(output_db_min=36.0))
    assert not missed.ok
    (unseen,) = check_budgets(manifest, Budgets(accuracy_drop_max=0.1))
    assert (unseen.ok, "output_db_min is for it" in unseen.text) == (False, True)
    (other,) = check_budgets(whole, Budgets(output_db_min=1.0))
    assert (other.ok, "a classifier is held against" in other.text) == (False, True)
    same = manifest.model_copy(update={"targets": (), "torch_outputs": change(None)})
    assert check_budgets(same, Budgets(output_db_min=90.0))[0].ok
