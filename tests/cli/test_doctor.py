from __future__ import annotations

import json
from pathlib import Path

import pytest

from cswap_deploy.cli import doctor
from cswap_deploy.cli.doctor import Finding, examine


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine()}


def plant(folder: Path, name: str, code: str, version: str = "") -> None:
    """A package that pip would call installed, with this code."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    if version:
        register(folder, name, version)


def register(folder: Path, distribution: str, version: str) -> None:
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {distribution}\nVersion: {version}\n")


def test_everything_is_looked_at(findings: dict[str, Finding]) -> None:
    assert set(findings) >= {
        "python",
        "torch",
        "torchvision",
        "timm",
        "torch-pruning",
        "onnx",
        "onnxscript",
        "onnxsim",
        "onnxruntime",
        "tensorrt",
        "tensorrt-rtx",
        "GPU",
        "pycuda",
        "nvidia-ml-py",
        "openvino",
        "nncf",
        "nvidia-modelopt",
        "datasets",
        "demo networks",
        "store",
        "CSWAP_DATA",
    }


def test_what_the_tests_themselves_need_is_well(findings: dict[str, Finding]) -> None:
    for name in ("python", "torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxsim"):
        assert findings[name].state in ("ok", "warn"), findings[name]
    assert "build" in findings["torch"].detail


def test_what_is_not_well_says_why(findings: dict[str, Finding]) -> None:
    for finding in findings.values():
        assert finding.detail, finding
        if finding.state in ("missing", "broken") and finding.name != "GPU":
            assert finding.fix, finding


def test_installed_runtimes_tell_what_they_can_do(findings: dict[str, Finding]) -> None:
    pytest.importorskip("onnxruntime")
    assert "CPUExecutionProvider" in findings["onnxruntime"].detail


def test_rtx_builder_is_really_made(findings: dict[str, Finding]) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert findings["tensorrt-rtx"].state == "ok"
    assert "builds engines" in findings["tensorrt-rtx"].detail


def test_absent_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    finding = doctor._tensorrt("tensorrt", "tensorrt_not_there", "trt")
    assert finding == Finding(
        "tensorrt",
        "missing",
        "not installed (optional)",
        "pip install 'cswap-deploy[trt]'",
    )


def test_bindings_without_their_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(tmp_path, "tensorrt", "import ctypes; ctypes.CDLL('libnvonnxparser-gone.so.11')", "99.1")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._tensorrt("tensorrt", "tensorrt", "trt")
    assert finding.state == "broken"
    assert finding.detail == (
        "99.1 is installed but does not load: OSError: libnvonnxparser-gone.so.11: "
        "cannot open shared object file: No such file or directory"
    )
    assert finding.fix


def test_a_package_that_loads_but_makes_no_builder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = """
__version__ = "99.1"
class Logger:
    ERROR = 0
    def __init__(self, level): pass
def Builder(logger): raise TypeError("factory function returned nullptr")
"""
    plant(tmp_path, "tensorrt", code)
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._tensorrt("tensorrt", "tensorrt", "trt")
    assert finding.state == "broken"
    assert "99.1 loads but makes no builder: TypeError: factory function" in finding.detail


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of signal 11"),
        ("raise SystemExit(3)", "ended with 3"),
        ("raise KeyError('odd')", "KeyError: 'odd'"),
    ],
)
def test_a_crash_on_import_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, words: str
) -> None:
    plant(tmp_path, "pycuda", code, "2026.1")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._pycuda()
    assert finding.state == "broken"
    assert words in finding.detail
    assert "2026.1" in finding.detail


def test_a_broken_dependency_is_not_called_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(tmp_path, "planted_broken", "import a_dependency_that_is_gone", "1.2")
    plant(tmp_path, "planted_odd", "raise RuntimeError('two\\nlines')", "3.4")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._package("planted_broken", "planted_broken")
    assert (finding.state, finding.detail) == (
        "broken",
        "1.2: ModuleNotFoundError: No module named 'a_dependency_that_is_gone'",
    )
    finding = doctor._package("planted_odd", "planted_odd")
    assert (finding.state, finding.detail) == ("broken", "3.4: RuntimeError: two lines")
    assert finding.fix == "pip install --force-reinstall planted_odd"
    finding = doctor._package("planted-gone", "planted_gone")
    assert (finding.state, finding.fix) == ("missing", "pip install planted-gone")


def test_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    monkeypatch.setenv("CSWAP_MODELOPT", str(python))
    finding = doctor._modelopt()
    assert (finding.state, finding.fix[:21]) == ("broken", "python -m venv modelo")
    assert f"CSWAP_MODELOPT names {python}, which does not run" in finding.detail
    python.write_text("#!/bin/sh\necho 0.47.0\n")
    python.chmod(0o755)
    assert doctor._modelopt() == Finding("nvidia-modelopt", "ok", f"0.47.0, {python}")


def test_two_builds_of_onnxruntime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(tmp_path, "onnxruntime", "99.1")
    register(tmp_path, "onnxruntime-gpu", "99.2")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._onnxruntime()
    assert finding.state == "broken"
    assert finding.detail == (
        "onnxruntime 99.1 and onnxruntime-gpu 99.2 are both installed and overwrite each other's "
        "files"
    )
    assert finding.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_gpu_build_that_falls_back_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A planted runtime that lists the CUDA provider and then runs on the CPU, as it does."""
    code = """
__version__ = "99.2"
def get_available_providers(): return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class InferenceSession:
    def __init__(self, model, providers): assert len(model) > 10
    def get_providers(self): return ["CPUExecutionProvider"]
"""
    pytest.importorskip("onnx")
    plant(tmp_path, "onnxruntime", code)
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._onnxruntime()
    assert finding.state == "warn", finding
    assert "asked for CUDA it runs on CPUExecutionProvider" in finding.detail


def test_store_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CSWAP_STORE", str(tmp_path / "new" / "store"))
    finding = doctor._store()
    assert (finding.state, finding.detail) == ("ok", str(tmp_path / "new" / "store"))
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("CSWAP_STORE", str(blocked / "store"))
    finding = doctor._store()
    assert finding.state == "broken"
    assert "is not writable: Not a directory" in finding.detail
    assert finding.fix == "pass --store FOLDER, or set CSWAP_STORE"


def test_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CSWAP_DATA", raising=False)
    assert doctor._data().state == "ok"
    monkeypatch.setenv("CSWAP_DATA", str(tmp_path / "gone"))
    finding = doctor._data()
    assert (finding.state, finding.detail) == ("missing", f"{tmp_path / 'gone'} is no folder")
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("CSWAP_DATA", str(tmp_path))
    assert doctor._data().detail == f"{tmp_path}: cifar10"


def test_an_unforeseen_failure_is_a_finding() -> None:
    def check() -> Finding:
        raise ZeroDivisionError("planted")

    assert doctor._safely("thing", check) == Finding(
        "thing", "broken", "ZeroDivisionError: planted"
    )


def test_findings_are_plain_data(findings: dict[str, Finding]) -> None:
    from dataclasses import asdict

    assert json.loads(json.dumps([asdict(finding) for finding in findings.values()]))
