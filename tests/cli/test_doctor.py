from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import pytest

from cswap_deploy.cli.commands import command_line
from cswap_deploy.cli.doctor import CHECKS, Check, Finding, Seen, look, package


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    """What the command says."""
    with redirect_stdout(io.StringIO()) as out:
        command_line("doctor")(["doctor", "--json"], standalone_mode=False)
    return {row["name"]: Finding(**row) for row in json.loads(out.getvalue())["findings"]}


def plant(folder: Path, name: str, code: str, release: str = "") -> None:
    """A package that pip would call installed, with this code."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    if release:
        register(folder, name, release)


def register(folder: Path, distribution: str, release: str) -> None:
    info = folder / f"{distribution.replace('-', '_')}-{release}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {distribution}\nVersion: {release}\n")


def test_everything_is_looked_at(findings: dict[str, Finding]) -> None:
    assert list(findings) == [
        "python", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxsim",
        "onnxruntime", "GPU", "tensorrt-rtx", "tensorrt", "pycuda", "nvidia-ml-py", "openvino",
        "nncf", "nvidia-modelopt", "datasets", "model-signing", "demo networks", "store",
        "CSWAP_DATA",
    ]  # fmt: skip


def test_what_the_tests_themselves_need_is_well(findings: dict[str, Finding]) -> None:
    for name in ("python", "torch", "torchvision", "timm", "onnx", "onnxsim"):
        assert findings[name].state in ("ok", "warn"), findings[name]
    assert "build" in findings["torch"].detail
    assert version("torch").partition("+")[0] in findings["torch"].detail


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


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder where packages are found first."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_absent_package(planted: Path) -> None:
    plant(planted, "tensorrt", "raise ModuleNotFoundError(\"No module named 'tensorrt'\")")
    assert look("tensorrt") == Finding(
        "tensorrt", "missing", "not installed (optional)", "pip install 'cswap-deploy[trt]'"
    )


def test_bindings_without_their_libraries(planted: Path) -> None:
    plant(planted, "tensorrt", "import ctypes; ctypes.CDLL('libnvonnxparser-gone.so.11')", "99.1")
    finding = look("tensorrt")
    assert finding.state == "broken"
    assert finding.detail == (
        "99.1 is installed but does not load: OSError: libnvonnxparser-gone.so.11: "
        "cannot open shared object file: No such file or directory"
    )
    assert finding.fix.startswith("install the libraries too")


def test_a_package_that_loads_but_makes_no_builder(planted: Path) -> None:
    code = """
__version__ = "99.1"
class Logger:
    ERROR = 0
    def __init__(self, level): pass
def Builder(logger): raise TypeError("factory function returned nullptr")
"""
    plant(planted, "tensorrt", code)
    finding = look("tensorrt")
    assert finding.state == "broken"
    assert "99.1 loads but makes no builder: TypeError: factory function" in finding.detail


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "the process died of signal 11",
        ),
        ("raise SystemExit(3)", "the process ended with 3"),
        ("raise KeyError('odd')", "KeyError: 'odd'"),
    ],
)
def test_a_crash_on_import_is_a_finding(planted: Path, code: str, words: str) -> None:
    plant(planted, "pycuda", code, "2026.1")
    assert look("pycuda") == Finding("pycuda", "broken", f"2026.1: {words}")


@pytest.mark.parametrize(
    ("name", "code", "finding"),
    [
        (
            "planted_broken", "import a_dependency_that_is_gone",
            ("broken", "1.2: ModuleNotFoundError: No module named 'a_dependency_that_is_gone'",
             "pip install planted_broken"),
        ),
        (
            "planted_odd", "raise RuntimeError('two\\nlines')",
            ("broken", "1.2: RuntimeError: two lines",
             "pip install --force-reinstall planted_odd"),
        ),
        ("planted_gone", None, ("missing", "not installed", "pip install planted_gone")),
    ],
)  # fmt: skip
def test_a_broken_dependency_is_not_called_absent(
    monkeypatch: pytest.MonkeyPatch, planted: Path, name: str, code: str | None, finding: Seen
) -> None:
    if code is not None:
        plant(planted, name, code, "1.2")
    monkeypatch.setitem(CHECKS, name, package(name))
    assert look(name) == Finding(name, *finding)


def test_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    monkeypatch.setenv("CSWAP_MODELOPT", str(python))
    finding = look("nvidia-modelopt")
    assert (finding.state, finding.fix[:21]) == ("broken", "python -m venv modelo")
    assert f"CSWAP_MODELOPT names {python}, which does not run" in finding.detail
    python.write_text("#!/bin/sh\necho 0.47.0\n")
    python.chmod(0o755)
    assert look("nvidia-modelopt") == Finding("nvidia-modelopt", "ok", f"0.47.0, {python}")


def test_two_builds_of_onnxruntime(planted: Path) -> None:
    register(planted, "onnxruntime", "99.1")
    register(planted, "onnxruntime-gpu", "99.2")
    finding = look("onnxruntime")
    assert finding.state == "broken"
    assert finding.detail == (
        "onnxruntime 99.1 and onnxruntime-gpu 99.2 are both installed and overwrite each other's "
        "files"
    )
    assert finding.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_gpu_build_that_falls_back_to_the_cpu(planted: Path) -> None:
    """A planted runtime that lists the CUDA provider and then runs on the CPU, as it does."""
    code = """
__version__ = "99.2"
def get_available_providers(): return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class InferenceSession:
    def __init__(self, model, providers): assert len(model) > 10
    def get_providers(self): return ["CPUExecutionProvider"]
"""
    pytest.importorskip("onnx")
    plant(planted, "onnxruntime", code)
    finding = look("onnxruntime")
    assert finding.state == "warn", finding
    assert "asked for CUDA it runs on CPUExecutionProvider" in finding.detail


def test_store_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CSWAP_STORE", str(tmp_path / "new" / "store"))
    assert look("store") == Finding("store", "ok", str(tmp_path / "new" / "store"))
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("CSWAP_STORE", str(blocked / "store"))
    finding = look("store")
    assert finding.state == "broken"
    assert "is not writable: Not a directory" in finding.detail
    assert finding.fix == "pass --store FOLDER, or set CSWAP_STORE"


def test_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CSWAP_DATA", raising=False)
    assert look("CSWAP_DATA").state == "ok"
    monkeypatch.setenv("CSWAP_DATA", str(tmp_path / "gone"))
    finding = look("CSWAP_DATA")
    assert (finding.state, finding.detail) == ("missing", f"{tmp_path / 'gone'} is no folder")
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("CSWAP_DATA", str(tmp_path))
    assert look("CSWAP_DATA").detail == f"{tmp_path}: cifar10"


def test_an_unforeseen_failure_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> Seen:
        raise ZeroDivisionError("planted")

    monkeypatch.setitem(CHECKS, "thing", Check(check))
    assert look("thing") == Finding("thing", "broken", "ZeroDivisionError: planted")
