"""What the stages of one build share: settings, images, the store, and how far they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cswap_deploy.errors import ExportError
from cswap_deploy.old_config import BuildConfig
from cswap_deploy.progress import Progress
from cswap_deploy.records.engine import OnnxArtifact
from cswap_deploy.records.measurements import Parity
from cswap_deploy.records.model import ModelSpec
from cswap_deploy.records.plan import PrunePlan
from cswap_deploy.records.store import Store
from cswap_deploy.records.value import FileRef, Value

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cswap_deploy.data import Samples
    from cswap_deploy.models.load import LoadedModel


Floats = np.ndarray[Any, np.dtype[np.float32]]
State = Literal["run", "reused"]
WEIGHTS = "pruned.safetensors"
MODEL = "model.onnx"
BUILD = "build.json"
PARITY_BATCHES = (1, 8)
SCORING_BATCH = 64


class BuildRecord(Value):
    """``build.json``: the settings of a build, and where its pruned network came from."""

    schema_version: Literal[1] = 1
    settings: dict[str, Any]
    prune_key: str
    dense_weights_sha256: str
    files: tuple[FileRef, ...]
    """The plan and the pruned weights."""


class ExportRecord(Value):
    """``export.json`` in the store: both graphs and how true they are."""

    model: OnnxArtifact
    dense: OnnxArtifact
    parity: tuple[Parity, ...]


@dataclass(slots=True)
class Run:
    """What the stages of one build share."""

    config: BuildConfig
    loaded: LoadedModel
    samples: Samples
    store: Store
    progress: Progress
    stages: dict[str, State] = field(default_factory=dict)
    """Stage -> whether it ran or was found."""
    keys: dict[str, str] = field(default_factory=dict)
    """Stage -> its key in the store."""
    fallbacks: list[str] = field(default_factory=list)
    calibration: tuple[torch.Tensor, torch.Tensor] | None = None
    """Normalised once, when a stage first asks; see :func:`calibration`."""

    @property
    def spec(self) -> ModelSpec:
        """Of the model."""
        return self.loaded.spec


def once(run: Run, stage: str, key: str, make: Callable[[Path], None]) -> Path:
    """The stage's folder, made unless the store has it."""
    found = run.store.find(key) if run.config.resume else None
    run.stages[stage] = "run" if found is None else "reused"
    if found is None:
        run.store.remove(key)  # what is there is not wanted, or create() would keep it
        with run.store.create(key) as out:
            make(out)
        found = run.store.find(key)
        assert found is not None
    return found


def pruned_module(run: Run, pruned: Path, plan: PrunePlan) -> nn.Module:
    """The pruned network, made from the dense architecture, the plan and the weights."""
    import copy

    from safetensors.torch import load_file

    from cswap_deploy.network.deletion import apply_plan

    module = copy.deepcopy(run.loaded.module)
    if plan.groups:
        module = apply_plan(plan, module, calibration(run)[0][:2])
    module.load_state_dict(load_file(pruned / WEIGHTS), strict=True)
    return module.eval()


def calibration(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) float32, channels last in memory, and labels (N,)."""
    import torch

    from cswap_deploy.data import normalised

    if run.calibration is None:
        images = normalised(run.samples.calibration, run.spec.preprocessing)
        run.calibration = (
            torch.from_numpy(images).contiguous(memory_format=torch.channels_last),
            torch.from_numpy(run.samples.calibration.labels),
        )
    return run.calibration


def parity_images(run: Run) -> Floats:
    """The images on which graphs and engines are compared, (8, C, H, W)."""
    return few_images(run, max(PARITY_BATCHES))


def few_images(run: Run, most: int) -> Floats:
    """The first calibration images, (N, C, H, W); the set as a whole takes half a GiB at 224 px."""
    images: Floats = calibration(run)[0][:most].contiguous().numpy()
    return images


def calibration_inputs(run: Run) -> dict[str, Any]:
    """For the key of what is found on normalised calibration images."""
    return {
        "calibration": run.samples.calibration.spec.sha256,
        "preprocessing": run.spec.preprocessing.model_dump(mode="json"),
    }


def runner(module: nn.Module) -> Callable[[Floats], Floats]:
    """A network as a function on arrays."""
    import torch

    def run(images: Floats) -> Floats:
        with torch.inference_mode():
            logits: Floats = module(torch.from_numpy(images)).numpy()
        return logits

    return run


def require_parity(compared: Parity) -> Parity:
    """Pass a comparison on, unless it failed.

    Raises:
        ExportError: The logits differ by more than the tolerance.
    """
    if not compared.ok:
        raise ExportError(
            f"{compared.candidate} does not agree with {compared.reference}: logits differ by up "
            f"to {compared.max_abs:.2e} on {compared.images} images, allowed "
            f"{compared.tolerance:.0e}",
            fix="try another --opset, or raise --parity-tolerance (of build) if accuracy counts",
        )
    return compared


def tool_versions(*packages: str) -> dict[str, str]:
    """Installed versions; ``absent`` where a package is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
