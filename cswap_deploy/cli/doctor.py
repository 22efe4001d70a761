"""What is installed, loads and works on this machine, each with the fix where it does not.

Packages with native code that is known to take the process down are tried in a process of their
own, so that a crash is a finding like any other.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "warn", "missing", "broken"]

_PROBE_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    """``missing``: not there. ``broken``: there, and does not work. ``warn``: works, but."""
    detail: str
    """Versions, and the tool's own words where something failed."""
    fix: str = ""
    """What to do; empty where nothing needs doing or nothing is known."""


def examine() -> tuple[Finding, ...]:
    """Look at everything that the stages may need.

    Returns:
        One finding for each thing; an optional package that is absent is ``missing`` too. Whatever
        goes wrong while looking is a finding, never an exception.
    """
    checks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("python", _python),
        ("torch", _torch),
        ("torchvision", _torchvision),
        ("timm", _timm),
        ("torch-pruning", lambda: _package("torch-pruning", "torch_pruning")),
        ("onnx", lambda: _package("onnx", "onnx")),
        ("onnxscript", lambda: _package("onnxscript", "onnxscript")),
        ("onnxsim", lambda: _package("onnxsim", "onnxsim")),
        ("onnxruntime", _onnxruntime),
        ("GPU", _gpu),
        ("tensorrt-rtx", lambda: _tensorrt("tensorrt-rtx", "tensorrt_rtx", "trt-rtx")),
        ("tensorrt", lambda: _tensorrt("tensorrt", "tensorrt", "trt")),
        ("pycuda", _pycuda),
        ("nvidia-ml-py", lambda: _package("nvidia-ml-py", "pynvml", optional=True)),
        ("openvino", lambda: _openvino("openvino")),
        ("nncf", lambda: _openvino("nncf")),
        ("nvidia-modelopt", _modelopt),
        ("datasets", lambda: _package("datasets", "datasets", extra="hub", optional=True)),
        ("demo networks", _demos),
        ("store", _store),
        ("CSWAP_DATA", _data),
    )
    return tuple(_safely(name, check) for name, check in checks)


def _safely(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as err:  # noqa: BLE001  # whatever is broken is what is to be reported
        return Finding(name, "broken", _words(err))


def _words(err: BaseException) -> str:
    """An exception in one line."""
    return f"{type(err).__name__}: {' '.join(str(err).split())}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _package(distribution: str, module: str, *, extra: str = "", optional: bool = False) -> Finding:
    """Whether a package imports."""
    fix = f"pip install 'cswap-deploy[{extra}]'" if extra else f"pip install {distribution}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name == module:
            use = " (optional)" if optional else ""
            return Finding(distribution, "missing", f"not installed{use}", fix)
        return Finding(distribution, "broken", f"{_version(distribution)}: {_words(err)}", fix)
    except Exception as err:  # noqa: BLE001  # a broken package may raise anything on import
        again = f"pip install --force-reinstall {distribution}"
        return Finding(distribution, "broken", f"{_version(distribution)}: {_words(err)}", again)
    version = _version(distribution) or getattr(found, "__version__", "version unknown")
    return Finding(distribution, "ok", str(version))


def _probe(code: str) -> tuple[dict[str, Any] | None, str]:
    """Run Python in a process of its own.

    Args:
        code: Prints one JSON object as its last line.

    Returns:
        The object, or None and the last words of the process.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path),
        "ORT_DISABLE_TELEMETRY": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {_PROBE_SECONDS} s"
    if done.returncode == 0 and done.stdout.strip():
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer, ""
    lines = done.stderr.strip().splitlines()
    if done.returncode < 0:
        return None, f"the process died of signal {-done.returncode}"
    return None, lines[-1] if lines else f"the process ended with {done.returncode}"


def _absent(words: str, module: str) -> bool:
    return words.startswith("ModuleNotFoundError") and words.endswith(f"'{module}'")


def _python() -> Finding:
    version = f"{platform.python_version()} ({sys.executable})"
    return Finding("python", "ok", version)


def _torch() -> Finding:
    found = _package("torch", "torch")
    if found.state != "ok":
        return found
    import torch

    built = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    if torch.cuda.is_available():
        return Finding("torch", "ok", f"{torch.__version__}, {built}, CUDA available")
    detail = f"{torch.__version__}, {built}, CUDA not available"
    if torch.version.cuda:
        return Finding("torch", "warn", detail, "install an NVIDIA driver, or a CPU build of torch")
    return Finding("torch", "ok", detail)


def _torchvision() -> Finding:
    """Asked in a fresh process: here the shim may have mended it already."""
    version = _version("torchvision")
    if version is None:
        return Finding("torchvision", "missing", "not installed", "pip install torchvision")
    answer, words = _probe("import torchvision; print('{}')")
    if answer is not None:
        return Finding("torchvision", "ok", version)
    if "operator torchvision::nms does not exist" in words:
        detail = f"{version} is built for another torch ({words}); cswap-deploy mends this"
        return Finding("torchvision", "ok", detail)
    fix = "install the torchvision that belongs to your torch"
    return Finding("torchvision", "broken", f"{version}: {words}", fix)


def _timm() -> Finding:
    try:
        from cswap_deploy.models.torchvision_shim import import_timm

        return Finding("timm", "ok", str(import_timm().__version__))
    except ModuleNotFoundError as err:
        if err.name == "timm":
            return Finding("timm", "missing", "not installed", "pip install timm")
        return Finding("timm", "broken", _words(err))


def _onnxruntime() -> Finding:
    """Which build is there, and which providers it really has."""
    builds = {
        name: version
        for name in ("onnxruntime", "onnxruntime-gpu")
        if (version := _version(name)) is not None
    }
    installed = " and ".join(f"{name} {version}" for name, version in builds.items())
    if len(builds) == 2:
        return Finding(
            "onnxruntime",
            "broken",
            f"{installed} are both installed and overwrite each other's files",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install one of them",
        )
    answer, words = _probe(_ONNXRUNTIME)
    if answer is None:
        fix = "pip install 'cswap-deploy[cpu]'"
        if _absent(words, "onnxruntime"):
            return Finding("onnxruntime", "missing", "not installed", fix)
        return Finding("onnxruntime", "broken", f"{installed or 'unknown build'}: {words}", fix)
    name = installed or f"onnxruntime {answer['version']} (not from PyPI)"
    detail = f"{name}; providers: {', '.join(answer['providers'])}"
    if "CUDAExecutionProvider" not in answer["providers"]:
        return Finding("onnxruntime", "ok", detail)
    if answer["cuda"] == "CUDAExecutionProvider":
        return Finding("onnxruntime", "ok", f"{detail}; CUDA provider loads")
    why = f"; asked for CUDA it runs on {answer['cuda']}"
    return Finding(
        "onnxruntime",
        "warn",
        detail + why,
        "install the CUDA and cuDNN that this build names, or pip install 'cswap-deploy[cpu]'",
    )


# Asked for CUDA, onnxruntime falls back to the CPU without a word: only a session tells.
_ONNXRUNTIME = """
import json, onnxruntime as ort
answer = {"version": ort.__version__, "providers": ort.get_available_providers(), "cuda": ""}
if "CUDAExecutionProvider" in answer["providers"]:
    from onnx import TensorProto, helper
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    session = ort.InferenceSession(
        model.SerializeToString(), providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    answer["cuda"] = session.get_providers()[0]
print(json.dumps(answer))
"""

_TENSORRT = """
import json, {module} as trt
answer = {{"version": trt.__version__, "builder": ""}}
try:
    trt.Builder(trt.Logger(trt.Logger.ERROR))
except Exception as err:
    answer["builder"] = type(err).__name__ + ": " + " ".join(str(err).split())
print(json.dumps(answer))
"""


_OPENVINO = """
import json, sys
sys.modules["openvino_telemetry"] = None
import {module}
print(json.dumps({{"version": {module}.__version__}}))
"""


def _tensorrt(name: str, module: str, extra: str) -> Finding:
    """Import, then the creation of a builder; being findable says nothing."""
    from cswap_deploy.runtime.host import cuda_problem

    fix = f"pip install 'cswap-deploy[{extra}]'"
    answer, words = _probe(_TENSORRT.format(module=module))
    if answer is None:
        if _absent(words, module):
            return Finding(name, "missing", "not installed (optional)", fix)
        version = _version(name) or "version unknown"
        if name == "tensorrt":
            fix = "install the libraries too, as NVIDIA's TensorRT installation guide says"
        return Finding(name, "broken", f"{version} is installed but does not load: {words}", fix)
    problem = cuda_problem()
    if answer["builder"]:
        detail = f"{answer['version']} loads but makes no builder: {answer['builder']}"
        if problem:
            return Finding(name, "broken", f"{detail}; {problem}", "install an NVIDIA driver")
        return Finding(name, "broken", detail)
    runs = f"builds engines; cannot run them here: {problem}" if problem else "builds engines"
    return Finding(name, "ok", f"{answer['version']} {runs}")


def _openvino(name: str) -> Finding:
    """OpenVINO, and what quantises for it; their telemetry stays off."""
    answer, words = _probe(_OPENVINO.format(module=name))
    fix = "pip install 'cswap-deploy[openvino]'"
    if answer is not None:
        return Finding(name, "ok", str(answer["version"]).partition("-")[0])
    if _absent(words, name):
        return Finding(name, "missing", "not installed (optional)", fix)
    return Finding(name, "broken", f"{_version(name)} does not load: {words}", fix)


def _modelopt() -> Finding:
    """In the environment that a variable names, or in this one."""
    from cswap_deploy.errors import MissingDependencyError
    from cswap_deploy.export.modelopt import VARIABLE, modelopt_version

    named = os.environ.get(VARIABLE)
    try:
        version = modelopt_version()
    except MissingDependencyError as err:
        if named:
            return Finding("nvidia-modelopt", "broken", str(err).splitlines()[0], err.fix or "")
        return Finding("nvidia-modelopt", "missing", "not installed (optional)", err.fix or "")
    return Finding("nvidia-modelopt", "ok", f"{version}, {named or 'in this environment'}")


def _gpu() -> Finding:
    from cswap_deploy.measure.device import list_gpus
    from cswap_deploy.runtime.host import cuda_problem

    problem = cuda_problem()
    gpus = ", ".join(list_gpus())
    if not problem:
        return Finding("GPU", "ok", gpus or "usable (nvidia-smi is not there to name it)")
    if gpus:
        return Finding("GPU", "broken", f"{gpus}: {problem}", "reinstall the NVIDIA driver")
    return Finding("GPU", "missing", f"{problem} (optional)")


def _pycuda() -> Finding:
    answer, words = _probe(
        "import json, pycuda; print(json.dumps({'version': pycuda.VERSION_TEXT}))"
    )
    if answer is not None:
        return Finding("pycuda", "ok", str(answer["version"]))
    if _absent(words, "pycuda"):
        fix = "install the CUDA toolkit, put its bin on PATH, then pip install pycuda"
        return Finding("pycuda", "missing", "not installed (optional)", fix)
    return Finding("pycuda", "broken", f"{_version('pycuda')}: {words}")


def _demos() -> Finding:
    """The networks and images that ship with the package."""
    from cswap_deploy.models.demos import DEMOS, ZOO_DIR

    sets = ("fashion-mnist-calibration.npz", "fashion-mnist-test.npz")
    wanted = [*(f"{name}.safetensors" for name in DEMOS), *sets]
    absent = [name for name in wanted if not (ZOO_DIR / name).is_file()]
    if absent:
        detail = f"{', '.join(absent)} not in {ZOO_DIR}"
        return Finding(
            "demo networks", "missing", detail, "pip install --force-reinstall cswap-deploy"
        )
    return Finding("demo networks", "ok", ", ".join(DEMOS))


def _store() -> Finding:
    """Whether finished stages can be kept: a file is really written."""
    from cswap_deploy.records.store import Store

    folder = Store().root
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as err:
        fix = "pass --store FOLDER, or set CSWAP_STORE"
        return Finding("store", "broken", f"{folder} is not writable: {err.strerror}", fix)
    return Finding("store", "ok", str(folder))


def _data() -> Finding:
    """The folder of real weights and photos, for tests and benchmarks."""
    named = os.environ.get("CSWAP_DATA")
    if not named:
        return Finding("CSWAP_DATA", "ok", "not set (only tests and benchmarks use it)")
    folder = Path(named)
    if not folder.is_dir():
        return Finding("CSWAP_DATA", "missing", f"{folder} is no folder", "unset CSWAP_DATA")
    return Finding("CSWAP_DATA", "ok", f"{folder}: {', '.join(sorted(os.listdir(folder))[:5])}")
