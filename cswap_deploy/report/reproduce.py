"""The command that makes a bundle again, and the metadata of its model card."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

from cswap_deploy.config import AIMS, load_config, sections
from cswap_deploy.records.manifest import Manifest
from cswap_deploy.settings import flag_of

_ELSEWHERE = ("model", "output", "store", "resume", "waypoints", "ratio_of")
_PIPELINES = {"classify": "image-classification", "dense": "image-segmentation",
              "detect": "object-detection"}  # fmt: skip

_FASTER = 1.2, 1.5, 2.0
"""What speed-ups are tried, as a factor of what came along with fewer parameters."""


def command(manifest: Manifest) -> str:
    """The line that builds the bundle, with every setting that is not the default.

    Settings without a flag follow as the file that ``--config`` takes.
    """
    return _line(manifest, "build", _aim(manifest.settings))


def speed_instead(manifest: Manifest) -> str | None:
    """The sweep that finds what a bundle's accuracy buys where speed is the aim.

    ``None`` where it was the aim, or latency or accuracy was not measured.
    """
    if manifest.ratio_requested == 0 or manifest.ratio_of == "latency":
        return None
    result = next(iter(manifest.targets), None)
    if result is None or result.speedup is None:
        return None
    # Rounded to a tenth of a point such that a network that is as good meets it.
    if result.accuracy is not None:
        kept = f"drop<={math.ceil(1000 * max(result.accuracy.drop, 0.0)) / 10:g}%"
    elif result.agreement is not None:
        kept = f"agreement>={math.floor(1000 * result.agreement.share) / 10:g}%"
    else:
        return None
    base = max(result.speedup, 1.0)
    speedups = ",".join(f"{factor * base:.2g}" for factor in _FASTER)
    return _line(manifest, "sweep", ["--speedups", speedups, "--pick", kept])


def _line(manifest: Manifest, verb: str, aim: list[str]) -> str:
    settings = manifest.settings
    defaults = load_config(model=manifest.model.name).settings()
    words = ["cswap-deploy", verb, manifest.model.name, *aim]
    lines = []
    for section in sections().values():
        for name in section.model_fields:
            value = settings.get(name)
            if name in (*AIMS, *_ELSEWHERE) or value is None or value == defaults[name]:
                continue
            flag = flag_of(section, name)
            if flag.expert:
                lines.append(f"{name} = {json.dumps(value)}")
            else:
                words += _flag(name, value)
    text = shlex.join(words)
    if not lines:
        return text
    return "\n".join([f"{text} --config FILE.toml", "# FILE.toml:", *(f"# {x}" for x in lines)])


def _aim(settings: dict[str, Any]) -> list[str]:
    for name in ("speedup", "max_latency"):
        if settings.get(name) is not None:
            return _flag(name, settings[name])
    words = _flag("ratio", settings["ratio"])
    if settings.get("ratio_of", "params") != "params":
        words += _flag("ratio_of", settings["ratio_of"])
    return words


def _flag(name: str, value: Any) -> list[str]:
    typed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{typed}" if value else f"--no-{typed}"]
    if isinstance(value, dict):  # --batch
        return [f"--{typed}", ":".join(map(str, value.values()))]
    if isinstance(value, list):
        each = name in ("target", "exclude", "include", "keep_fp32", "compute_capability")
        if each:
            return [word for one in value for word in (f"--{typed}", str(one))]
        return [f"--{typed}", ",".join(map(str, value))]
    return [f"--{typed}", f"{value:g}" if isinstance(value, float) else str(value)]


def card(manifest: Manifest) -> str:
    """YAML metadata, as the Hugging Face Hub reads it at the top of a model card.

    Source:
        Hugging Face Hub documentation, "Model Cards", model card metadata and ``model-index``.
    """
    model = manifest.model
    lines = ["library_name: cswap-deploy"]
    if model.task in _PIPELINES:
        lines.append(f"pipeline_tag: {_PIPELINES[model.task]}")
    if model.source == "timm":
        lines.append(f"base_model: {json.dumps(f'timm/{model.name}')}")
    lines += ["tags:", *(f"- {tag}" for tag in ("pruned", "c-swap", "onnx"))]
    lines += [f"- {result.engine.target}" for result in manifest.targets]
    change, images = manifest.torch_accuracy, manifest.validation
    if change is not None and images is not None:
        lines += [
            "model-index:",
            f"- name: {json.dumps(model.name)}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {json.dumps(images.source)}",
            f"      type: {json.dumps(images.source)}",
            "    metrics:",
            "    - type: accuracy",
            f"      value: {change.pruned.top1:.4f}",
            f"      name: {json.dumps(f'top-1 on {images.count:,} images')}",
        ]
    return "\n".join(lines) + "\n"
