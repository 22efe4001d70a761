"""The device that a latency is aimed at: networks exported and timed there, as engines will be."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from cswap_deploy.config import Config, ExportConfig
from cswap_deploy.errors import UsageError
from cswap_deploy.export.onnx import export_onnx
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.measure.device import describe_device
from cswap_deploy.measure.latency import measure_latency
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.runtime.node_times import GraphTimes, NodeTime, time_graphs
from cswap_deploy.runtime.onnx_session import OnnxSession, import_onnxruntime
from cswap_deploy.runtime.session import Floats

_RUNS = 100
_BLOCKED = "_nchwc"
"""What ONNX Runtime appends to tensors in its own layout, and names their convolutions after."""


@dataclass
class OnnxRuntimeAim:
    """ONNX Runtime on this machine's CPU; satisfies ``pruning.timing.TimedDevice``."""

    spec: ModelSpec
    config: ExportConfig
    images: Floats
    """The batch that is timed."""
    threads: int | None
    _dense: OnnxSession | None = field(init=False, default=None)

    @property
    def key(self) -> dict[str, Any]:
        """What decides what is found: this machine, among others."""
        return {
            "device": describe_device().model_dump(mode="json"), "threads": self.threads,
            "batch": len(self.images),
            "onnxruntime": import_onnxruntime().__version__, **self.config.export_key(),
        }  # fmt: skip

    def time(self, modules: Sequence[nn.Module]) -> list[GraphTimes]:
        """See :class:`pruning.timing.TimedDevice`; the first is the dense network."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [self._export(m, Path(folder, f"{at}.onnx")) for at, m in enumerate(modules)]
            found = time_graphs(paths, self.images, threads=self.threads, runs=_RUNS)
            self._dense = OnnxSession(paths[0], threads=self.threads)
            return [
                times._replace(nodes=_named(times.nodes, path))
                for times, path in zip(found, paths, strict=True)
            ]

    def fraction(self, module: nn.Module) -> float:
        """See :class:`pruning.timing.TimedDevice`."""
        assert self._dense is not None, "the dense network was timed first"
        with tempfile.TemporaryDirectory() as folder:
            pruned = OnnxSession(self._export(module, Path(folder, "0.onnx")), threads=self.threads)
            sessions = {"dense": self._dense, "pruned": pruned}
            found = measure_latency(sessions, images=self.images, runs=2 * _RUNS)
        # As the build's own measurement will be judged: by medians.
        dense, now = (statistics.median(found[name].samples_ms) for name in sessions)
        return now / dense

    def _export(self, module: nn.Module, path: Path) -> Path:
        raw = path.with_suffix(".exported.onnx")
        exported = export_onnx(
            module, input_size=self.spec.preprocessing.input_size, path=raw,
            opset=self.config.graph_opset, outputs=self.spec.outputs,
        )  # fmt: skip
        return simplify_onnx(exported, path=path).path


def aim_at(
    config: Config, spec: ModelSpec, images: Callable[[int], Floats]
) -> OnnxRuntimeAim | None:
    """The first target of a build, with its timed batch; ``None`` where latency is no aim.

    Args:
        config: Of the build.
        spec: The network's.
        images: Gives so many real ones, (N, C, H, W).

    Raises:
        UsageError: What the target's layers take is not known here.
    """
    if config.prune.ratio_of != "latency":
        return None
    target = config.engine.target[0]
    if target != "onnxruntime":
        raise UsageError(
            f"a latency cannot be aimed at on {target}: no model of what its layers take",
            fix=f"--target onnxruntime --target {target}: the first one is aimed at",
        )
    batch = images(config.timed_batch)
    return OnnxRuntimeAim(spec, config.export, batch, config.measure.threads)


def _named(nodes: Sequence[NodeTime], path: Path) -> list[NodeTime]:
    """Nodes under names that do not depend on what else is in a graph.

    A node of the graph has its own. One that the runtime made of several has that of the one that
    does its work, as a convolution's with what was fused behind it; and what it put between them is
    named after the node before.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    own = {node.name for node in graph.node}
    makes = {output: node for node in graph.node for output in node.output}
    found: list[NodeTime] = []
    seen: dict[str, int] = {}
    before = "start"
    for node in nodes:
        last = makes.get(node.name.removesuffix(_BLOCKED))
        if node.name in own or "/" in node.name:
            name = before = node.name
        elif last is not None:
            first: Any = last
            while first is not None and first.op_type != node.op:
                first = next((makes[i] for i in first.input if i in makes), None)
            name = before = (last if first is None else first).name
        else:
            name = f"{before}>{node.op}"
        seen[name] = seen.get(name, 0) + 1
        found.append(node._replace(name=name if seen[name] == 1 else f"{name}#{seen[name]}"))
    return found
