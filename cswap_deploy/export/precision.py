"""The number formats of a graph: what is narrowed, and what must not be.

TensorRT 11 networks are strongly typed: the dtypes in the graph are the dtypes of the engine. So
precision is decided here, by measurement: a graph is narrowed whole, its predictions are compared
with the float32 graph's, and where they differ too much the fewest layers that mend it stay wide.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from cswap_deploy.config import ExportConfig
from cswap_deploy.export.casting import cast_graph, round_graph
from cswap_deploy.export.comparison import (
    COMPARED_IMAGES,
    RANGE_IMAGES,
    Comparer,
    Comparison,
    Labels,
)
from cswap_deploy.export.modelopt import ModelOpt
from cswap_deploy.export.onnx import describe_onnx
from cswap_deploy.export.quantize import OnnxRuntimeQuantiser, Quantiser
from cswap_deploy.export.ranges import too_large
from cswap_deploy.export.search import shortest_prefix, smallest_set
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.amounts import mebibytes, percent
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.graphs import PrecisionRecord
from cswap_deploy.records.measurements import KeptLayer, PrecisionResult
from cswap_deploy.runtime.probabilities import OutputKind
from cswap_deploy.runtime.session import Floats

PRECISION_IMAGES = RANGE_IMAGES + COMPARED_IMAGES
"""Calibration images that :func:`narrow` uses."""
SEARCH_TESTS = 120
"""Graphs that the search for layers may compare."""
ROUNDED = "rounded.onnx"
"""A float32 graph that rounds to 16 bits after every operator; see :func:`narrow`."""


def narrow(
    onnx: OnnxArtifact, *, config: ExportConfig, images: Floats, labels: Labels | None, path: Path,
    progress: Progress | None = None, kind: OutputKind = "logits",
) -> PrecisionRecord:  # fmt: skip
    """Give a graph the dtypes that the engine will have.

    Args:
        onnx: Float32; every node has a name of its own.
        config: ``precision`` is ``fp16``, ``bf16``, ``int8`` (the rest float32) or ``mixed`` (the
            rest float16).
        images: (N, C, H, W) float32, normalised calibration images in no particular order; the
            first ``PRECISION_IMAGES`` are used.
        labels: (N,); ``None`` where there are no classes: then outputs must change by no more than
            ``config.drop_limit`` of their squared size.
        path: File to write.
        progress: Told of what takes time.
        kind: What the network gives.

    Returns:
        The graph, its path relative to its folder, and what was kept wide and why. Beside a 16-bit
        graph there is ``rounded.onnx``, which was compared in its place: ONNX Runtime has few
        16-bit operators on the CPU and computes chains of the others in float32, so it would not
        see what a GPU rounds.

    Raises:
        UsageError: A pattern matches no node.
        MissingDependencyError: The quantiser is not there.
        ExportError: The graph has control flow, or every layer is to be left out of int8.
        GateError: Even the widest graph of this precision predicts too differently.
    """
    comparer = Comparer(onnx, config, images, labels, progress or Silent(), kind)
    if config.int8:
        with tempfile.TemporaryDirectory(prefix="precision-", dir=path.parent) as scratch:
            done = _quantised(comparer, Path(scratch))
            if config.precision == "mixed":
                done = _narrowed(comparer, done)
    else:
        done = _narrowed(comparer, _Done(onnx.path.read_bytes(), kept=tuple(comparer.asked)))
    path.write_bytes(done.model)
    if done.rounded:
        path.with_name(ROUNDED).write_bytes(done.rounded)
    assert done.comparison is not None
    result = PrecisionResult(
        precision=config.precision, layers=done.layers, kept=done.kept,
        calibration=done.calibration, tried=tuple(comparer.tried), images=comparer.images,
        kl=done.comparison.kl, agreement=done.comparison.agreement, drop_limit=config.drop_limit,
        emulated=bool(done.rounded), by_outputs=labels is None,
    )  # fmt: skip
    made = describe_onnx(path).model_copy(
        update={"path": Path(path.name), "precision": config.precision, "notes": onnx.notes}
    )
    return PrecisionRecord(model=made, result=result)


def summary(record: PrecisionRecord) -> str:
    """One line for the screen."""
    model, result = record.model, record.result
    text = f"{mebibytes(model.size_bytes)}, {percent(result.agreement, 2)} of {result.images} "
    text += "outputs" if result.by_outputs else "predictions"
    text += " as in float32"
    if result.calibration:
        text += f", ranges by {result.calibration}"
    return text + (f"; {len(result.kept)} nodes kept wider" if result.kept else "")


@dataclass(frozen=True, slots=True)
class _Done:
    """How far a graph is narrowed."""

    model: bytes
    rounded: bytes = b""
    """The graph that was compared in its place; empty where it was compared itself."""
    comparison: Comparison | None = None
    kept: tuple[KeptLayer, ...] = ()
    layers: int = 0
    """Candidates for narrowing."""
    calibration: str = ""
    """How int8 ranges were found."""


def _quantised(comparer: Comparer, scratch: Path) -> _Done:
    """The Q/DQ graph with the best ranges and the fewest layers left out."""
    config, progress = comparer.config, comparer.progress
    quantiser = make_quantiser(
        config.int8_quantizer, comparer.onnx.path, comparer.ranged, _names(comparer.asked), scratch
    )
    found: dict[str, Comparison] = {}
    asked = config.int8_calibration
    for name in quantiser.methods if asked == "auto" else (asked,):
        progress.begin(f"int8: ranges of activations ({name})", 0)
        quantiser.calibrate(name)
        found[name] = comparer.compare(quantiser.quantised(name, frozenset()))
        comparer.record(f"int8, ranges by {name}", found[name])
        progress.end()
    layers = quantiser.layers
    best = min(found, key=lambda name: found[name].kl)
    comparison, left, alone = found[best], frozenset[str](), dict[str, float]()
    if not comparer.same(comparison):
        left, alone = _left_out(comparer, quantiser, best)
        comparison = comparer.compare(quantiser.quantised(best, left))
        comparer.record(f"int8, {len(left)} of {len(layers)} layers left out", comparison)
        if not comparer.same(comparison):
            raise comparer.refuse(comparison)
    kept = [comparer.kept(name, "accuracy", alone[name]) for name in layers if name in left]
    return _Done(
        model=quantiser.quantised(best, left), comparison=comparison, layers=len(layers),
        kept=(*comparer.asked, *kept), calibration=f"{best}, {quantiser.name}",
    )  # fmt: skip


def _left_out(
    comparer: Comparer, quantiser: Quantiser, method: str
) -> tuple[frozenset[str], dict[str, float]]:
    """The fewest layers to leave in float32, and each layer's KL divergence when it alone is int8.

    One layer is never left out: without it nothing would be quantised.
    """
    layers, progress = quantiser.layers, comparer.progress
    alone: dict[str, float] = {}
    progress.begin("int8: the effect of each layer", len(layers))
    for layer in layers:
        others = frozenset(layers) - {layer}
        alone[layer] = comparer.compare(quantiser.quantised(method, others)).kl
    progress.end()
    ranked = sorted(layers, key=lambda name: -alone[name])
    progress.begin("int8: the fewest layers to leave out", 0)
    left = shortest_prefix(
        ranked[:-1], lambda kept: comparer.same(comparer.compare(quantiser.quantised(method, kept)))
    )
    progress.end()
    return left, alone


def make_quantiser(
    name: str, graph: Path, images: Floats, keep: Collection[str], scratch: Path
) -> Quantiser:
    """The int8 quantiser of a name, ``onnxruntime`` or ``modelopt``.

    Raises:
        MissingDependencyError: ModelOpt is not there.
    """
    make = ModelOpt if name == "modelopt" else OnnxRuntimeQuantiser
    return make(graph, images, keep, scratch)


def _narrowed(comparer: Comparer, source: _Done) -> _Done:
    """The graph cast to a 16-bit type and its rounded twin, the fewest nodes kept in float32."""
    import onnx

    precision, progress = comparer.config.precision, comparer.progress
    proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(source.model))
    dtype = ir.DataType.BFLOAT16 if precision == "bf16" else ir.DataType.FLOAT16
    nodes = [str(node.name) for node in _lifted(proto).graph]
    progress.begin(f"{precision}: how large the values get", 0)
    large = too_large(_lifted(proto), comparer.ranged, dtype=dtype)
    progress.end()
    asked = frozenset(_names(source.kept))
    must = asked | frozenset(large)
    ranged = [name for name in nodes if name in large and name not in asked]
    kept = [*source.kept, *(comparer.kept(name, "range", large[name]) for name in ranged)]

    def rounded(keep: frozenset[str]) -> bytes:
        return _serialised(round_graph(_lifted(proto), to=dtype, keep=keep))

    def compared(keep: frozenset[str]) -> Comparison:
        return comparer.compare(rounded(keep))

    def record(found: Comparison) -> None:
        comparer.record(f"{precision}, {len(must)} of {len(nodes)} nodes in float32", found)

    progress.begin(f"{precision}: comparing predictions", 0)
    found = compared(must)
    progress.end()
    record(found)
    if not comparer.same(found):
        rest = [name for name in nodes if name not in must]
        if not comparer.same(wide := compared(frozenset(nodes))):
            raise comparer.refuse(wide)
        progress.begin(f"{precision}: the fewest nodes to keep in float32", 0)
        extra = smallest_set(
            rest, lambda keep: comparer.same(compared(must | keep)), tests=SEARCH_TESTS
        )
        alone = {name: compared(frozenset(nodes) - {name}).kl for name in extra}
        progress.end()
        kept += [comparer.kept(name, "accuracy", alone[name]) for name in nodes if name in extra]
        must |= extra
        found = compared(must)
        record(found)
    return _Done(
        model=_serialised(cast_graph(_lifted(proto), to=dtype, keep=must)), rounded=rounded(must),
        comparison=found, kept=tuple(kept), layers=source.layers or len(nodes),
        calibration=source.calibration,
    )  # fmt: skip


def _lifted(proto: Any) -> ir.Model:
    """A Constant's type is in an attribute, an initializer's is what is cast."""
    model: ir.Model = ir.from_proto(proto)
    return LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model).model


def _serialised(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


def _names(kept: Collection[KeptLayer]) -> set[str]:
    return {layer.node for layer in kept}
