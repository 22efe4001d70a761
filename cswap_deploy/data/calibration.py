"""The calibration set as the network takes it, from files or from what the caller has in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cswap_deploy.config import DataConfig, ModelConfig, Task
from cswap_deploy.data.labels import (
    are_from_one,
    check_classes,
    check_count,
    check_range,
    check_variety,
)
from cswap_deploy.data.load import load_calibration
from cswap_deploy.data.sampling import balanced_sample, take_balanced
from cswap_deploy.data.sets import ImageSet, Labels
from cswap_deploy.errors import UsageError
from cswap_deploy.models.factory import examine
from cswap_deploy.models.load import wrap_module
from cswap_deploy.models.outputs import named_outputs
from cswap_deploy.progress import Phases
from cswap_deploy.records.model import Preprocessing
from cswap_deploy.runtime.preprocess import normalise

Floats = NDArray[np.float32]
_FIX = (
    "pass (images, labels), images alone, a DataLoader of such batches, or the path of a folder or "
    "an .npz file"
)
_PIXELS_FIX = (
    "normalise them as for training, or pass a folder or an .npz file with input_size, mean and std"
)
_BATCH = 64
_LONGEST = 64
"""Images that are read of a loader for each one wanted, at most."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Images to measure effects, refit layers and compare candidates on."""

    images: Tensor
    """(N, C, H, W) float32, channels last in memory."""
    labels: Tensor
    """(N,) int64, class indices of the model; zeros where the task has none."""
    task: Task = "classify"
    """What the network's outputs are."""
    labelled: bool = True
    """Else a classifier's labels are its own predictions."""


def calibration_set(
    images: ImageSet, preprocessing: Preprocessing, *, task: Task = "classify"
) -> Calibration:
    """Normalise a set of pixels, for a network of a task."""
    return _calibration(normalise(images.images, preprocessing), images.labels, task)


def calibration_from(
    data: Any,
    module: nn.Module,
    *,
    model: ModelConfig,
    config: DataConfig,
    seed: int,
    progress: Phases,
) -> Calibration:
    """Draw a calibration set for a network in memory.

    At most ``config.calibration_samples`` images are taken, balanced by class where the data
    allows, in an order that the seed decides.

    Args:
        data: One of: ``(images, labels)``; an iterable of such batches, for example a
            ``DataLoader``; the path of a folder of class folders or of an ``.npz`` file (or
            ``hf:NAME[:SPLIT]``). Images are tensors or arrays (N, C, H, W), normalised as the
            network takes them; labels (N,) are its class indices. A loader in random order is
            left early; one that is sorted by class is read to its end. Images alone will do: a
            classifier's own predictions are its labels then, and a task without classes has none.
        module: Maps (N, C, H, W) to the outputs of ``model.task``; on the CPU, in evaluation mode.
        model: The network's name and, for a path, its preprocessing.
        config: Number of images; class map of a folder.

    Raises:
        UsageError: The data has another form, does not fit the network, is not finite, or is of
            one class only.
    """
    if isinstance(data, str | Path):
        spec = wrap_module(module, model).spec
        config = config.model_copy(update={"data": str(data)})
        drawn = load_calibration(config, model=spec, seed=seed, progress=progress)
        return calibration_set(drawn, spec.preprocessing, task=spec.task)
    network = _Network(module, model)
    if isinstance(data, Tensor | np.ndarray) or (
        _is_pair(data) and isinstance(data[0], Tensor | np.ndarray)
    ):
        images, labels = network.checked(data)
    elif isinstance(data, Iterable):
        images, labels = _read(iter(data), network, config.calibration_samples, progress)
    else:
        raise UsageError(f"the calibration data is of type {type(data).__name__}", fix=_FIX)
    classify = network.task == "classify"
    if classify:
        check_classes(labels, where="that was passed", fix="pass images of all classes, shuffled")
    else:
        check_count(min(len(labels), config.calibration_samples), where="that was passed")
    chosen = balanced_sample(labels, config.calibration_samples, classes=network.classes, seed=seed)
    images, labels = np.asarray(images[chosen], dtype=np.float32), labels[chosen]
    if classify:
        check_classes(labels, where="that was drawn", fix="raise calibration_samples")
    if broken := int((~np.isfinite(images).all(axis=(1, 2, 3))).sum()):
        raise UsageError(
            f"{broken} of {len(images)} calibration images have values that are not finite",
            fix="check how they are normalised",
        )
    check_variety(images, where="that was passed")
    return _calibration(images, labels, network.task, labelled=network.labelled)


def _calibration(
    images: Floats, labels: Labels, task: Task, *, labelled: bool = True
) -> Calibration:
    return Calibration(
        images=torch.from_numpy(images).contiguous(memory_format=torch.channels_last),
        labels=torch.from_numpy(labels),
        task=task,
        labelled=labelled,
    )


@dataclass(slots=True)
class _Network:
    """The network that batches must fit; the first batch gives the size of images."""

    module: nn.Module
    config: ModelConfig
    shape: tuple[int, ...] = ()
    """(C, H, W)."""
    classes: int = 0
    task: Task = "classify"
    labelled: bool = True

    def checked(self, batch: Any) -> tuple[Floats, Labels]:
        """(N, C, H, W) and (N,) of a batch; they must fit the network and the batches before.

        A batch is a pair (images, labels), or images alone: a classifier's labels are then what it
        predicts itself. For a task without classes the labels are zeros, and anything may follow
        the images.
        """
        alone = isinstance(batch, Tensor | np.ndarray)
        several = isinstance(batch, tuple | list) and len(batch) > 0
        images = self._images(batch[0] if several else batch) if alone or several else None
        if images is not None and self.task != "classify":
            return images, np.zeros(len(images), dtype=np.int64)
        if images is not None and alone:
            self.labelled = False
            return images, self._predicted(images)
        if images is None or not _is_pair(batch):
            raise UsageError(
                f"a batch of the calibration data is a {type(batch).__name__}, not a pair "
                "(images, labels)",
                fix=_FIX,
            )
        labels = _array(batch[1])
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise UsageError(
                f"labels have shape {labels.shape} and type {labels.dtype} for {len(images)} "
                "images; (N,) integers are wanted",
                fix="pass class indices, for example labels.argmax(1) of one-hot labels; or "
                "task='binary' for independent yes or no",
            )
        labels = labels.astype(np.int64)
        name, fix = self.config.model, "pass the network's class indices"
        if are_from_one(labels, self.classes):
            fix += ": labels - 1, if they count from 1"
        check_range(labels, self.classes, where="the calibration data", name=name, fix=fix)
        return images, labels

    def _predicted(self, images: Floats) -> Labels:
        """(N,) its own classes."""
        with torch.inference_mode():
            whole = torch.from_numpy(images.astype(np.float32))
            parts = (self.module(part) for part in torch.split(whole, _BATCH))
            classes = [next(iter(named_outputs(found).values())).argmax(1) for found in parts]
        found: Labels = torch.cat(classes).numpy()
        return found

    def _images(self, given: Any) -> Floats:
        """(N, C, H, W) of the size of all others; the first ones say what the network returns."""
        images = _array(given)
        if images.ndim != 4:
            raise UsageError(
                f"calibration images have shape {images.shape}, (N, C, H, W) is wanted", fix=_FIX
            )
        if images.dtype.kind != "f":
            raise UsageError(
                f"calibration images are {images.dtype}, normalised float32 is wanted",
                fix=_PIXELS_FIX,
            )
        if not self.shape:
            self.shape = images.shape[1:]
            name, task = self.config.model, self.config.task
            found = examine(self.module, self.shape, name=name, task=task)
            self.task, self.classes = found.task, max(found.num_classes, 1)
        if images.shape[1:] != self.shape:
            raise UsageError(
                f"calibration images have shapes {self.shape} and {images.shape[1:]}, (C, H, W)",
                fix="bring them to one size",
            )
        return images


def _read(
    batches: Iterator[Any], network: _Network, count: int, progress: Phases
) -> tuple[Floats, Labels]:
    """Enough images of each class from an iterable."""
    progress.begin("reading calibration images", count)
    first = next(batches, None)
    if first is None:
        raise UsageError("the calibration data has no batches", fix=_FIX)
    network.checked(first)

    def rows() -> Iterator[tuple[int, Floats]]:
        for batch in chain([first], batches):
            for image, label in zip(*network.checked(batch), strict=True):
                yield int(label), image.copy()  # else one image keeps its whole batch

    def read(image: Floats) -> Floats:
        progress.advance(1)
        return image

    share = -(-count // network.classes)
    images, labels = take_balanced(
        islice(rows(), _LONGEST * count),
        read,
        quota=np.full(network.classes, share, dtype=np.int64),
        count=count,
    )
    progress.end()
    return np.array(images, dtype=np.float32), labels


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2


def _array(values: Any) -> NDArray[Any]:
    """Values as an array; floating-point tensors in float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)
