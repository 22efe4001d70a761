"""A float32 graph with int8 where it pays: Q/DQ pairs, placed by ONNX Runtime's quantiser."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cswap_deploy.errors import ExportError
from cswap_deploy.progress import captured
from cswap_deploy.runtime.session import Floats

OPERATORS = ("Conv", "Gemm", "MatMul")
"""Operators that are quantised if one input is a weight: nearly all of a network's arithmetic."""
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
    """Turns a float32 graph into a Q/DQ graph."""

    name: str
    """For the report, with a version."""
    methods: tuple[str, ...]
    """Values of ``--int8-calibration`` that it has."""
    layers: tuple[str, ...]
    """Nodes that can be left out, in the graph's order; known once calibrated."""

    def calibrate(self, method: str) -> None:
        """Find the ranges of the activations on the calibration images."""
        ...

    def quantised(self, method: str, leave: Collection[str]) -> bytes:
        """The graph with the ranges that a method found, and some layers left in float32."""
        ...


class OnnxRuntimeQuantiser(Quantiser):
    """Signed and symmetric, weights per output channel, as TensorRT wants.

    Only what a layer reads is quantised, not what it gives, so that its activation function can be
    fused into it; biases stay float32, because TensorRT's parser refuses int32 ones.

    Source:
        ONNX Runtime documentation, "Quantize ONNX models", static quantisation; TensorRT
        documentation, "Working with Quantized Types", Q/DQ placement.
    """

    name = "onnxruntime"
    methods = tuple(METHODS)

    def __init__(self, graph: Path, images: Floats, keep: Collection[str], scratch: Path) -> None:
        """Find the layers.

        Args:
            graph: Float32; every node has a name of its own.
            images: (N, C, H, W), normalised; N of 8 or more is cut to a multiple of 8, because the
                calibrators want batches of one size.
            keep: Names of nodes that stay in float32 in any case.
            scratch: Existing folder for its files.
        """
        self._graph, self._images, self._scratch = graph, images, scratch
        self._keep = frozenset(keep)
        self._all = quantisable(graph)
        self.layers = tuple(name for name in self._all if name not in self._keep)

    def calibrate(self, method: str) -> None:
        """Run the graph on the images and write down the range of every activation."""
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data

        name, settings = METHODS[method]
        size = min(RANGE_BATCH, len(self._images))
        whole = self._images[: len(self._images) // size * size]
        augmented = self._scratch / f"{method}.augmented.onnx"
        with captured():  # it prints, and advises what is done already
            calibrator = create_calibrator(
                self._graph, list(OPERATORS), augmented_model_path=str(augmented),
                calibrate_method=CalibrationMethod[name], extra_options=dict(settings),
            )  # fmt: skip
            try:
                calibrator.collect_data(_Reader(whole, size, calibrator.infer_session))
                save_tensors_data(calibrator.compute_data(), self._ranges(method))
            finally:
                augmented.unlink(missing_ok=True)

    def quantised(self, method: str, leave: Collection[str]) -> bytes:
        """Put Q/DQ pairs before the layers that are to compute in int8.

        Raises:
            ExportError: Every layer is left out.
        """
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        kept, out = self._keep | frozenset(leave), self._scratch / "quantised.onnx"
        if kept >= set(self._all):
            raise nothing_left(self._graph)
        with captured():  # it prints, and advises what is done already
            quantize_static(
                self._graph, out, None, calibration_cache_path=self._ranges(method),
                quant_format=QuantFormat.QDQ, op_types_to_quantize=list(OPERATORS),
                calibrate_method=CalibrationMethod[METHODS[method][0]],
                nodes_to_exclude=sorted(kept), per_channel=True,
                activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
                extra_options={
                    "QuantizeBias": False,
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "MatMulConstBOnly": True,
                    "OpTypesToExcludeOutputQuantization": list(OPERATORS),
                },
            )  # fmt: skip
        return out.read_bytes()

    def _ranges(self, method: str) -> Path:
        return self._scratch / f"{method}.json"


def quantisable(path: Path) -> tuple[str, ...]:
    """Names of the nodes that ONNX Runtime quantises, in the graph's order; all have names."""
    import onnx

    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return tuple(
        node.name for node in graph.node if node.op_type in OPERATORS and node.input[1] in weights
    )


def nothing_left(graph: Path) -> ExportError:
    """The error for when every layer is left out."""
    return ExportError(
        f"no layer of {graph.name} is left to quantise", fix="--precision fp16, or fp32"
    )


class _Reader:
    """ONNX Runtime's protocol for calibration data: a feed a call, then ``None``."""

    def __init__(self, images: Floats, size: int, session: Any) -> None:
        self._batches = iter(np.split(images, len(images) // size))
        self._input = session.get_inputs()[0].name

    def get_next(self) -> dict[str, Floats] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._input: batch}
