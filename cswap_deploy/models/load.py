"""From a name, a checkpoint or a factory to a network with its weights and preprocessing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from cswap_deploy.config import ModelConfig
from cswap_deploy.errors import StageError, UsageError
from cswap_deploy.models import demos, factory, timm_models
from cswap_deploy.models.checkpoints import choose_weights, load_into, not_finite
from cswap_deploy.models.plain import plain
from cswap_deploy.records.model import ModelSpec, Preprocessing
from cswap_deploy.runtime.preprocess import MOST_PIXELS

_NARROWEST, _WIDEST = 1e-6, 1e6
"""Of a mean and a standard deviation; float32 holds their quotients."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network with its weights: float32, on the CPU, in evaluation mode."""

    spec: ModelSpec
    module: nn.Module
    notes: tuple[str, ...] = ()
    """What the user should know of it; for the manifest."""


def load_model(config: ModelConfig, *, seed: int = 0) -> LoadedModel:
    """Make a network, give it its weights, and say how images are prepared for it.

    Args:
        config: ``model`` is a demo (``demo-resnet``, ``demo-vit``), a timm model, or
            ``package.module:factory`` for a callable that returns an ``nn.Module``. What is not
            said of preprocessing is the model's own.
        seed: Of random weights.

    Raises:
        UsageError: The name is unknown, the checkpoint does not fit, or a factory's preprocessing
            was not given.
        MissingDependencyError: The weights are on a hub that cannot be reached.
        StageError: A weight is not finite.
    """
    _check_sizes(config)
    if config.model in demos.DEMOS:
        return _load_demo(config, seed)
    if ":" in config.model:
        return _load_factory(config, seed)
    return _load_timm(config, seed)


def wrap_module(module: nn.Module, config: ModelConfig) -> LoadedModel:
    """Copy a network that the caller made, and say how images are prepared for it.

    It maps (N, C, H, W) to the outputs of ``config.task``; ``config.model`` is its name, for
    people.

    Raises:
        UsageError: ``input_size``, ``mean`` or ``std`` is absent or does not fit.
    """
    _check_sizes(config)
    return _own_module(module, config, weights="as passed by the caller")


def fresh_module(spec: ModelSpec) -> nn.Module:
    """Make the architecture again, in evaluation mode, with weights from torch's global seed.

    Raises:
        UsageError: There is no such model here, or the factory that made it is gone.
    """
    if spec.source == "factory":
        module = factory.call(spec.name)
    elif spec.name in demos.DEMOS:
        module = demos.DEMOS[spec.name]()
    else:
        timm_models.pretrained_cfg(spec.name)  # timm also takes names of folders and of hubs
        arguments = {str(name): value for name, value in spec.arguments.items()}
        module = timm_models.create(spec.name, pretrained=False, arguments=arguments)
    return plain(module)[0]


def weights_licence(spec: ModelSpec, settings: Mapping[str, Any]) -> str | None:
    """What a demo's or timm's own weights are licensed under; a user's own are not known.

    Args:
        spec: The network.
        settings: Of the build.
    """
    if settings.get("checkpoint") is not None or not settings.get("pretrained", True):
        return None
    if spec.source == "demo":
        return str(metadata.metadata("cswap-deploy").json["license_expression"])
    if spec.source == "timm":
        licence: str | None = timm_models.pretrained_cfg(spec.name).license
        return licence
    return None


def weights_digest(module: nn.Module) -> str:
    """sha256 over every tensor of the state dict: name, dtype, shape and bytes, sorted by name."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        hasher.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        hasher.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _load_demo(config: ModelConfig, seed: int) -> LoadedModel:
    name = config.model
    if config.input_size not in (None, demos.INPUT_SIZE):
        raise UsageError(f"{name} takes inputs of {demos.INPUT_SIZE} only, not {config.input_size}")
    torch.manual_seed(seed)
    module = demos.DEMOS[name]()
    weights, size = f"random (seed {seed})", demos.INPUT_SIZE
    notes: tuple[str, ...] = ()
    if config.checkpoint is not None:
        weights, notes = _load_checkpoint(module, config, size)
    elif config.pretrained:
        file = demos.weights_file(name)
        load_into(module, choose_weights(file, module.state_dict()), name=name, input_size=size)
        weights = f"embedded {file.name}"
    returned = factory.examine(module.eval(), size, name=name, task=config.task)
    return _finished(
        module, returned, notes, name=name, source="demo", weights=weights,
        label_space="fashion-mnist", class_names=demos.CLASS_NAMES,
        preprocessing=Preprocessing.of(
            input_size=size, mean=config.mean or demos.MEAN, std=config.std or demos.STD,
            resize_shorter=size[1], exif_rotate=config.exif_rotate,
        ),
    )  # fmt: skip


def _load_factory(config: ModelConfig, seed: int) -> LoadedModel:
    preprocessing = _require_preprocessing(config)  # before code of the user runs
    torch.manual_seed(seed)
    module = factory.call(config.model)
    weights = f"as made by {config.model}"
    notes: tuple[str, ...] = ()
    if config.checkpoint is not None:
        weights, notes = _load_checkpoint(module, config, preprocessing.input_size)
    return _own_module(module, config, weights=weights, notes=notes)


def _own_module(
    module: nn.Module, config: ModelConfig, *, weights: str, notes: tuple[str, ...] = ()
) -> LoadedModel:
    preprocessing = _require_preprocessing(config)
    module, made_plain = plain(module)
    returned = factory.examine(
        module, preprocessing.input_size, name=config.model, task=config.task
    )
    return _finished(
        module, returned, (*notes, *made_plain), name=config.model, source="factory",
        weights=weights, preprocessing=preprocessing,
    )  # fmt: skip


def _require_preprocessing(config: ModelConfig) -> Preprocessing:
    size, mean, std = config.input_size, config.mean, config.std
    if size is None or mean is None or std is None:
        given = {"--input-size C,H,W": size, "--mean R,G,B": mean, "--std R,G,B": std}
        absent = [flag for flag, value in given.items() if value is None]
        raise UsageError(
            f"{config.model} does not say how its pictures are prepared",
            fix=f"pass {' '.join(absent)}",
        )
    return Preprocessing.of(
        input_size=size, mean=mean, std=std, resize_shorter=min(size[1:]),
        exif_rotate=config.exif_rotate,
    )  # fmt: skip


def _load_timm(config: ModelConfig, seed: int) -> LoadedModel:
    name = config.model
    cfg = timm_models.pretrained_cfg(name)
    arguments = timm_models.arguments(cfg, config.input_size)
    torch.manual_seed(seed)
    notes: tuple[str, ...] = ()
    if config.checkpoint is not None:
        module = timm_models.create(name, pretrained=False, arguments=arguments)
        found = choose_weights(config.checkpoint, module.state_dict(), config.checkpoint_key)
        if head := timm_models.head_arguments(cfg, found.state):
            arguments |= head
            module = timm_models.create(name, pretrained=False, arguments=arguments)
        size = config.input_size or tuple(cfg.input_size)
        load_into(module, found, name=name, input_size=size, by_flags=True)
        weights, notes = found.where, found.notes()
    elif config.pretrained:
        module, weights = timm_models.create_pretrained(name, cfg, arguments)
    else:
        module = timm_models.create(name, pretrained=False, arguments=arguments)
        weights = f"random (seed {seed})"
    preprocessing = timm_models.preprocessing(module, config)
    module = module.float().cpu().eval()
    returned = factory.examine(module, preprocessing.input_size, name=name, task=config.task)
    return _finished(
        module, returned, notes, name=name, source="timm", arguments=arguments, weights=weights,
        label_space="imagenet-1k" if returned.num_classes == 1000 else None,
        preprocessing=preprocessing,
    )  # fmt: skip


def _load_checkpoint(
    module: nn.Module, config: ModelConfig, input_size: tuple[int, int, int]
) -> tuple[str, tuple[str, ...]]:
    """Load the checkpoint's weights into a network; where they lay, for the record, and notes."""
    assert config.checkpoint is not None
    found = choose_weights(config.checkpoint, module.state_dict(), config.checkpoint_key)
    load_into(module, found, name=config.model, input_size=input_size)
    return found.where, found.notes()


def _finished(
    module: nn.Module, returned: factory.Returned, notes: tuple[str, ...], **fields: Any
) -> LoadedModel:
    module, made_plain = plain(module)
    notes += made_plain
    state = module.state_dict()
    if broken := not_finite(state):
        raise StageError(
            f"{fields['name']} has values that are not finite in {len(broken)} of {len(state)} "
            f"tensors ({fields['weights']}): {', '.join(broken[:5])}"
        )
    spec = ModelSpec(
        weights_sha256=weights_digest(module), task=returned.task, outputs=returned.names,
        num_classes=returned.num_classes, **fields,
    )  # fmt: skip
    return LoadedModel(spec, module, notes)


def _check_sizes(config: ModelConfig) -> None:
    size, mean, std = config.input_size, config.mean, config.std
    if size is not None and min(size) < 1:
        raise UsageError(f"--input-size is {size}; C,H,W above zero are wanted")
    if size is not None and math.prod(size) > MOST_PIXELS:
        raise UsageError(
            f"--input-size is {size}, {math.prod(size):,} values an image; {MOST_PIXELS:,} are the "
            "most",
            fix="pass the size that the network is trained for",
        )
    if mean is None or std is None:  # they go together
        return
    if min(std) <= 0:
        raise UsageError(f"--std is {std}; values above zero are wanted")
    if min(std) < _NARROWEST or max(*std, *map(abs, mean)) > _WIDEST:
        raise UsageError(
            f"--mean is {mean} and --std {std}: no pixels in [0, 1] are of such a scale",
            fix="divide both by 255 where they are for pixels in [0, 255]",
        )
    if len(mean) != len(std):
        raise UsageError(f"--mean has {len(mean)} values and --std {len(std)}")
    if size is not None and len(mean) != size[0]:
        raise UsageError(f"--mean has {len(mean)} values and --input-size {size[0]} channels")
