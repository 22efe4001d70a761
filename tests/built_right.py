"""Prune and export a network, and hold every result against PyTorch: built right, or refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cswap_deploy
from cswap_deploy.errors import ArtifactError, CswapError, ExportError
from cswap_deploy.export.onnx import export_onnx
from cswap_deploy.network.deletion import contiguous_state, load_pruned

BATCHES = (1, 2, 7)
TOLERANCE = 1e-4
"""Largest |PyTorch - ONNX Runtime|, relative to the largest logit."""
QUICK: dict[str, Any] = {
    "rounds": 1, "measuring": "adaptive", "scoring_samples": 4, "select": "unit", "round_to": 1,
    "refit_producers": False,
}  # fmt: skip
"""Every stage of pruning runs, on few images."""
_RANGE = re.compile(r"pass a ratio from ([\d.]+) to ([\d.]+)")


@dataclass(frozen=True, slots=True)
class Built:
    """What came of one network: it was pruned and is right, or it was refused."""

    error: str = ""
    """Class of the error that refused it; empty where it was built."""
    reason: str = ""
    """That error's words, its fix line included."""
    params: tuple[int, int] = (0, 0)
    """Before and after."""
    units: tuple[int, int] = (0, 0)
    groups: int = 0
    excluded: dict[str, str] = field(default_factory=dict)
    """What stays whole, and why."""
    seconds: float = 0.0

    @property
    def refused(self) -> bool:
        return bool(self.error)


def pictures(count: int, size: tuple[int, int, int], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise with labels of ten classes: (N, C, H, W) and (N,)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, *size, generator=g), torch.arange(count) % 10


def build(
    make: Callable[[], nn.Module],
    folder: Path,
    *,
    ratio: float = 0.2,
    size: tuple[int, int, int] = (3, 32, 32),
    images: int = 20,
    export: bool = True,
    replay: bool = True,
    fresh: Callable[[], nn.Module] | None = None,
    **settings: Any,
) -> Built:
    """Prune and export what ``make`` makes, and check it.

    The pruned module answers with finite numbers; its plan and weights alone, on a module made
    afresh, give the same answers; its parameters are as many as the plan says; ONNX Runtime gives
    its answers at three batch sizes.

    Args:
        make: Makes the network; called more than once, the same weights each time.
        folder: For the files; empty.
        ratio: Part of the parameters to remove.
        size: (C, H, W).
        images: How many to prune on.
        export: Whether ONNX is tried too, which takes longest.
        replay: Whether plan and weights are tried on a module made afresh, which is traced again.
        fresh: Makes the architecture with any weights; ``make`` unless said.
        **settings: Of ``cswap_deploy.prune``, beside :data:`QUICK`.

    Returns:
        What was built, or the refusal; only a ``CswapError`` is one.

    Raises:
        AssertionError: Something was built, and is wrong.
    """
    begun = time.perf_counter()
    data = pictures(images, size)
    try:
        pruned = cswap_deploy.prune(make(), data, ratio=ratio, **(QUICK | settings))
    except CswapError as err:
        return _refusal(err, begun)
    want = _check(pruned, make, data[0])
    if replay:
        _check_replay(pruned, fresh or make, data[0], want, folder)
    if export:
        try:
            _check_onnx(pruned.module, data[0], folder / "model.onnx")
        except ExportError as err:
            return _refusal(err, begun)
    plan = pruned.plan
    return Built(
        params=(plan.dense.params, plan.pruned.params),
        units=(plan.dense.units, plan.pruned.units),
        groups=len(plan.groups), excluded=dict(plan.excluded),
        seconds=time.perf_counter() - begun,
    )  # fmt: skip


def follow_the_fix(refused: Built, make: Callable[[], nn.Module], folder: Path, **how: Any) -> None:
    """Do what a refusal's fix line says, where that is another ratio: it must work.

    Raises:
        AssertionError: It does not.
    """
    fix = refused.reason.partition("\n  fix: ")[2]
    found = _RANGE.search(fix)
    ratios = [float(ratio) for ratio in found.groups()] if found else []
    if re.search(r"--ratio 0\b|\bor 0 to\b", fix):
        ratios.append(0.0)
    for at, ratio in enumerate(ratios):
        inner = folder / str(at)
        inner.mkdir()
        again = build(make, inner, **(how | {"ratio": ratio}))
        assert not again.refused, f"refused again at the ratio {ratio}: {again.reason}"


def _refusal(err: CswapError, begun: float) -> Built:
    return Built(type(err).__name__, str(err), seconds=time.perf_counter() - begun)


def _check(pruned: Any, make: Callable[[], nn.Module], images: Tensor) -> Tensor:
    """The pruned network's answers, which are sound."""
    with torch.no_grad():
        want = pruned.module(images)
    assert torch.isfinite(want).all(), "the pruned network's outputs are not finite"
    if not pruned.plan.groups:
        with torch.no_grad():
            off = float((make().float().eval()(images) - want).abs().max())
        assert off <= TOLERANCE * float(want.abs().max()), f"nothing was removed, and {off:.1e} off"
    counted = sum(p.numel() for p in pruned.module.parameters())
    assert counted == pruned.plan.pruned.params, f"{counted} parameters: {pruned.plan.pruned}"
    return want


def _check_replay(
    pruned: Any, fresh: Callable[[], nn.Module], images: Tensor, want: Tensor, folder: Path
) -> None:
    from safetensors.torch import save_file

    weights = folder / "weights.safetensors"
    save_file(contiguous_state(pruned.module), weights)
    plan = type(pruned.plan).model_validate_json(pruned.plan.model_dump_json())
    try:
        dense = fresh().float().eval()
        replayed = load_pruned(weights, plan, dense, torch.zeros_like(images[:2]))
    except ArtifactError as err:
        raise AssertionError(f"plan and weights do not make the network again: {err}") from err
    with torch.no_grad():
        off = float((replayed(images) - want).abs().max())
    assert off == 0.0, f"the plan replayed on a fresh module answers differently, by {off:.1e}"


def _check_onnx(module: nn.Module, images: Tensor, path: Path) -> None:
    import onnxruntime

    export_onnx(module, input_size=tuple(images.shape[1:]), path=path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch in BATCHES:
        part = images[:batch].contiguous()
        with torch.no_grad():
            want = module(part).numpy()
        (got,) = session.run(None, {session.get_inputs()[0].name: part.numpy()})
        off, scale = float(np.abs(got - want).max()), float(np.abs(want).max())
        assert off <= TOLERANCE * scale, f"ONNX at batch {batch} is off by {off:.1e} of {scale:.1e}"
