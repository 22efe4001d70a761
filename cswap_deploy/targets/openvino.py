"""OpenVINO, on the CPU."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import re
import time
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np

from cswap_deploy.config import BuilderOptions
from cswap_deploy.errors import ArtifactError, BuildError, StageError, own_words
from cswap_deploy.export.names import is_meant
from cswap_deploy.progress import captured
from cswap_deploy.records.engine import EngineArtifact
from cswap_deploy.records.value import sha256_file
from cswap_deploy.runtime.openvino_cpu import (
    cpu_options,
    import_openvino,
    import_quietly,
    openvino_core,
)
from cswap_deploy.runtime.session import Floats, Outputs, Session
from cswap_deploy.targets import (
    MOST_INT8_IMAGES,
    BuildRequest,
    Int8,
    Target,
    read_engine,
    try_batches,
)
from cswap_deploy.targets.trial import try_graph

GRAPH, WEIGHTS = "model.xml", "model.bin"
_DIGEST = ("cswap_deploy", "weights_sha256")
"""Where the graph's file records the digest of the weights' file, so that the graph's digest covers
both."""
_PRODUCT = "/WithoutBiases"
_ARITHMETIC = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""Layers of the compiled graph whose number format says what a network computes in."""


class OpenVino(Target):
    """OpenVINO's own format: a graph (``model.xml``) and its weights (``model.bin``).

    OpenVINO chooses kernels when it loads a graph, for the processor it is on, so the two files run
    on every CPU that it supports.

    The arithmetic is float32, or int8 where the graph is quantised. Left to itself OpenVINO goes
    down to bfloat16 or float16 on processors that have it, layers included that this project kept
    in float32 because of their range. A float16 graph is therefore one of float16 weights.
    """

    name = "openvino"
    own_int8 = True

    def check(self, options: BuilderOptions, *, int8: bool) -> None:
        """Refuse a missing package; there are no options."""
        import_openvino()
        if int8:
            with captured():
                import_quietly("nncf")

    def fingerprint(self) -> dict[str, str]:
        """The versions alone: kernels are chosen where an engine is loaded."""
        found = {"openvino": _version(import_openvino())}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an int8 build says so
            found["nncf"] = importlib.metadata.version("nncf")
        return found

    def build(self, request: BuildRequest) -> EngineArtifact:
        """Convert the graph, quantise it if asked, and run what was written.

        ``model.xml`` and ``model.bin`` are written; ``size_bytes`` is of both, the time that of
        converting, quantising and writing (seconds). Equal smallest and largest batches give
        static shapes, which are faster.

        Source:
            OpenVINO documentation, "OpenVINO IR format", "Dynamic Shapes", "Basic Quantization
            Flow".
        """
        onnx, ov = request.onnx, import_openvino()
        versions = {"openvino": _version(ov)}
        try_graph("openvino", request)
        start = time.perf_counter()
        try:
            model = openvino_core().read_model(onnx.path)
            if request.int8 is not None:
                request.progress.begin("int8: quantising (NNCF)", 0)
                model, versions["nncf"] = _quantise(model, request.int8, onnx.path.name)
                request.progress.end()
            shape = model.input(0).partial_shape
            shape[0] = ov.Dimension(request.batch.min, request.batch.max)
            model.reshape(shape)
        except RuntimeError as err:
            words = f"openvino {versions['openvino']} refused {onnx.path.name}: {_gist(err)}"
            raise BuildError(words, log=own_words(err)) from err
        path = request.out_dir / GRAPH
        _write(ov, model, path)
        seconds = time.perf_counter() - start
        precision = onnx.precision if request.int8 is None else "int8"
        note = f"openvino computes in float32 on the CPU: only the weights are {precision}"
        engine = EngineArtifact(
            target=self.name, path=path, sha256=sha256_file(path),
            size_bytes=path.stat().st_size + path.with_suffix(".bin").stat().st_size,
            build_seconds=seconds, precision=precision, runnable=True, versions=versions,
            device=f"CPU ({openvino_core().get_property('CPU', 'FULL_DEVICE_NAME').strip()})",
            batch=request.batch, extra_files=(WEIGHTS,),
            notes=(note,) if precision in ("fp16", "bf16") else (),
        )  # fmt: skip
        what = f"openvino {versions['openvino']}"
        try:
            session = self.load(engine)
        except ArtifactError as err:
            words = f"{what} does not compile {onnx.path.name}: {err}"
            raise BuildError(words, log=err.log) from err
        try_batches(session, request, loads=f"{what} compiles")
        return engine

    def load(
        self, engine: EngineArtifact, *, threads: int | None = None, onnx: Path | None = None
    ) -> OpenVinoSession:
        """Compile the graph for this machine's CPU; threads are at most the process's cores."""
        ov = import_openvino()
        graph = read_engine(engine.path, engine.sha256)
        recorded = ElementTree.fromstring(graph).find("rt_info/" + "/".join(_DIGEST))
        if recorded is None:
            raise ArtifactError(f"{engine.path} does not say what weights it belongs to")
        weights = read_engine(engine.path.with_suffix(".bin"), recorded.get("value", ""))
        try:
            return OpenVinoSession(ov, graph, weights, threads=threads)
        except RuntimeError as err:
            words = f"openvino {_version(ov)} does not load {engine.path}: {_gist(err)}"
            raise ArtifactError(words, log=own_words(err)) from err


class OpenVinoSession(Session):
    """A graph that is compiled for the CPU."""

    def __init__(self, ov: Any, graph: bytes, weights: bytes, *, threads: int | None) -> None:
        """Compile the contents of ``model.xml`` and ``model.bin``.

        Raises:
            RuntimeError: OpenVINO refuses the graph.
        """
        core = openvino_core()
        compiled = core.compile_model(
            core.read_model(graph, weights),
            "CPU",
            cpu_options(threads),
        )
        self._request = compiled.create_infer_request()
        self._names = [str(output.get_any_name()) for output in compiled.outputs]
        self._version = _version(ov)
        batch = compiled.input(0).partial_shape[0]
        self.batch_min = int(batch.get_min_length())
        self.batch_max = int(batch.get_max_length())
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        self.provider = f"OpenVINO CPU {_computes_in(compiled)}"

    def run(self, images: Floats) -> Floats:
        """One call, without a copy of the images."""
        return cast("Floats", self._infer(images)[0])

    def named(self, images: Floats) -> Outputs:
        """Every output by its name in the ONNX graph."""
        found = self._infer(images)
        return {name: np.array(found[at]) for at, name in enumerate(self._names)}

    def _infer(self, images: Floats) -> Any:
        try:
            return self._request.infer([images], share_inputs=True)
        except RuntimeError as err:
            what = f"openvino {self._version} refused a batch of shape {images.shape}"
            words = f"{what}, {images.dtype}: {_gist(err)}"
            raise StageError(words, log=own_words(err)) from err


def _quantise(model: Any, int8: Int8, name: str) -> tuple[Any, str]:
    """Int8 by NNCF, deterministic, and NNCF's version.

    Weights get 7 of the 8 bits (``OverflowFix.ENABLE``). Without VNNI or AMX, processors add pairs
    of 8-bit products up in 16 bits, which overflow otherwise; the engine may run on any. Top-1 on
    an AVX2 machine with NNCF's default (the first layer only), then with all layers:
    EfficientNet-Lite0 .873, .887 (float32 .880, 300 photos); demo-vit .861, .869 (.872, 2,000
    images); demo-resnet .929, .927 (.930).

    Symmetric activations (``PERFORMANCE``) were as accurate as asymmetric ones (``MIXED``), and as
    fast or faster.

    Source:
        NNCF documentation, "Post-Training Quantization"; ``nncf.OverflowFix``.
    """
    images = np.ascontiguousarray(int8.images[:MOST_INT8_IMAGES], dtype=np.float32)
    with captured():
        nncf = import_quietly("nncf")
        refusals = (nncf.InternalError, nncf.UnsupportedModelError, nncf.ValidationError)
        try:
            no_overflow = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
            quantised = nncf.quantize(
                model, nncf.Dataset(np.split(images, len(images))), subset_size=len(images),
                preset=nncf.QuantizationPreset.PERFORMANCE, advanced_parameters=no_overflow,
                model_type=nncf.ModelType.TRANSFORMER if _has_attention(model) else None,
                ignored_scope=nncf.IgnoredScope(names=_kept(model, int8.keep_fp32)),
            )  # fmt: skip
        except (RuntimeError, *refusals) as err:
            words = f"nncf {nncf.__version__} does not quantise {name}: {_gist(err)}"
            raise BuildError(words, fix="--precision fp32", log=own_words(err)) from err
    if "FakeQuantize" not in _operators(quantised):
        raise BuildError(
            f"nncf {nncf.__version__} found nothing to quantise in {name}", fix="--precision fp32"
        )
    return quantised, str(nncf.__version__)


def _kept(model: Any, patterns: tuple[str, ...]) -> list[str]:
    """Operators that come from certain ONNX nodes.

    One node becomes several: what adds a bias has the node's name, the product its own.
    """
    names = (op.get_friendly_name() for op in model.get_ops())
    return [n for n in names if any(is_meant(n.removesuffix(_PRODUCT), p) for p in patterns)]


def _has_attention(model: Any) -> bool:
    found = _operators(model)
    return "ScaledDotProductAttention" in found or {"MVN", "Softmax", "MatMul"} <= found


def _operators(model: Any) -> set[str]:
    return {op.get_type_name() for op in model.get_ops()}


def _write(ov: Any, model: Any, path: Path) -> None:
    """Both files, in the graph's own number formats; the graph names its weights' digest.

    OpenVINO numbers nodes without a name of their own through the whole process, the ones that
    writing makes included; counted again, the same graph gives the same bytes.
    """
    weights = path.with_suffix(".bin")
    ov.save_model(model, path, compress_to_fp16=False)
    written = openvino_core().read_model(path.read_bytes(), weights.read_bytes())
    for index, op in enumerate(written.get_ordered_ops()):
        if numbered := re.fullmatch(r"([A-Z][A-Za-z]*)_\d+", op.get_friendly_name()):
            op.set_friendly_name(f"{numbered[1]}_{index}")
    written.set_rt_info(sha256_file(weights), list(_DIGEST))
    ov.save_model(written, path, compress_to_fp16=False)


def _computes_in(compiled: Any) -> str:
    """Number formats that layers with arithmetic run in, asked of the compiled graph."""
    found = set()
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        if info["layerType"].astype(str) in _ARITHMETIC:
            kind = info["runtimePrecision"].astype(str)
            found.add("int8" if kind in ("i8", "u8") else kind)
    return "+".join(sorted(found, reverse=True)) or "f32"


def _version(ov: Any) -> str:
    """Without the build's number and branch."""
    return str(ov.__version__).partition("-")[0]


def _gist(err: BaseException) -> str:
    """OpenVINO's words without the places in OpenVINO's source where it was raised."""
    words = own_words(err)
    told = [line for line in words if not line.startswith(("Exception from ", "Check '"))]
    return " ".join(told or words)
