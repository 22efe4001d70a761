"""An ONNX graph in ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from cswap_deploy.errors import MissingDependencyError, StageError, missing, own_words
from cswap_deploy.runtime.host import cuda_problem, usable_cores
from cswap_deploy.runtime.session import Floats, Outputs, Session

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_HARMFUL = ["WeightBiasQuantization"]
"""Quantises the float32 biases of Q/DQ graphs to int32 by the product of both scales, which
overflows where a channel's weights are tiny (onnxruntime 1.31, EfficientNet-Lite0 in int8: .60 of
the classes right with it, .99 without)."""


class OnnxSession(Session):
    """One graph, ready to run."""

    def __init__(
        self, graph: Path | bytes, *, threads: int | None, device: Literal["cpu", "cuda"] = "cpu"
    ) -> None:
        """Load and optimise a file or a serialised model.

        By default an operator on the CPU uses as many threads as the process has cores.

        Raises:
            MissingDependencyError: onnxruntime is absent, does not load, or has no provider for
                the device; it never falls back to the CPU silently.
            Exception: One of :func:`refusals`, where the runtime refuses the graph.
        """
        ort, wanted = require_provider(device), PROVIDERS[device]
        options, self.threads = session_options(ort, threads)
        source = graph if isinstance(graph, bytes) else os.fspath(graph)
        self._session: Any = ort.InferenceSession(
            source, options, providers=[wanted], disabled_optimizers=_HARMFUL
        )
        self.on_gpu = device == "cuda"
        self.provider = str(self._session.get_providers()[0])
        if self.provider != wanted:
            why = f"it fell back to {self.provider}: its CUDA or cuDNN libraries do not load"
            raise _no_provider(ort, wanted, why)
        self._input: str = self._session.get_inputs()[0].name

    def run(self, images: Floats) -> Floats:
        """The first output of the graph."""
        logits: Floats = self.outputs(images)[0]
        return logits

    def named(self, images: Floats) -> Outputs:
        """Every output by its name."""
        names = (output.name for output in self._session.get_outputs())
        return dict(zip(names, self.outputs(images)))  # noqa: B905 Python 3.9 has no strict

    def outputs(self, images: Floats) -> list[Any]:
        """Every output of the graph, in its order.

        Raises:
            StageError: The runtime refused the batch; ``err.log`` has its words.
        """
        try:
            return list(self._session.run(None, {self._input: images}))
        except refusals() as err:
            words = own_words(err)
            what = f"onnxruntime refused a batch of shape {images.shape}, {images.dtype}: "
            raise StageError(what + " ".join(words), log=words) from err


def session_options(ort: Any, threads: int | None) -> tuple[Any, int]:
    """Options of every session, and its threads: as many as the process has cores unless given."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads = threads or usable_cores()
    options.log_severity_level = 4  # what it has to say comes as an exception
    # Workers that spin while idle disturb the session timed next to this one, and on a busy
    # machine themselves: two threads, load 6 on 2 cores, ViT-Ti at 32 px: 10 ms against 2 ms.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options, threads


def require_provider(device: Literal["cpu", "cuda"]) -> Any:
    """The package, where it can run on a device.

    Raises:
        MissingDependencyError: onnxruntime is absent or does not load, or this build of it has no
            provider for the device, or the device is not there.
    """
    ort, wanted = import_onnxruntime(), PROVIDERS[device]
    if wanted not in ort.get_available_providers():
        raise _no_provider(ort, wanted, "this build of it has none")
    if device == "cuda" and (problem := cuda_problem()):
        raise _no_provider(ort, wanted, problem)
    return ort


def import_onnxruntime() -> Any:
    """The package, with its telemetry off.

    Raises:
        MissingDependencyError: It is absent or does not load.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as err:
        # Not the extra: on a device it would bring torch.
        told = str(missing("onnxruntime", "cpu", err)).splitlines()[0]
        raise MissingDependencyError(told, fix="pip install onnxruntime") from err
    return onnxruntime


def refusals() -> tuple[type[Exception], ...]:
    """The runtime's exceptions; they share no base class but Exception. None where it is absent."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError:
        return ()
    found = (getattr(state, name) for name in dir(state))
    return tuple(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))


def _no_provider(ort: Any, wanted: str, why: str) -> MissingDependencyError:
    cuda = wanted == PROVIDERS["cuda"]
    return MissingDependencyError(
        f"onnxruntime {ort.__version__} has no {wanted}: {why}",
        fix="pip uninstall onnxruntime, then pip install 'cswap-deploy[gpu]'" if cuda else None,
    )
