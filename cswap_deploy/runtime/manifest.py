"""Reading ``manifest.json`` as far as everyone must: its seal, its schema, and that it agrees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cswap_deploy.errors import ArtifactError
from cswap_deploy.runtime.documents import UNSEALED, parse_sealed, read_regular
from cswap_deploy.runtime.schema import check, manifest_schema

MANIFEST = "manifest.json"
SCHEMA_VERSION = 5
"""1 said what was asked twice; 2 had classifiers alone; 3 had latency samples as lists, no test of
accuracy and no predictions beside it; 4 had no seal. All are read."""
_SEALED_SINCE = 5
_COPY = "copy the bundle again"
_BUILD = "build the bundle again with this version of cswap-deploy"
_MOST_PIXELS = 2**26
"""Of one image of the network: 256 MiB as float32."""
_MOST_RESIZE = 8
"""How much longer than the network's image a picture's shorter side may become."""


def read_manifest(folder: Path) -> tuple[dict[str, Any], bool]:
    """The manifest of a bundle, as of the present schema, and whether it is sealed.

    No other file is looked at.

    Raises:
        ArtifactError: There is none, it is damaged or of another schema version, or contradicts
            itself.
    """
    path = folder / MANIFEST
    try:
        content = read_regular(path, within=folder)
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder} is not a bundle: it has no {MANIFEST}",
            fix="name the folder that `cswap-deploy build -o` wrote",
        ) from None
    except OSError as err:
        raise ArtifactError(f"cannot read {path}: {err.strerror or err}", fix=_COPY) from err
    try:
        told, is_sealed = parse_sealed(content, since=_SEALED_SINCE)
    except ValueError as err:
        raise ArtifactError(f"cannot read {path}: {err}", fix=_COPY) from err
    try:
        told = _present(told)
        check(told, manifest_schema())
    except ValueError as err:
        raise ArtifactError(
            f"{path} is not a manifest of schema version {SCHEMA_VERSION}: {err}", fix=_BUILD
        ) from err
    if outside := [ref["path"] for ref in told["files"] if not _inside(ref["path"])]:
        raise ArtifactError(f"{path} names files outside the bundle: {', '.join(outside)}")
    if wrong := [*_contradictions(told), *unsound_steps(told["model"]["preprocessing"])]:
        raise ArtifactError(f"{path} is damaged: " + "; ".join(wrong), fix=_COPY)
    return told, is_sealed


def _present(told: dict[str, Any]) -> dict[str, Any]:
    """A manifest of an earlier schema as one of the present.

    Raises:
        ValueError: It is of a later one, or lacks what every one has.
    """
    version = told["schema_version"]
    if not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(f"schema_version {version}")
    if version == 1:
        asked = {name: told.pop(name) for name in ("ratio_requested", "ratio_of") if name in told}
        settings = told.get("settings")
        if len(asked) < 2 or not isinstance(settings, dict):
            raise ValueError("it does not say what was asked")
        settings |= {"ratio": asked["ratio_requested"], "ratio_of": asked["ratio_of"]}
    return {"seal": UNSEALED, "files": []} | told | {"schema_version": SCHEMA_VERSION}


def _contradictions(told: dict[str, Any]) -> Iterator[str]:
    """Where two places of a manifest say different things of a file."""
    names = Counter(ref["path"] for ref in told["files"])
    yield from (f"files names {name} twice" for name, count in names.items() if count > 1)
    files = {ref["path"]: ref for ref in told["files"]}
    stated: list[tuple[str, dict[str, Any], Sequence[str]]] = [("onnx", told["onnx"], ())]
    for index, target in enumerate(told["targets"]):
        engine = target["engine"]
        stated.append((f"targets.{index}.engine", engine, engine.get("extra_files", ())))
    for place, artefact, beside in stated:
        own = files.get(artefact["path"])
        if own is None:
            yield f"{place} names {artefact['path']}, which is not listed in files"
            continue
        if artefact["sha256"] != own["sha256"]:
            yield f"{place} and files have another sha256 of {artefact['path']}"
        folder = PurePosixPath(artefact["path"]).parent
        others = [files.get(str(folder / name)) for name in beside]
        if None in others:
            yield f"{place} has files beside it that are not listed in files"
            continue
        with_others = own["size_bytes"] + sum(ref["size_bytes"] for ref in others if ref)
        if artefact["size_bytes"] not in (own["size_bytes"], with_others):
            yield f"{place} and files have another size of {artefact['path']}"


def unsound_steps(steps: Mapping[str, Any]) -> Iterator[str]:
    """Why no picture can go through a preprocessing."""
    channels, height, width = steps["input_size"]
    if channels * height * width > _MOST_PIXELS:
        yield f"input_size {channels}, {height}, {width} is too large"
    for name in ("mean", "std"):
        if len(steps[name]) != channels:
            yield f"{name} has {len(steps[name])} values for {channels} channels"
    if steps["resize_shorter"] > _MOST_RESIZE * max(height, width):
        yield f"resize_shorter {steps['resize_shorter']} is too large for {height} x {width}"


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name != "."
