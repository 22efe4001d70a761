"""Constant folding and removal of redundant nodes, by onnxsim."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from cswap_deploy.errors import ArtifactError, missing
from cswap_deploy.export.child import UNLIMITED, ChildLimits, run_child
from cswap_deploy.export.names import module_of, name_nodes
from cswap_deploy.export.onnx import batch_norm_notes, describe_onnx
from cswap_deploy.records.engine import OnnxArtifact

# A process of its own: onnxsim is native code that may crash, and it prints past Python's stdout.
_SIMPLIFY = """
import sys
sys.modules["torch"] = None  # onnxsim would import it, for seconds, and not use it
import onnx, onnxsim
model, right = onnxsim.simplify(onnx.load(sys.argv[1]))
onnx.save(model, sys.argv[2])
sys.exit(0 if right else "its own check of the result failed")
"""


def simplify_onnx(
    onnx: OnnxArtifact, *, path: Path, limits: ChildLimits = UNLIMITED
) -> OnnxArtifact:
    """Simplify a graph; where onnxsim fails or spoils it, keep the graph and say so in its notes.

    It fails, too, where it crashes, or takes more time or memory than the limits allow.

    onnxsim's own comparison of outputs is not used: the caller compares with ``measure.parity``,
    at more than one batch size. ``path`` must be another than ``onnx.path``.

    Raises:
        MissingDependencyError: onnxsim is absent.
        ArtifactError: ``onnx.path`` is absent or damaged.
    """
    if importlib.util.find_spec("onnxsim") is None:
        raise missing("onnxsim", "cpu", ModuleNotFoundError(name="onnxsim"))
    original = describe_onnx(onnx.path)
    refusal = run_child(_SIMPLIFY, [onnx.path, path], limits)
    if not refusal:
        try:
            refusal = _changed(original, describe_onnx(path))
        except ArtifactError as err:
            refusal = f"it wrote a damaged graph: {err}"
    if refusal:
        shutil.copyfile(onnx.path, path)
        note = f"graph not simplified, kept as exported: onnxsim failed: {refusal}"
        return original.model_copy(update={"path": path, "notes": (*onnx.notes, note)})
    _restore_names(path, onnx.path)
    return describe_onnx(path).model_copy(update={"notes": batch_norm_notes(path)})


def _restore_names(path: Path, original: Path) -> None:
    """Name the nodes that onnxsim made after what they replace; tensors keep their names."""
    import onnx

    before = onnx.load(original).graph
    modules = {name: module_of(node.name) for node in before.node for name in node.output}
    simple = onnx.load(path)
    name_nodes(simple.graph, modules=modules)
    onnx.save(simple, path)


def _changed(before: OnnxArtifact, after: OnnxArtifact) -> str:
    """Which of inputs, outputs and opset changed, in words; empty where none did."""
    for name in ("inputs", "outputs", "opset"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            return f"{name} changed from {old} to {new}"
    return ""
