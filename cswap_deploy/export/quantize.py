"""A float32 graph with int8 where it pays: Q/DQ pairs, placed by ONNX Runtime's quantiser."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cswap_deploy.errors import ExportError

OPERATORS = ("Conv", "Gemm", "MatMul")
"""What is quantised where one input is a weight: it holds nearly all of a network's arithmetic."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    # ONNX Runtime's own 128 bins for 128 levels would make entropy the same as min-max; with 2,048
    # it takes 95 s for demo-vit and is no better.
    "entropy": ("Entropy", {"num_bins": 512, "num_quantized_bins": 128, "symmetric": True}),
    "percentile": ("Percentile", {"num_bins": 2048, "percentile": 99.99, "symmetric": True}),
    "minmax": ("MinMax", {}),
}
"""``--int8-calibration`` -> ONNX Runtime's calibrator and its settings."""
RANGE_BATCH = 8


class Quantiser(Protocol):
    """What makes a Q/DQ graph of a float32 one."""

    name: str
    """For the report, with a version."""
    methods: tuple[str, ...]
    """``--int8-calibration`` that it knows."""
    layers: tuple[str, ...]
    """Nodes that can be left out, in the graph's order; known once calibrated."""

    def calibrate(self, method: str) -> None:
        """Find the ranges of the activations on the calibration images."""
        ...

    def quantised(self, method: str, leave: Collection[str]) -> bytes:
        """The graph with the ranges that a method found, and some layers left in float32."""
        ...


class OnnxRuntimeQuantiser:
    """See :class:`Quantiser`."""

    name = "onnxruntime"
    methods = tuple(METHODS)

    def __init__(
        self, graph: Path, images: npt.NDArray[np.float32], keep: Collection[str], scratch: Path
    ) -> None:
        self._graph, self._images, self._scratch = graph, images, scratch
        self._keep = frozenset(keep)
        self.layers = tuple(name for name in quantisable(graph) if name not in self._keep)

    def calibrate(self, method: str) -> None:
        """See :func:`find_ranges`."""
        find_ranges(self._graph, self._images, method=method, to=self._ranges(method))

    def quantised(self, method: str, leave: Collection[str]) -> bytes:
        """See :func:`quantise`."""
        out = self._scratch / "quantised.onnx"
        kept = self._keep | frozenset(leave)
        quantise(self._graph, ranges=self._ranges(method), method=method, leave=kept, to=out)
        return out.read_bytes()

    def _ranges(self, method: str) -> Path:
        return self._scratch / f"{method}.json"


def quantisable(path: Path) -> tuple[str, ...]:
    """Names of the nodes that :func:`quantise` quantises.

    Args:
        path: A float32 graph whose nodes all have names.

    Returns:
        In the graph's order.
    """
    import onnx

    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return tuple(
        node.name for node in graph.node if node.op_type in OPERATORS and node.input[1] in weights
    )


def find_ranges(path: Path, images: npt.NDArray[np.float32], *, method: str, to: Path) -> None:
    """Run the graph on calibration images and write down the range of every activation.

    Args:
        path: A float32 graph.
        images: (N, C, H, W) float32, normalised; N of 8 or more is cut to a multiple of 8, because
            the calibrators want batches of one size.
        method: One of ``METHODS``.
        to: File for the ranges, JSON.

    Source:
        ONNX Runtime documentation, "Quantize ONNX models", static quantisation.
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data

    name, settings = METHODS[method]
    size = min(RANGE_BATCH, len(images))
    whole = images[: len(images) // size * size]
    with _quiet():
        calibrator = create_calibrator(
            path, list(OPERATORS), augmented_model_path=str(to.with_suffix(".augmented.onnx")),
            calibrate_method=CalibrationMethod[name], extra_options=dict(settings),
        )  # fmt: skip
        try:
            calibrator.collect_data(_Reader(whole, size, calibrator.infer_session))
            save_tensors_data(calibrator.compute_data(), to)
        finally:
            to.with_suffix(".augmented.onnx").unlink(missing_ok=True)


def quantise(
    path: Path, *, ranges: Path, method: str, leave: Collection[str] = (), to: Path
) -> None:
    """Put Q/DQ pairs before the layers that are to compute in int8.

    Signed and symmetric, weights per output channel, as TensorRT wants. Only what a layer reads is
    quantised, not what it gives, so that its activation function can be fused into it; biases stay
    float32, because TensorRT's parser refuses int32 ones.

    Args:
        path: A float32 graph.
        ranges: From :func:`find_ranges`.
        method: That found them.
        leave: Names of nodes that stay in float32.
        to: File to write.

    Raises:
        ExportError: Every layer is left out.

    Source:
        TensorRT documentation, "Working with Quantized Types", Q/DQ placement.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    kept = set(leave)
    if kept >= set(quantisable(path)):
        raise nothing_left(path)
    with _quiet():
        quantize_static(
            path, to, None, calibration_cache_path=ranges, quant_format=QuantFormat.QDQ,
            calibrate_method=CalibrationMethod[METHODS[method][0]],
            op_types_to_quantize=list(OPERATORS), nodes_to_exclude=sorted(kept), per_channel=True,
            activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
            extra_options={
                "QuantizeBias": False,
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "OpTypesToExcludeOutputQuantization": list(OPERATORS),
            },
        )  # fmt: skip


def nothing_left(graph: Path) -> ExportError:
    """Every layer is left out."""
    return ExportError(
        f"no layer of {graph.name} is left to quantise", fix="--precision fp16, or fp32"
    )


class _Reader:
    """ONNX Runtime's protocol for calibration data: a feed a call, then ``None``."""

    def __init__(self, images: npt.NDArray[np.float32], size: int, session: Any) -> None:
        self._batches = iter(np.split(images, len(images) // size))
        self._input = session.get_inputs()[0].name

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._input: batch}


@contextlib.contextmanager
def _quiet() -> Any:
    """The quantiser prints, and logs advice that is followed already, to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
