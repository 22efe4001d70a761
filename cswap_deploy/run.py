"""One build under way: what it works on, the store, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from cswap_deploy.config import Config
from cswap_deploy.data import Calibration, Samples, calibration_set
from cswap_deploy.measure.device import describe_device
from cswap_deploy.measure.evaluate import Evaluation
from cswap_deploy.models.load import LoadedModel
from cswap_deploy.network.graph import trace
from cswap_deploy.progress import Progress
from cswap_deploy.records.measurements import DenseCheck, Device
from cswap_deploy.records.store import Store, stage_key
from cswap_deploy.records.value import sha256_text

State = Literal["run", "reused"]
_VERSIONS = {
    "prune": 17, "recover": 4, "export": 6, "precision": 6, "engine": 6, "score": 6, "validate": 8,
}  # fmt: skip
"""Raised when a stage's code changes what it writes."""


@dataclass
class Run:
    """One build: its settings and inputs, the store, and how far it is."""

    config: Config
    loaded: LoadedModel
    samples: Samples
    store: Store
    progress: Progress
    stages: dict[str, State] = field(default_factory=dict)
    """Stage -> whether it ran or was found."""
    keys: dict[str, str] = field(default_factory=dict)
    """Stage -> its key in the store."""
    made: dict[str, Path] = field(default_factory=dict)
    """Stage -> its folder there."""
    fallbacks: list[str] = field(default_factory=list)
    dense_checks: tuple[DenseCheck, ...] = ()
    """See :mod:`cswap_deploy.measure.chance`."""
    goes_on: bool = False
    """Whether a deeper pruning will go on from the last round of this one, as a sweep's do."""

    @cached_property
    def calibration(self) -> Calibration:
        """Normalised once, when a stage first asks."""
        spec = self.loaded.spec
        return calibration_set(self.samples.calibration, spec.preprocessing, task=spec.task)

    def images(self, most: int) -> Any:
        """The first calibration images as an array, (N, C, H, W) float32."""
        return self.calibration.images[:most].contiguous().numpy()

    def labels(self, most: int) -> Any:
        """Their labels, (N,); ``None`` for a task without classes."""
        known = self.loaded.spec.task == "classify"
        return self.samples.calibration.labels[:most] if known else None

    @cached_property
    def device(self) -> Device:
        """This machine."""
        return describe_device()

    @property
    def evaluation(self) -> Evaluation:
        """Evaluates networks on the validation images."""
        preprocessing = self.loaded.spec.preprocessing
        kind = self.loaded.spec.output_kind
        return Evaluation(self.samples.validation, preprocessing, self.progress, kind)

    @property
    def calibration_key(self) -> dict[str, Any]:
        """For the keys of stages that see calibration images."""
        return {
            "calibration": self.samples.calibration.spec.sha256,
            "preprocessing": self.loaded.spec.preprocessing.model_dump(mode="json"),
            "task": self.loaded.spec.task,
        }

    @cached_property
    def network_key(self) -> dict[str, Any]:
        """For the keys of stages that see the dense network: its weights, and what, beside them,
        decides what it computes."""
        spec = self.loaded.spec
        found: dict[str, Any] = {"name": spec.name, "arguments": spec.arguments}
        if spec.source == "factory":  # its forward can change while its weights stay
            graph = trace(self.loaded.module, self.calibration.images[:2])
            found = {"graph": sha256_text(graph.code)}
        return {"weights": spec.weights_sha256, "architecture": found}

    def stage(
        self,
        name: str,
        make: Callable[[Path], None],
        *,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
        tools: Mapping[str, str],
    ) -> Path:
        """A stage's folder: found in the store, or made there.

        Args:
            name: Of the stage; a target may follow after a slash.
            make: Fills an empty folder.
            inputs: Digests of what the stage reads.
            settings: Those that it obeys.
            tools: Name -> version of the libraries that affect what it makes.
        """
        key = self.keys[name] = key_of(name, inputs=inputs, settings=settings, tools=tools)
        found = self.store.find(key) if self.config.run.resume else None
        self.stages[name] = "run" if found is None else "reused"
        if found is None:
            # What is there is not wanted, but another build may be reading it.
            with self.store.create(key, stage=name, replace=not self.config.run.resume) as out:
                make(out)
            found = self.store.find(key)
            assert found is not None
        self.made[name] = found
        return found

    def done(self, name: str, told: str) -> None:
        """Say what a stage came to."""
        self.progress.done(told, reused=self.stages[name] == "reused")


def key_of(
    name: str, *, inputs: Mapping[str, Any], settings: Mapping[str, Any], tools: Mapping[str, str]
) -> str:
    """The key in the store of what a stage makes; arguments as in :meth:`Run.stage`."""
    stage = name.partition("/")[0]
    return stage_key(stage, version=_VERSIONS[stage], inputs=inputs, settings=settings, tools=tools)


def tool_versions(*packages: str) -> dict[str, str]:
    """Installed versions; ``absent`` where a package is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
