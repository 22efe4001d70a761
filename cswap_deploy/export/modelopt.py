"""Int8 by NVIDIA's ModelOpt, which places Q/DQ pairs where TensorRT fuses them, adds included.

It needs its own versions of ONNX and ONNX Runtime, so its command runs in a separate environment.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from cswap_deploy.errors import ExportError, MissingDependencyError
from cswap_deploy.export.qdq import fold_weights, quantised_nodes, without
from cswap_deploy.export.quantize import Quantiser, nothing_left
from cswap_deploy.runtime.session import Floats

VARIABLE = "CSWAP_MODELOPT"
"""Names the Python of that environment."""
_METHODS = {"entropy": "entropy", "minmax": "max"}
"""``--int8-calibration`` -> ModelOpt's ``--calibration_method``."""
_PROBE = (
    "import importlib.metadata, modelopt.onnx.quantization\n"
    "print(importlib.metadata.version('nvidia-modelopt'))"
)
_PROBE_SECONDS = 120.0
_FIX = (
    "python -m venv modelopt && modelopt/bin/pip install 'nvidia-modelopt[onnx]' && "
    f"export {VARIABLE}=$PWD/modelopt/bin/python"
)


class ModelOpt(Quantiser):
    """ModelOpt's command, in its own environment."""

    methods = tuple(_METHODS)

    def __init__(self, graph: Path, images: Floats, keep: Collection[str], scratch: Path) -> None:
        self.name = f"modelopt {modelopt_version()}"
        self.layers: tuple[str, ...] = ()
        self._graph, self._keep, self._scratch = graph, frozenset(keep), scratch
        self._images = scratch / "calibration.npy"
        np.save(self._images, images)
        self._made: dict[str, Any] = {}

    def calibrate(self, method: str) -> None:
        """Quantise every layer that ModelOpt would, with ranges found by a method.

        Raises:
            ExportError: ModelOpt failed, or found nothing to quantise.

        Source:
            NVIDIA ModelOpt documentation, "ONNX Quantization".
        """
        import onnx

        out = self._scratch / f"modelopt-{method}.onnx"
        done = _run(
            "-m", "modelopt.onnx.quantization", "--onnx_path", self._graph,
            "--quantize_mode", "int8", "--calibration_method", _METHODS[method],
            "--calibration_data_path", self._images, "--calibration_eps", "cpu",
            "--high_precision_dtype", "fp32", "--output_path", out,
        )  # fmt: skip
        if done.returncode or not out.is_file():
            lines = tuple(done.stderr.strip().splitlines())
            words = lines[-1] if lines else f"it ended with {done.returncode}"
            raise ExportError(
                f"{self.name} does not quantise {self._graph.name}: {words}",
                fix="--int8-quantizer onnxruntime", log=lines,
            )  # fmt: skip
        self._made[method] = made = onnx.load(out)
        found = quantised_nodes(made)
        self.layers = tuple(name for name in found if name not in self._keep)
        if not self.layers:
            raise nothing_left(self._graph)

    def quantised(self, method: str, leave: Collection[str]) -> bytes:
        """The graph with some layers left out, weights stored in int8."""
        made = fold_weights(without(self._made[method], self._keep | frozenset(leave)))
        return bytes(made.SerializeToString())


def modelopt_version() -> str:
    """Version of ModelOpt in the environment that ``CSWAP_MODELOPT`` names.

    Raises:
        MissingDependencyError: There is no such environment, or no ModelOpt in it.
    """
    return _version(_python())


@functools.cache
def _version(python: str) -> str:
    """Importing takes seconds."""
    done = _run("-c", _PROBE, timeout=_PROBE_SECONDS)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        absent = last == "ModuleNotFoundError: No module named 'modelopt'"
        state = "is not installed" if absent else f"does not load ({last})"
        raise MissingDependencyError(f"nvidia-modelopt {state}, for {python}", fix=_FIX)
    return done.stdout.strip().splitlines()[-1]


def _python() -> str:
    return os.environ.get(VARIABLE) or sys.executable


def _run(*arguments: object, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    command = [_python(), *map(str, arguments)]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        words = err.strerror if isinstance(err, OSError) else f"no answer within {timeout:.0f} s"
        raise MissingDependencyError(
            f"{VARIABLE} names {command[0]}, which does not run: {words}", fix=_FIX
        ) from err
