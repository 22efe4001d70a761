"""From a name, a checkpoint or a factory to a network with its weights and preprocessing."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cswap_deploy.errors import StageError, UsageError
from cswap_deploy.models import demos as zoo
from cswap_deploy.models import factory, timm_models
from cswap_deploy.models.checkpoints import load_into, read_checkpoint
from cswap_deploy.records.model import ModelSpec, Preprocessing

InputSize = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _Wish:
    """What the user said beside the name."""

    checkpoint: Path | None
    pretrained: bool
    input_size: InputSize | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    seed: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network with its weights: float32, on the CPU, in evaluation mode."""

    spec: ModelSpec
    module: nn.Module


def load_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    input_size: InputSize | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Make a network, give it its weights, and say how pictures are prepared for it.

    Args:
        name: A demo (``demo-resnet``, ``demo-vit``), a timm model, or ``package.module:factory``
            for a callable that returns an ``nn.Module``.
        checkpoint: Weights to load instead of the pretrained ones; safetensors or ``torch.save``.
        pretrained: Load weights at all; otherwise they are random, for trying the pipeline.
        input_size: (C, H, W); the model's own unless said.
        mean: Per channel, on the scale 0..1; the model's own unless said.
        std: The same.
        seed: Of random weights.

    Returns:
        The network and what is needed to make it again.

    Raises:
        UsageError: The name is unknown, the checkpoint does not fit, or a factory's preprocessing
            was not given.
        MissingDependencyError: The weights are on a hub that cannot be reached.
        StageError: A weight is not finite.
    """
    _check_sizes(input_size, mean, std)
    wish = _Wish(checkpoint, pretrained, input_size, mean, std, seed)
    if name in zoo.DEMOS:
        return _load_demo(name, wish)
    if ":" in name:
        return _load_factory(name, wish)
    return _load_timm(name, wish)


def wrap_module(
    module: nn.Module,
    *,
    name: str,
    input_size: InputSize | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> LoadedModel:
    """A copy of a network that the caller made, with what is known of it.

    Args:
        module: Maps (N, C, H, W) to logits (N, classes).
        name: For people.
        input_size: (C, H, W).
        mean: Of each channel, of pixels in [0, 1].
        std: As ``mean``.

    Raises:
        UsageError: ``input_size``, ``mean`` or ``std`` is absent or does not fit.
    """
    _check_sizes(input_size, mean, std)
    wish = _Wish(
        checkpoint=None, pretrained=True, input_size=input_size, mean=mean, std=std, seed=0
    )
    return _users_own(copy.deepcopy(module), wish, name=name, weights="as passed by the caller")


def fresh_module(spec: ModelSpec) -> nn.Module:
    """The same architecture, in evaluation mode, with weights that are not the model's.

    The weights are what the library makes of a new network; they depend on torch's global seed.

    Raises:
        UsageError: The factory that made the model is not there any more.
    """
    if spec.source == "demo":
        module = zoo.DEMOS[spec.name]()
    elif spec.source == "factory":
        module = factory.call(spec.name)
    else:
        module = timm_models.create(spec.name, pretrained=False, arguments=spec.arguments)
    return module.float().cpu().eval()


def weights_digest(module: nn.Module) -> str:
    """sha256 over every tensor of the state dict: name, dtype, shape and bytes, sorted by name."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        hasher.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        hasher.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _load_demo(name: str, wish: _Wish) -> LoadedModel:
    if wish.input_size not in (None, zoo.INPUT_SIZE):
        raise UsageError(f"{name} takes inputs of {zoo.INPUT_SIZE} only, not {wish.input_size}")
    torch.manual_seed(wish.seed)
    module = zoo.DEMOS[name]()
    weights = f"random (seed {wish.seed})"
    if wish.checkpoint is not None:
        load_into(module, read_checkpoint(wish.checkpoint), path=wish.checkpoint, name=name)
        weights = str(wish.checkpoint)
    elif wish.pretrained:
        file = zoo.ZOO_DIR / f"{name}.safetensors"
        load_into(module, read_checkpoint(file), path=file, name=name)
        weights = f"embedded {file.name}"
    preprocessing = Preprocessing(
        input_size=zoo.INPUT_SIZE,
        mean=wish.mean or zoo.MEAN,
        std=wish.std or zoo.STD,
        resize_shorter=zoo.INPUT_SIZE[1],
    )
    return _finished(
        module,
        name=name,
        source="demo",
        weights=weights,
        num_classes=len(zoo.CLASS_NAMES),
        label_space="fashion-mnist",
        class_names=zoo.CLASS_NAMES,
        preprocessing=preprocessing,
    )


def _load_factory(name: str, wish: _Wish) -> LoadedModel:
    _require_preprocessing(name, wish)
    torch.manual_seed(wish.seed)
    module = factory.call(name)
    weights = f"as made by {name}"
    if wish.checkpoint is not None:
        load_into(module, read_checkpoint(wish.checkpoint), path=wish.checkpoint, name=name)
        weights = str(wish.checkpoint)
    return _users_own(module, wish, name=name, weights=weights)


def _users_own(module: nn.Module, wish: _Wish, *, name: str, weights: str) -> LoadedModel:
    input_size, mean, std = _require_preprocessing(name, wish)
    module = module.float().cpu().eval()
    num_classes = factory.count_classes(module, input_size=input_size, name=name)
    return _finished(
        module,
        name=name,
        source="factory",
        weights=weights,
        num_classes=num_classes,
        preprocessing=Preprocessing(
            input_size=input_size, mean=mean, std=std, resize_shorter=min(input_size[1:])
        ),
    )


def _require_preprocessing(
    name: str, wish: _Wish
) -> tuple[InputSize, tuple[float, ...], tuple[float, ...]]:
    given = {
        "--input-size C,H,W": wish.input_size,
        "--mean R,G,B": wish.mean,
        "--std R,G,B": wish.std,
    }
    if wish.input_size is None or wish.mean is None or wish.std is None:
        absent = [flag for flag, value in given.items() if value is None]
        raise UsageError(
            f"{name} does not say how its pictures are prepared", fix=f"pass {' '.join(absent)}"
        )
    return wish.input_size, wish.mean, wish.std


def _load_timm(name: str, wish: _Wish) -> LoadedModel:
    config = timm_models.config(name)
    arguments = timm_models.arguments(name, config, wish.input_size)
    state = read_checkpoint(wish.checkpoint) if wish.checkpoint is not None else None
    if state is not None:
        arguments |= timm_models.head_arguments(config, state)
    torch.manual_seed(wish.seed)
    if state is not None and wish.checkpoint is not None:
        module = timm_models.create(name, pretrained=False, arguments=arguments)
        load_into(module, state, path=wish.checkpoint, name=name)
        weights = str(wish.checkpoint)
    elif wish.pretrained:
        module, weights = timm_models.create_pretrained(name, config, arguments)
    else:
        module = timm_models.create(name, pretrained=False, arguments=arguments)
        weights = f"random (seed {wish.seed})"
    num_classes = int(getattr(module, "num_classes", 0) or 0)
    if num_classes < 2:
        raise UsageError(
            f"{name} is no classifier: it has {num_classes} classes",
            fix="pass a model with a classifier, or --checkpoint FILE with one",
        )
    return _finished(
        module,
        name=name,
        source="timm",
        arguments=arguments,
        weights=weights,
        num_classes=num_classes,
        label_space="imagenet-1k" if num_classes == 1000 else None,
        preprocessing=timm_models.preprocessing(
            name, module, input_size=wish.input_size, mean=wish.mean, std=wish.std
        ),
    )


def _finished(module: nn.Module, **fields: Any) -> LoadedModel:
    module = module.float().cpu().eval()
    state = module.state_dict()
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise StageError(
            f"{fields['name']} has values that are not finite in {len(broken)} of {len(state)} "
            f"tensors ({fields['weights']}): {', '.join(broken[:5])}"
        )
    spec = ModelSpec(weights_sha256=weights_digest(module), **fields)
    return LoadedModel(spec=spec, module=module)


def _check_sizes(
    input_size: InputSize | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> None:
    if input_size is not None and (len(input_size) != 3 or min(input_size) < 1):
        raise UsageError(f"--input-size is {input_size}; C,H,W above zero are wanted")
    if (mean is None) != (std is None):
        raise UsageError("--mean and --std go together")
    if std is not None and min(std) <= 0:
        raise UsageError(f"--std is {std}; values above zero are wanted")
    channels = len(mean) if mean is not None else None
    if mean is not None and std is not None and len(mean) != len(std):
        raise UsageError(f"--mean has {len(mean)} values and --std {len(std)}")
    if input_size is not None and channels is not None and channels != input_size[0]:
        raise UsageError(f"--mean has {channels} values and --input-size {input_size[0]} channels")
