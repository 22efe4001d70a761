"""What a new gate starts from: a budgets file with margins, and the CI job that holds it."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Literal

from cswap_deploy.errors import UsageError
from cswap_deploy.gate.budgets import alike_on
from cswap_deploy.records.bundle import DENSE
from cswap_deploy.records.manifest import Manifest

Service = Literal["github", "gitlab"]
PLACES: dict[Service, str] = {
    "github": ".github/workflows/cswap.yml", "gitlab": ".gitlab-ci.yml",
}  # fmt: skip
"""Where a service looks for its jobs."""


def budgets_text(
    manifest: Manifest, *, margin: float, bundle: Path, baseline: str | None = None
) -> str:
    """``budgets.toml`` that the bundle meets today, with a margin.

    Limits that hold on any machine are set: sizes, accuracy, and what is relative. Milliseconds
    are of the machine that built the bundle, so they stand as comments.

    Args:
        manifest: Of the bundle.
        margin: Fraction by which a figure may be worse than now.
        bundle: Its folder.
        baseline: What later bundles are held against, a path or ``git:REF:PATH``.

    Raises:
        UsageError: The margin is no fraction.
    """
    if not 0 < margin <= 1:
        raise UsageError(f"--margin {margin:g}: a fraction above 0, as 0.1 or 10%, is wanted")
    size = manifest.onnx.size_bytes / (1 << 20)
    lines = [
        f"# Limits for {manifest.model.name}, {100 * margin:g} % above what its bundle has today.",
        "# All names: `python -m pydoc cswap_deploy.gate.budgets`. What is timed is timed where",
        "# `cswap-deploy check BUNDLE --budget THIS_FILE` runs.",
        'inconclusive = "pass"     # "fail": a limit inside the interval fails too',
        f"params_max = {math.ceil(manifest.pruned.params * (1 + margin))}",
        f"macs_max = {math.ceil(manifest.pruned.macs * (1 + margin))}",
        f"size_max_mib = {_up(size * (1 + margin))}       # model.onnx",
        "parity_max = 1e-3         # largest difference of logits from PyTorch",
    ]
    scored = [r.accuracy for r in manifest.targets if r.accuracy is not None]
    scored += [manifest.torch_accuracy] if manifest.torch_accuracy is not None else []
    if scored:
        drop = max(0.0, *(change.drop for change in scored))
        lines += [
            f"accuracy_drop_max = {_up(drop + margin / 10)}  # from the dense network, fraction",
        ]
    if alike := alike_on(manifest):
        least = min(found.share for _, found in alike)
        lines.append(f"agreement_min = {_down(least * (1 - margin / 2))}")
    for result in manifest.targets:
        found, target = result.latency, result.engine.target
        if found is None:
            continue
        lines += ["", f"[latency.{target}]", f"batch = {found.batch}"]
        if result.speedup is not None and manifest.lists(DENSE):
            lines.append(f"speedup_min = {_down(result.speedup * (1 - margin))}  # over dense.onnx")
        if baseline is not None:
            lines.append(f"slowdown_max = {margin:g}       # over the baseline, in alternation")
        lines += [
            f"# Of {manifest.device.cpu}, which built it: for a CI of one kind of machine.",
            *(f"# {name} = {_up(getattr(found, name) * (1 + margin))}"
              for name in ("p50_ms", "p90_ms", "p99_ms")),
        ]  # fmt: skip
    if baseline is not None:
        lines += [
            "", "[baseline]", f'bundle = "{baseline}"',
            f"size_growth_max = {margin:g}", f"top1_drop_max = {margin / 10:g}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def job_text(service: Service, *, bundle: Path, budgets: Path) -> str:
    """The CI job that holds a bundle against its budgets, for one of the services."""
    template = files("cswap_deploy.gate").joinpath(f"{service}.yml").read_text()
    return template.replace("BUNDLE", bundle.as_posix()).replace("BUDGETS", budgets.as_posix())


def _up(value: float) -> float:
    """Rounded up to three figures."""
    return _rounded(value, math.ceil)


def _down(value: float) -> float:
    return _rounded(value, math.floor)


def _rounded(value: float, how: object) -> float:
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
    scaled = value / unit
    found = math.ceil(scaled - 1e-9) if how is math.ceil else math.floor(scaled + 1e-9)
    return float(f"{found * unit:.6g}")
