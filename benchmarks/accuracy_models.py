"""The networks of ``bench_accuracy.py``, and where their weights and images are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cswap_deploy.config import DataConfig, ModelConfig, RatioOf
from cswap_deploy.errors import MissingDependencyError
from cswap_deploy.models.load import LoadedModel, load_model

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Model:
    """What is pruned, on which images; paths are relative to ``CSWAP_DATA``."""

    name: str
    """As ``--model`` takes it."""
    ratio_of: RatioOf
    round_to: int | str
    ratios: tuple[float, ...]
    calibration: int = 512
    validation: int = 2000
    data: str | None = None
    validation_data: str | None = None
    checkpoint: str | None = None
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    one_test_set: bool = True
    """Whether all seeds are scored on the same images."""


def _cifar(name: str) -> Model:
    return Model(
        name=f"cifar_resnet:{name}",
        ratio_of="channels",
        round_to=1,
        ratios=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
        data="cifar10/calibration.npz",
        validation_data="cifar10/test.npz",
        checkpoint=f"cifar10/{name}.safetensors",
        input_size=(3, 32, 32),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


MODELS = {
    "resnet56": _cifar("resnet56"),
    "resnet20": _cifar("resnet20"),
    # One photo a class: half of the classes calibrate, the others test; the seed says which.
    "tf_efficientnet_lite0": Model(
        "tf_efficientnet_lite0", "params", "auto", (0.1, 0.2, 0.3, 0.4, 0.5),
        calibration=300, validation=300, data="imagenet-sample", one_test_set=False,
    ),
    "demo-resnet": Model("demo-resnet", "params", "auto", (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
    "demo-vit": Model("demo-vit", "params", "auto", (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
}  # fmt: skip


def load(model: Model) -> LoadedModel:
    """The network with its weights."""
    checkpoint = file_of(model.checkpoint)
    config = ModelConfig(
        model=model.name, checkpoint=None if checkpoint is None else Path(checkpoint),
        input_size=model.input_size, mean=model.mean, std=model.std,
    )  # fmt: skip
    return load_model(config)


def data_of(model: Model, calibration: int) -> DataConfig:
    """Its images."""
    return DataConfig(
        data=file_of(model.data), validation_data=file_of(model.validation_data),
        calibration_samples=calibration, validation_samples=model.validation,
    )  # fmt: skip


def file_of(relative: str | None) -> str | None:
    """A path in the data folder, checked.

    Raises:
        MissingDependencyError: It is not there.
    """
    if relative is None:
        return None
    folder = Path(os.environ.get("CSWAP_DATA", "data"))
    if not (folder / relative).exists():
        raise MissingDependencyError(
            f"there is no {folder / relative}", fix="set CSWAP_DATA to the folder that has it"
        )
    return str(folder / relative)
