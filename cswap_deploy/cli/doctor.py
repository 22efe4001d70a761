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
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

State = Literal["ok", "warn", "missing", "broken"]
Seen: TypeAlias = tuple[State, str, str]
"""State, detail and fix of a finding."""
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


@dataclass(frozen=True, slots=True)
class Check:
    """How to look at a thing; where that fails, the package is absent or broken."""

    run: Callable[[], Seen]
    module: str = ""
    """Name of the package that is tried."""
    fix: str = ""
    """Where it is absent, or lacks a package of its own."""
    repair: str = ""
    """Where it is there and does not load."""
    optional: bool = False
    loading: str = ""
    """Between the version and what went wrong."""


class _ProcessError(Exception):
    """The last words of a process that tried a package."""


def examine() -> tuple[Finding, ...]:
    """Look at everything that the stages may need."""
    return tuple(map(look, CHECKS))


def look(name: str) -> Finding:
    """Look at one of ``CHECKS``. Whatever goes wrong is a finding, never an exception."""
    check = CHECKS[name]
    try:
        return Finding(name, *check.run())
    except Exception as err:  # noqa: BLE001  # whatever is broken is what is to be reported
        lacking = err.name if isinstance(err, ModuleNotFoundError) else None
        if lacking and lacking == check.module:
            use = " (optional)" if check.optional else ""
            return Finding(name, "missing", f"not installed{use}", check.fix)
        version = _version(name) or "version unknown"
        words = " ".join(str(err).split())
        if not isinstance(err, _ProcessError):
            words = f"{type(err).__name__}: {words}"
        detail = f"{version}{check.loading}: {words}" if check.module else words
        return Finding(name, "broken", detail, check.fix if lacking else check.repair)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# --- imported here -------------------------------------------------------------------------------


def package(name: str, module: str = "", *, fix: str = "", optional: bool = False) -> Check:
    """Whether a package imports."""
    module = module or name

    def run() -> Seen:
        found = importlib.import_module(module)
        version = _version(name) or getattr(found, "__version__", "version unknown")
        return "ok", str(version), ""

    repair = f"pip install --force-reinstall {name}"
    return Check(run, module, fix or f"pip install {name}", repair, optional)


def _torch() -> Seen:
    import torch

    built = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    if torch.cuda.is_available():
        return "ok", f"{torch.__version__}, {built}, CUDA available", ""
    detail = f"{torch.__version__}, {built}, CUDA not available"
    if torch.version.cuda:
        return "warn", detail, "install an NVIDIA driver, or a CPU build of torch"
    return "ok", detail, ""


def _timm() -> Seen:
    from cswap_deploy.models.torchvision_shim import import_timm

    return "ok", str(import_timm().__version__), ""


# --- tried in a process of their own -------------------------------------------------------------


def _probe(code: str, module: str) -> Any:
    """Run Python that imports a module and prints JSON as its last line; what that says.

    Raises:
        ModuleNotFoundError: There is no such module.
        _ProcessError: Anything else.
    """
    path = os.pathsep.join(entry or "." for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "ORT_DISABLE_TELEMETRY": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, errors="replace",
            timeout=_PROBE_SECONDS, check=False, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as err:
        raise _ProcessError(f"no answer within {_PROBE_SECONDS} s") from err
    if done.returncode == 0 and done.stdout.strip():
        return json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode < 0:
        raise _ProcessError(f"the process died of signal {-done.returncode}")
    words = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
    if words.startswith("ModuleNotFoundError") and words.endswith(f"'{module}'"):
        raise ModuleNotFoundError(words, name=module)
    raise _ProcessError(words)


def _torchvision() -> Seen:
    """Asked in a fresh process: here the shim may have mended it already."""
    version = _version("torchvision")
    if version is None:
        raise ModuleNotFoundError(name="torchvision")
    try:
        _probe("import torchvision; print('{}')", "torchvision")
    except _ProcessError as err:
        if "operator torchvision::nms does not exist" not in str(err):
            raise
        version += f" is built for another torch ({err}); cswap-deploy mends this"
    return "ok", version, ""


# Asked for CUDA, onnxruntime falls back to the CPU without a word: only a session tells.
_ONNXRUNTIME = """
import json, onnxruntime as ort
answer = {"version": ort.__version__, "providers": ort.get_available_providers(), "cuda": ""}
if "CUDAExecutionProvider" in answer["providers"]:
    from onnx.parser import parse_model
    relu = "relu (float[1] x) => (float[1] y) { y = Relu(x) }"
    model = parse_model('<ir_version: 8, opset_import: ["": 17]>' + relu).SerializeToString()
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    answer["cuda"] = ort.InferenceSession(model, providers=providers).get_providers()[0]
print(json.dumps(answer))
"""


def _onnxruntime() -> Seen:
    """Which build is there, and which providers it really has."""
    versions = {name: _version(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    installed = " and ".join(f"{name} {version}" for name, version in versions.items() if version)
    if all(versions.values()):
        detail = f"{installed} are both installed and overwrite each other's files"
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install one of them"
        return "broken", detail, fix
    fix = "pip install 'cswap-deploy[cpu]'"
    try:
        answer = _probe(_ONNXRUNTIME, "onnxruntime")
    except _ProcessError as err:
        return "broken", f"{installed or 'unknown build'}: {err}", fix
    name = installed or f"onnxruntime {answer['version']} (not from PyPI)"
    detail = f"{name}; providers: {', '.join(answer['providers'])}"
    if "CUDAExecutionProvider" not in answer["providers"]:
        return "ok", detail, ""
    if answer["cuda"] == "CUDAExecutionProvider":
        return "ok", f"{detail}; CUDA provider loads", ""
    detail += f"; asked for CUDA it runs on {answer['cuda']}"
    return "warn", detail, f"install the CUDA and cuDNN that this build names, or {fix}"


_TENSORRT = """
import json, {module} as trt
answer = {{"version": trt.__version__, "builder": ""}}
try:
    trt.Builder(trt.Logger(trt.Logger.ERROR))
except Exception as err:
    answer["builder"] = type(err).__name__ + ": " + " ".join(str(err).split())
print(json.dumps(answer))
"""


def _tensorrt(module: str) -> Seen:
    """Import, then the creation of a builder; being findable says nothing."""
    from cswap_deploy.runtime.host import cuda_problem

    answer, problem = _probe(_TENSORRT.format(module=module), module), cuda_problem()
    if answer["builder"]:
        detail = f"{answer['version']} loads but makes no builder: {answer['builder']}"
        if problem:
            return "broken", f"{detail}; {problem}", "install an NVIDIA driver"
        return "broken", detail, ""
    runs = f"builds engines; cannot run them here: {problem}" if problem else "builds engines"
    return "ok", f"{answer['version']} {runs}", ""


def _pycuda() -> Seen:
    return "ok", _probe("import json, pycuda; print(json.dumps(pycuda.VERSION_TEXT))", "pycuda"), ""


def _openvino(name: str) -> Seen:
    """OpenVINO, and what quantises for it; their telemetry stays off."""
    code = f"import json, sys; sys.modules['openvino_telemetry'] = None; import {name}"
    version = _probe(f"{code}; print(json.dumps({name}.__version__))", name)
    return "ok", version.partition("-")[0], ""


# --- what is neither -----------------------------------------------------------------------------


def _modelopt() -> Seen:
    """In the environment that a variable names, or in this one."""
    from cswap_deploy.errors import MissingDependencyError
    from cswap_deploy.export.modelopt import VARIABLE, modelopt_version

    named = os.environ.get(VARIABLE)
    try:
        return "ok", f"{modelopt_version()}, {named or 'in this environment'}", ""
    except MissingDependencyError as err:
        if named:
            return "broken", str(err).splitlines()[0], err.fix or ""
        return "missing", "not installed (optional)", err.fix or ""


def _gpu() -> Seen:
    from cswap_deploy.measure.device import list_gpus
    from cswap_deploy.runtime.host import cuda_problem

    problem, gpus = cuda_problem(), ", ".join(list_gpus())
    if not problem:
        return "ok", gpus or "usable (nvidia-smi is not there to name it)", ""
    if gpus:
        return "broken", f"{gpus}: {problem}", "reinstall the NVIDIA driver"
    return "missing", f"{problem} (optional)", ""


def _demos() -> Seen:
    """The networks and images that ship with the package."""
    from cswap_deploy.models.demos import DEMOS, IMAGES, weights_file

    wanted = [*map(weights_file, DEMOS), *IMAGES.values()]
    absent = [file for file in wanted if not file.is_file()]
    if not absent:
        return "ok", ", ".join(DEMOS), ""
    detail = f"{', '.join(f.name for f in absent)} not in {absent[0].parent}"
    return "missing", detail, "pip install --force-reinstall cswap-deploy"


def _store() -> Seen:
    """Whether finished stages can be kept: a file is really written."""
    from cswap_deploy.records.store import Store

    folder = Store().root
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            return "ok", str(folder), ""
    except OSError as err:
        fix = "pass --store FOLDER, or set CSWAP_STORE"
        return "broken", f"{folder} is not writable: {err.strerror}", fix


def _data() -> Seen:
    """The folder of real weights and photos, for tests and benchmarks."""
    named = os.environ.get("CSWAP_DATA")
    if not named:
        return "ok", "not set (only tests and benchmarks use it)", ""
    folder = Path(named)
    if not folder.is_dir():
        return "missing", f"{folder} is no folder", "unset CSWAP_DATA"
    return "ok", f"{folder}: {', '.join(sorted(os.listdir(folder))[:5])}", ""


_CPU, _OPENVINO, _HUB, _TRT, _RTX, _SIGNING = (
    f"pip install 'cswap-deploy[{extra}]'"
    for extra in ("cpu", "openvino", "hub", "trt", "trt-rtx", "signing")
)
_TRT_GUIDE = "install the libraries too, as NVIDIA's TensorRT installation guide says"
_PYCUDA_GUIDE = "install the CUDA toolkit, put its bin on PATH, then pip install pycuda"
_BELONGS = "install the torchvision that belongs to your torch"
_UNLOADED = " is installed but does not load"

CHECKS = {
    "python": Check(lambda: ("ok", f"{platform.python_version()} ({sys.executable})", "")),
    "torch": replace(package("torch"), run=_torch),
    "torchvision": Check(_torchvision, "torchvision", "pip install torchvision", _BELONGS),
    "timm": Check(_timm, "timm", "pip install timm"),
    "onnx": package("onnx"),
    "onnxscript": package("onnxscript"),
    "onnxsim": package("onnxsim"),
    "onnxruntime": Check(_onnxruntime, "onnxruntime", _CPU),
    "GPU": Check(_gpu),
    "tensorrt-rtx": Check(
        partial(_tensorrt, "tensorrt_rtx"), "tensorrt_rtx", _RTX, _RTX, True, _UNLOADED
    ),
    "tensorrt": Check(
        partial(_tensorrt, "tensorrt"), "tensorrt", _TRT, _TRT_GUIDE, True, _UNLOADED
    ),
    "pycuda": Check(_pycuda, "pycuda", _PYCUDA_GUIDE, optional=True),
    "nvidia-ml-py": package("nvidia-ml-py", "pynvml", optional=True),
    **{
        name: Check(partial(_openvino, name), name, _OPENVINO, _OPENVINO, True, " does not load")
        for name in ("openvino", "nncf")
    },
    "nvidia-modelopt": Check(_modelopt),
    "datasets": package("datasets", fix=_HUB, optional=True),
    "model-signing": package("model-signing", "model_signing", fix=_SIGNING, optional=True),
    "demo networks": Check(_demos),
    "store": Check(_store),
    "CSWAP_DATA": Check(_data),
}
"""What is looked at, in this order."""
