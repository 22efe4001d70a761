"""The number formats of a graph: what is narrowed, and what must not be.

TensorRT 11 networks are strongly typed: the dtypes in the graph are the dtypes of the engine. So
precision is decided here, by measurement: a graph is narrowed whole, its predictions are compared
with the float32 graph's, and where they differ too much the fewest layers that mend it stay wide.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from cswap_deploy.errors import GateError, UsageError
from cswap_deploy.export.names import is_meant
from cswap_deploy.progress import Progress, Silent
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.measurements import KeptLayer, PrecisionResult, PrecisionTrial
from cswap_deploy.runtime.onnx_session import OnnxSession

if TYPE_CHECKING:
    import onnx_ir as ir

    from cswap_deploy.export.quantize import Quantiser

Floats = npt.NDArray[np.float32]
RANGE_IMAGES = 64
"""Calibration images on which ranges are taken."""
JUDGE_IMAGES = 256
"""Further ones on which a graph is judged."""
SEARCH_TESTS = 120
"""Graphs that the search for layers may judge."""
FLIPS = 3
"""Predictions may change on this multiple of the drop's limit: most changes are between classes
that were close, and as often for the better."""
ROUNDED = "rounded.onnx"
"""A float32 graph that rounds to 16 bits after every operator; see :func:`reduce_precision`."""
_BATCH = 32


@dataclass(frozen=True, slots=True)
class Judgement:
    """A graph's predictions against the float32 graph's."""

    finite: bool
    kl: float
    """Mean KL divergence (nats); infinite where a logit is not finite."""
    agreement: float
    lost: int
    """Images right before and wrong now, less those that became right."""


def reduce_precision(
    onnx: OnnxArtifact,
    *,
    precision: str,
    images: Floats,
    labels: npt.NDArray[np.int64],
    drop_limit: float,
    path: Path,
    keep_fp32: tuple[str, ...] = (),
    int8_calibration: str = "auto",
    int8_quantizer: str = "onnxruntime",
    progress: Progress | None = None,
) -> tuple[OnnxArtifact, PrecisionResult]:
    """Give a graph the dtypes that the engine will have.

    Args:
        onnx: Float32; every node has a name of its own.
        precision: ``fp16``, ``bf16``, ``int8`` (the rest float32) or ``mixed`` (the rest float16).
        images: (N, C, H, W) float32, normalised calibration images in no particular order.
        labels: (N,) their classes.
        drop_limit: Largest loss of top-1 against the float32 graph (fraction); one image is always
            allowed.
        path: File to write.
        keep_fp32: Modules or patterns of nodes that keep their type; see ``names.is_meant``.
        int8_calibration: ``entropy``, ``percentile``, ``minmax``, or ``auto``: the best of those
            that the quantiser has.
        int8_quantizer: See :func:`make_quantiser`.
        progress: Told of what takes time.

    Returns:
        The graph in ``path``, and what was kept wide and why. Of a 16-bit graph there is also
        ``rounded.onnx`` beside it, which was judged: ONNX Runtime has few 16-bit operators on the
        CPU and computes chains of the others in float32, so it would not see what a GPU rounds.

    Raises:
        UsageError: A pattern matches no node.
        MissingDependencyError: The quantiser is not there.
        ExportError: The graph has control flow, or every layer is to be left out of int8.
        GateError: Even the widest graph of this precision predicts too differently.
    """
    progress = progress if progress is not None else Silent()
    with tempfile.TemporaryDirectory(prefix="precision-", dir=path.parent) as scratch:
        work = _Work(
            onnx, images, labels, drop_limit, keep_fp32, Path(scratch), progress, precision
        )
        method, kept = "", work.asked
        source = onnx.path
        if precision in ("int8", "mixed"):
            source, judged, method, kept = _quantised(work, int8_calibration, int8_quantizer)
        if precision == "int8":
            model, judge = source.read_bytes(), None
        else:
            model, judge, judged, kept = _narrowed(work, source, kept)
        path.write_bytes(model)
        if judge is not None:
            path.with_name(ROUNDED).write_bytes(judge)
    from cswap_deploy.export.onnx import describe_onnx

    result = PrecisionResult(
        precision=precision, layers=work.layers, kept=tuple(kept), calibration=method,
        tried=tuple(work.tried), images=len(work.reference), kl=judged.kl,
        agreement=judged.agreement, drop_limit=drop_limit, emulated=judge is not None,
    )  # fmt: skip
    return describe_onnx(path).model_copy(
        update={"precision": precision, "notes": onnx.notes}
    ), result


class _Work:
    """What both ways of narrowing share: the images, the float32 answers, and the judge."""

    def __init__(
        self,
        onnx: OnnxArtifact,
        images: Floats,
        labels: npt.NDArray[np.int64],
        drop_limit: float,
        patterns: tuple[str, ...],
        scratch: Path,
        progress: Progress,
        precision: str,
    ) -> None:
        self.onnx, self.scratch, self.progress = onnx, scratch, progress
        self.precision = precision
        self.ranged = images[:RANGE_IMAGES]
        # Where there are few, ranges and judgement share images.
        rest = images[RANGE_IMAGES:] if len(images) >= 2 * RANGE_IMAGES else images
        labels = labels[len(images) - len(rest) :]
        self.judged, self.labels = rest[:JUDGE_IMAGES], labels[:JUDGE_IMAGES]
        self.reference = _answers(OnnxSession(onnx.path, threads=None).run, self.judged)
        self.drop_limit = drop_limit
        self.tried: list[PrecisionTrial] = []
        self.layers = 0
        self.operators = _operators(onnx.path)
        self.asked = _matching(self.operators, patterns)

    def judge(self, model: bytes) -> Judgement:
        """Run a graph on the images that judge."""
        logits = _answers(OnnxSession(model, threads=None).run, self.judged)
        self.progress.advance(1)
        return compare(self.reference, logits, self.labels)

    def good(self, found: Judgement) -> bool:
        """Whether the predictions are still those of the float32 graph."""
        n = len(self.reference)
        flips = max(1.0, FLIPS * self.drop_limit * n)
        return (
            found.finite
            and found.lost <= max(1.0, self.drop_limit * n)
            and (1 - found.agreement) * n <= flips + 1e-6
        )

    def say(self, what: str, found: Judgement) -> None:
        """Keep it for the report."""
        self.tried.append(
            PrecisionTrial(
                what=what, kl=found.kl if found.finite else None, agreement=found.agreement,
                passes=self.good(found),
            )
        )  # fmt: skip

    def kept(self, name: str, reason: Literal["range", "accuracy"], value: float) -> KeptLayer:
        """A node that stays wide; a value that is not finite is not written down."""
        finite = value if np.isfinite(value) else None
        return KeptLayer(
            node=name, operator=self.operators.get(name, ""), reason=reason, value=finite
        )

    def refuse(self, found: Judgement) -> GateError:
        """Nothing that is left to try is good enough."""
        words = f"{found.agreement:.2%} of the classes alike" if found.finite else "not finite"
        return GateError(
            f"{self.precision}: even with every layer kept that can be, predictions on "
            f"{len(self.reference)} calibration images differ too much from float32: {words}",
            fix="--precision fp16 or fp32, or raise --precision-drop",
        )


def compare(reference: Floats, logits: Floats, labels: npt.NDArray[np.int64]) -> Judgement:
    """Hold logits against the float32 graph's.

    Args:
        reference: (N, classes).
        logits: (N, classes).
        labels: (N,) true classes.
    """
    if not np.isfinite(logits).all():
        return Judgement(finite=False, kl=float("inf"), agreement=0.0, lost=len(labels))
    from scipy.special import log_softmax

    before, after = (log_softmax(x.astype(np.float64), axis=1) for x in (reference, logits))
    kl = float((np.exp(before) * (before - after)).sum(1).mean())
    old, new = reference.argmax(1), logits.argmax(1)
    lost = int((old == labels).sum()) - int((new == labels).sum())
    return Judgement(finite=True, kl=max(kl, 0.0), agreement=float((old == new).mean()), lost=lost)


def _quantised(
    work: _Work, method: str, quantizer: str
) -> tuple[Path, Judgement, str, list[KeptLayer]]:
    """The Q/DQ graph with the best ranges and the fewest layers left out."""
    from cswap_deploy.export.search import shortest_prefix

    quantiser = make_quantiser(
        quantizer, work.onnx.path, work.ranged, _names(work.asked), work.scratch
    )
    graph = quantiser.quantised
    found: dict[str, Judgement] = {}
    for name in quantiser.methods if method == "auto" else (method,):
        work.progress.begin(f"int8: ranges of activations ({name})", 0)
        quantiser.calibrate(name)
        found[name] = work.judge(graph(name, frozenset()))
        work.say(f"int8, ranges by {name}", found[name])
        work.progress.end()
    layers = quantiser.layers
    work.layers = len(layers)
    best = min(found, key=lambda name: found[name].kl)
    judged, left = found[best], frozenset[str]()
    alone: dict[str, float] = {}
    if not work.good(judged):
        work.progress.begin("int8: the effect of each layer", len(layers))
        for layer in layers:
            others = frozenset(layers) - {layer}
            alone[layer] = work.judge(graph(best, others)).kl
        work.progress.end()
        ranked = sorted(layers, key=lambda name: -alone[name])
        work.progress.begin("int8: the fewest layers to leave out", 0)
        left = shortest_prefix(
            ranked[:-1], lambda kept: work.good(work.judge(graph(best, kept)))
        )  # fmt: skip
        work.progress.end()
        judged = work.judge(graph(best, left))
        work.say(f"int8, {len(left)} of {len(layers)} layers left out", judged)
        if not work.good(judged):
            raise work.refuse(judged)
    out = work.scratch / "int8.onnx"
    out.write_bytes(graph(best, left))
    kept = [*work.asked]
    kept += [work.kept(name, "accuracy", alone[name]) for name in layers if name in left]
    return out, judged, f"{best}, {quantiser.name}", kept


def make_quantiser(
    name: str, graph: Path, images: Floats, keep: Collection[str], scratch: Path
) -> Quantiser:
    """The int8 quantiser of a name, ``onnxruntime`` or ``modelopt``.

    Args:
        name: One of the two.
        graph: Float32; every node has a name of its own.
        images: (N, C, H, W) float32, normalised.
        keep: Names of nodes that stay in float32 whatever happens.
        scratch: Existing folder for its files.

    Raises:
        MissingDependencyError: ModelOpt is not there.
    """
    from cswap_deploy.export.modelopt import ModelOpt
    from cswap_deploy.export.quantize import OnnxRuntimeQuantiser

    make = ModelOpt if name == "modelopt" else OnnxRuntimeQuantiser
    return make(graph, images, keep, scratch)


def _narrowed(
    work: _Work, source: Path, kept: list[KeptLayer]
) -> tuple[bytes, bytes, Judgement, list[KeptLayer]]:
    """The graph cast to a 16-bit type and its rounded twin, the fewest nodes kept in float32."""
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    from cswap_deploy.export.casting import cast_graph, round_graph
    from cswap_deploy.export.ranges import too_large
    from cswap_deploy.export.search import smallest_set

    dtype = ir.DataType.BFLOAT16 if work.precision == "bf16" else ir.DataType.FLOAT16
    proto = onnx.shape_inference.infer_shapes(onnx.load(source))

    def fresh() -> ir.Model:
        model: ir.Model = ir.from_proto(proto)
        # A Constant's type is in an attribute, an initializer's is what is cast.
        lift = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        return lift(model).model

    def graph(keep: frozenset[str], make: Callable[..., ir.Model]) -> bytes:
        return bytes(ir.to_proto(make(fresh(), to=dtype, keep=keep)).SerializeToString())

    def judge(keep: frozenset[str]) -> Judgement:
        return work.judge(graph(keep, round_graph))

    work.progress.begin(f"{work.precision}: how large the values get", 0)
    large = too_large(fresh(), work.ranged, dtype=dtype)
    work.progress.end()
    asked = frozenset(_names(work.asked))
    must = asked | frozenset(large)
    nodes = [str(node.name) for node in fresh().graph]
    if work.precision != "mixed":
        work.layers = len(nodes)
    kept = kept + [
        work.kept(name, "range", large[name]) for name in nodes if name in set(large) - asked
    ]
    work.progress.begin(f"{work.precision}: comparing predictions", 0)
    found = judge(must)
    work.progress.end()
    work.say(f"{work.precision}, {len(must)} of {len(nodes)} nodes in float32", found)
    if not work.good(found):
        rest = [name for name in nodes if name not in must]
        if not work.good(wide := judge(frozenset(nodes))):
            raise work.refuse(wide)
        work.progress.begin(f"{work.precision}: the fewest nodes to keep in float32", 0)
        extra = smallest_set(
            rest, lambda keep: work.good(judge(must | keep)), tests=SEARCH_TESTS
        )  # fmt: skip
        alone = {name: judge(frozenset(nodes) - {name}).kl for name in extra}
        work.progress.end()
        kept += [work.kept(name, "accuracy", alone[name]) for name in nodes if name in extra]
        must |= extra
        found = judge(must)
        work.say(f"{work.precision}, {len(must)} of {len(nodes)} nodes in float32", found)
    return graph(must, cast_graph), graph(must, round_graph), found, kept


def _names(kept: list[KeptLayer]) -> set[str]:
    return {layer.node for layer in kept}


def _operators(path: Path) -> dict[str, str]:
    """Name of each node -> its operator, in the graph's order."""
    import onnx

    return {node.name: node.op_type for node in onnx.load(path).graph.node}


def _matching(operators: dict[str, str], patterns: tuple[str, ...]) -> list[KeptLayer]:
    for pattern in patterns:
        if not any(is_meant(name, pattern) for name in operators):
            raise UsageError(
                f"--keep-fp32 {pattern!r} matches none of the graph's {len(operators)} nodes, "
                f"among them {', '.join(list(operators)[:3])}"
            )
    return [
        KeptLayer(node=name, operator=operator, reason="asked")
        for name, operator in operators.items()
        if any(is_meant(name, pattern) for pattern in patterns)
    ]


def _answers(run: Callable[[Floats], Floats], images: Floats) -> Floats:
    return np.concatenate(
        [
            np.asarray(run(np.ascontiguousarray(images[i : i + _BATCH])), dtype=np.float32)
            for i in range(0, len(images), _BATCH)
        ]
    )
