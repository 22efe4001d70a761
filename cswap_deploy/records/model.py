"""Which network and which images a build is about."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from cswap_deploy.config import Task
from cswap_deploy.records.value import Value
from cswap_deploy.runtime.probabilities import OutputKind


class Preprocessing(Value):
    """From a decoded RGB (or grey) image to the network's input.

    Turn it by its EXIF orientation where ``exif_rotate`` says so, resize the shorter side to
    ``resize_shorter`` pixels, crop the centre to ``input_size``, divide by 255, subtract ``mean``,
    divide by ``std``. An image that already has the input's height and width is neither resized
    nor cropped when ``resize_shorter`` equals that size.
    """

    input_size: tuple[int, int, int]
    """(C, H, W)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_shorter: int
    """Pixels."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    exif_rotate: bool = False
    """timm and torchvision do not turn pictures; some devices do."""


class ModelSpec(Value):
    """What a model is and where its weights came from; enough to make it again."""

    name: str
    """As the user typed it."""
    source: Literal["demo", "timm", "factory"]
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of ``timm.create_model``, for example ``img_size``."""
    weights: str
    """Where the weights came from, for people: a file, a hub repository, a package, ``random``."""
    weights_sha256: str
    """Over every tensor's name, dtype, shape and bytes."""
    task: Task = "classify"
    """What the outputs are."""
    outputs: tuple[str, ...] = ("logits",)
    """Their names, in order."""
    num_classes: int
    """0 where the outputs are not scores of classes."""
    output_kind: OutputKind = "logits"
    """What a classifier gives, recognised on real images; a softmax at its end is kept."""
    label_space: Literal["imagenet-1k", "fashion-mnist"] | None = None
    class_names: tuple[str, ...] = ()
    preprocessing: Preprocessing

    @property
    def is_random(self) -> bool:
        """Whether the weights are not trained, and were asked to be that."""
        return re.fullmatch(r"random \(seed -?\d+\)", self.weights) is not None


class DataSpec(Value):
    """Which images were used: enough to tell whether two runs saw the same ones."""

    source: str
    """As the user named it, or the embedded set's name."""
    sha256: str
    """Over the preprocessed uint8 pixels and the labels, in order."""
    count: int
    classes: int
    """Distinct labels among the images; 0 where there are none."""
    mapping: str = ""
    """How folder or column names became class indices, in words."""
    class_indices: dict[str, int] = Field(default_factory=dict)
    """Folder or label name -> class index of the model, where names had to be mapped."""
    labelled: bool = True
    """Whether class labels were read; tasks without classes want none."""
    unreadable: tuple[str, ...] = ()
    """Files that did not decode and were left out."""
    notes: tuple[str, ...] = ()
    """What else to know: classes without images, files left out, how odd pictures were taken."""
