"""The device that a latency is aimed at: networks exported, built and timed as engines will be."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from cswap_deploy.config import Config
from cswap_deploy.errors import ArtifactError, UsageError
from cswap_deploy.export.child import ChildLimits
from cswap_deploy.export.onnx import export_onnx, graph_nodes, graph_shapes
from cswap_deploy.export.simplify import simplify_onnx
from cswap_deploy.measure.device import describe_device
from cswap_deploy.measure.latency import measure_latency
from cswap_deploy.measure.statistics import undisturbed_ratio
from cswap_deploy.pruning.prepare import Prepared
from cswap_deploy.pruning.timing import TimedDevice, Variant, variants
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.files import atomic_folder
from cswap_deploy.records.latency import KitGraph, LatencyTable, ProfileKit, TimedGraph
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.records.store import Store, stage_key
from cswap_deploy.records.value import read_value, sha256_file
from cswap_deploy.runtime.host import cuda_problem, usable_cores
from cswap_deploy.runtime.node_times import Graph
from cswap_deploy.runtime.profiling import KIT, TIMERS
from cswap_deploy.runtime.session import Floats, Session
from cswap_deploy.runtime.tensorrt_session import MODULES
from cswap_deploy.targets import BuildRequest, build_and_load, get_target

_RUNS = 100
_VERSION = 1
"""Raised when networks are timed in another way."""


@dataclass
class TargetAim:
    """A target on this machine; satisfies ``pruning.timing.TimedDevice``."""

    name: str
    config: Config
    spec: ModelSpec
    images: Floats
    """The batch that is timed."""
    store: Store | None = None
    """Keeps what was timed."""
    network: Any = None
    """Plain data: the dense network, for the store."""
    _dense: Session | None = field(init=False, default=None)

    @property
    def key(self) -> dict[str, Any]:
        """What decides what is found: this machine, among others."""
        return {
            "device": describe_device().model_dump(mode="json"),
            "threads": self.config.measure.threads, "batch": len(self.images),
            "target": self.name, **get_target(self.name).fingerprint(),
            **self.config.export.export_key(),
        }  # fmt: skip

    def timed(self, variants: Sequence[Variant]) -> Sequence[TimedGraph]:
        """See :class:`pruning.timing.TimedDevice`; found in the store where it is there."""
        self.start(variants[0][1]())
        if self.store is None or not self.config.run.resume:
            return self._table(variants).graphs
        key = stage_key(
            "latency", version=_VERSION, inputs=self.key | {"network": self.network},
            settings={"widths": [widths for widths, _ in variants]}, tools={},
        )  # fmt: skip
        if (found := self.store.find(key)) is None:
            with self.store.create(key, stage="latency") as folder:
                (folder / "table.json").write_text(self._table(variants).model_dump_json())
            found = self.store.find(key)
            assert found is not None
        return read_value(found / "table.json", LatencyTable).graphs

    def start(self, dense: nn.Module) -> None:
        """The network that others are a fraction of."""
        self._dense = self._session(dense)

    def fraction(self, module: nn.Module) -> float:
        """See :class:`pruning.timing.TimedDevice`."""
        assert self._dense is not None, "the dense network comes first"
        sessions = {"dense": self._dense, "pruned": self._session(module)}
        found = measure_latency(sessions, images=self.images, runs=2 * _RUNS)
        sessions["pruned"].close()
        return undisturbed_ratio(found["pruned"].samples_ms, found["dense"].samples_ms)

    def _table(self, variants: Sequence[Variant]) -> LatencyTable:
        with tempfile.TemporaryDirectory() as folder:
            made = (make for _, make in variants)
            paths = [self._export(m(), Path(folder, f"{k}.onnx")).path for k, m in enumerate(made)]
            batch = len(self.images)
            graphs = [Graph(p, graph_nodes(p), graph_shapes(p, batch)) for p in paths]
            threads = self.config.measure.threads
            times = TIMERS[self.name](graphs, self.images, threads=threads, runs=_RUNS)
        device, versions = describe_device(), get_target(self.name).fingerprint()
        return LatencyTable(
            model=self.spec.name, runtime=f"{self.name} {versions[self.name]}",
            device=f"{device.cpu}, {device.cores} cores", threads=threads or usable_cores(),
            batch=len(self.images),
            graphs=tuple(
                TimedGraph(widths=widths, nodes=tuple(found.nodes), ms=found.ms)
                for (widths, _), found in zip(variants, times, strict=True)
            ),
        )  # fmt: skip

    def _session(self, module: nn.Module) -> Session:
        """An engine as the build would make it."""
        with tempfile.TemporaryDirectory() as folder:
            onnx = self._export(module, Path(folder, "model.onnx"))
            request = BuildRequest(onnx, self.config.engine.batch, Path(folder))
            target = get_target(self.name)
            return build_and_load(target, request, threads=self.config.measure.threads)

    def _export(self, module: nn.Module, path: Path) -> OnnxArtifact:
        return exported(module, self.spec, self.config, path)


@dataclass
class TableAim:
    """A device that is known by what was timed on it; satisfies ``pruning.timing.TimedDevice``."""

    file: Path
    table: LatencyTable

    @property
    def key(self) -> dict[str, Any]:
        """What decides what is found."""
        return {"table": sha256_file(self.file)}

    def timed(self, variants: Sequence[Variant]) -> Sequence[TimedGraph]:
        """See :class:`pruning.timing.TimedDevice`; those that were timed there.

        Raises:
            ArtifactError: They are of another network, or of other settings.
        """
        here, there = variants[0][0], self.table.graphs[0].widths
        if here != there:
            names = sorted(here.keys() ^ there.keys() or {n for n in here if here[n] != there[n]})
            raise ArtifactError(
                f"{self.file} was made for {self.table.model} with other groups: "
                f"{', '.join(names[:3])}",
                fix="make the kit again with the settings of this build, and time it again",
            )
        return self.table.graphs

    def fraction(self, module: nn.Module) -> None:
        """Not known here: the model is taken at its word."""


def aim_at(
    config: Config, spec: ModelSpec, images: Callable[[int], Floats],
    *, store: Store | None = None, network: Any = None,
) -> TargetAim | TableAim | None:  # fmt: skip
    """The first target of a build, with its timed batch; ``None`` where latency is no aim.

    Args:
        config: Of the build.
        spec: The network's.
        images: Gives so many real ones, (N, C, H, W).
        store: Keeps what was timed.
        network: Plain data: the dense network, for the store.

    Raises:
        UsageError: What the target's layers take cannot be found out here, or the table is of
            another batch.
        ArtifactError: The table cannot be read.
    """
    if config.prune.ratio_of != "latency":
        return None
    if (file := config.prune.latency_table) is not None:
        table = read_value(file, LatencyTable)
        if table.batch != config.timed_batch:
            raise UsageError(
                f"{file} was timed at batch {table.batch}, this build is for {config.timed_batch}",
                fix=f"--batch 1:{table.batch}:{max(16, table.batch)}",
            )
        return TableAim(file, table)
    name = config.engine.target[0]
    if name not in TIMERS or (name in MODULES and cuda_problem()):
        raise UsageError(
            f"a latency cannot be aimed at on {name} from here: what its layers take is not known",
            fix=f"time a kit where it runs: `cswap-deploy profile-kit {spec.name} -o kit`, there "
            f"`cswap-run --profile kit --target {name} -o device.json`, and here --latency-table "
            f"device.json; or put a target first that runs here: --target onnxruntime --target "
            f"{name}",
        )
    return TargetAim(name, config, spec, images(config.timed_batch), store, network)


def exported(module: nn.Module, spec: ModelSpec, config: Config, path: Path) -> OnnxArtifact:
    """A network as the graph that an engine would be built from."""
    raw = export_onnx(
        module, input_size=spec.preprocessing.input_size,
        path=path.with_suffix(".exported.onnx"), opset=config.export.graph_opset,
        outputs=spec.outputs,
    )  # fmt: skip
    graph = simplify_onnx(raw, path=path, limits=ChildLimits.of(config.export))
    raw.path.unlink()
    return graph


def write_kit(network: Prepared, spec: ModelSpec, config: Config, output: Path) -> ProfileKit:
    """Leave what ``cswap-run --profile`` times in a folder: graphs and ``kit.json``.

    Raises:
        ExportError: The network cannot be exported.
        UsageError: The folder cannot be written.
    """
    with atomic_folder(output) as folder:
        graphs = []
        for at, (widths, make) in enumerate(variants(network)):
            graph = exported(make(), spec, config, folder / f"{at}.onnx")
            graphs.append(
                KitGraph(
                    file=graph.path.name, sha256=graph.sha256, widths=widths,
                    nodes=tuple(graph_nodes(graph.path)),
                    shapes=graph_shapes(graph.path, config.timed_batch),
                )
            )  # fmt: skip
        kit = ProfileKit(
            model=spec.name, batch=config.timed_batch,
            input_size=spec.preprocessing.input_size, graphs=tuple(graphs),
        )  # fmt: skip
        (folder / KIT).write_text(kit.canonical_json())
    return kit


_: type[TimedDevice] = TargetAim
