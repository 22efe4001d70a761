"""Which network and which images a build is about."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from cswap_deploy.config import Task
from cswap_deploy.errors import UsageError
from cswap_deploy.records.value import Count, Digest, Value
from cswap_deploy.runtime.manifest import unsound_steps
from cswap_deploy.runtime.probabilities import OutputKind

Side = Annotated[int, Field(ge=1, le=65536)]
Mean = Annotated[float, Field(ge=-1e6, le=1e6)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Neither zero nor too small for a float32 to divide by."""

TimmArgument = Literal["img_size", "in_chans", "num_classes"]


class Preprocessing(Value):
    """From a decoded RGB (or grey) image to the network's input.

    Turn it by its EXIF orientation where ``exif_rotate`` says so, resize the shorter side to
    ``resize_shorter`` pixels, crop the centre to ``input_size``, divide by 255, subtract ``mean``,
    divide by ``std``. An image that already has the input's height and width is neither resized
    nor cropped when ``resize_shorter`` equals that size.
    """

    input_size: tuple[Side, Side, Side]
    """(C, H, W)."""
    mean: tuple[Mean, ...]
    std: tuple[Deviation, ...]
    resize_shorter: Side
    """Pixels."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    exif_rotate: bool = False
    """timm and torchvision do not turn pictures; some devices do."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if wrong := [*unsound_steps(self.model_dump())]:
            raise ValueError("; ".join(wrong))
        return self

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """The same of what a user asked for.

        Raises:
            UsageError: No picture can be prepared so.
        """
        try:
            return cls(**fields)
        except ValidationError as err:
            told = err.errors()[0]
            place = ".".join(map(str, told["loc"])) or "the preprocessing"
            raise UsageError(
                f"no picture can be prepared so: {place}: {told['msg']}",
                fix="pass other values of --input-size, --mean and --std",
            ) from err


class ModelSpec(Value):
    """What a model is and where its weights came from; enough to make it again."""

    name: str
    """As the user typed it."""
    source: Literal["demo", "timm", "factory"]
    arguments: dict[TimmArgument, Side | tuple[Side, Side]] = Field(default_factory=dict)
    """Keyword arguments of ``timm.create_model``; it knows others, which open files."""
    weights: str
    """Where the weights came from, for people: a file, a hub repository, a package, ``random``."""
    weights_sha256: Digest
    """Over every tensor's name, dtype, shape and bytes."""
    task: Task = "classify"
    """What the outputs are."""
    outputs: tuple[str, ...] = ("logits",)
    """Their names, in order."""
    num_classes: Count
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
    sha256: Digest
    """Over the preprocessed uint8 pixels and the labels, in order."""
    count: Count
    classes: Count
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
