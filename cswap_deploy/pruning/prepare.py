"""A network made ready for pruning: traced, grouped, counted, and its ratio within reach."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from cswap_deploy.causal.consistency import try_masking
from cswap_deploy.config import PruneConfig
from cswap_deploy.errors import PruneError
from cswap_deploy.models.plain import copied
from cswap_deploy.network.deletion import exact_groups
from cswap_deploy.network.graph import Graph, trace
from cswap_deploy.network.offsets import needs_bias, with_biases
from cswap_deploy.network.placing import moved
from cswap_deploy.network.residual import find_structure
from cswap_deploy.network.selection import select
from cswap_deploy.network.sizes import SizeModel, smallest
from cswap_deploy.network.units import Group
from cswap_deploy.pruning.allocation import Limits
from cswap_deploy.pruning.refit import solvable
from cswap_deploy.records.plan import Size

_ALIGNED = 8
"""Widths that are no multiple of this run slower than wider ones that are: on ONNX Runtime's CPU
kernels (measured, benchmarks/LOG.md) as on tensor cores."""
_SMALL, _ALIGNED_SMALL = 32, 4
"""``--round-to auto`` aligns smaller groups to less: 8 would be over a quarter of them."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A network ready to be pruned; its units are masked in ``graph.module``."""

    graph: Graph
    """Over a copy of the network with a bias on every consumer."""
    dense: Graph
    """The same over another copy, which stays as it is."""
    groups: tuple[Group, ...]
    excluded: dict[str, str]
    """Root layer -> why its units cannot be removed."""
    biased: tuple[str, ...]
    """Layers that were given a bias."""
    sizes: SizeModel
    """Size of what is left in ``graph``."""
    dense_size: Size
    """Size of the network as the user gave it."""
    limits: Limits
    example: Tensor
    """(2, C, H, W)."""
    together: bool = True
    """Whether masked forwards of several variants may share a batch."""
    notes: tuple[str, ...] = ()
    """What ``--exclude`` and ``--include`` matched."""

    @property
    def module(self) -> nn.Module:
        """The network whose units are masked."""
        return self.graph.module

    def on(self, module: nn.Module) -> Self:
        """The same with another module of the architecture to mask."""
        return replace(self, graph=self.graph.on(module))

    def to(self, device: torch.device) -> Self:
        """The same on a device; itself where it is there. Examples stay in the host's memory."""
        if device == self.graph.device:
            return self
        dense = self.dense.to(device)
        return replace(self, dense=dense, graph=dense.on(moved(self.module, device)))

    def copy(self) -> Self:
        """One more to use up: preparing takes seconds, a copy does not."""
        return replace(self.on(copied(self.module)), sizes=self.sizes.copy())


def prepare(module: nn.Module, images: Tensor, config: PruneConfig) -> Prepared:
    """Find what can be removed and check that the ratio is within reach.

    Args:
        module: In eval mode, float32; not changed.
        images: (N, C, H, W), N >= 2, real ones.
        config: Of it ``ratio`` (above 0), ``ratio_of``, ``round_to``, ``exclude``, ``include``.

    Raises:
        ExportError: The network cannot be traced.
        PruneError: Nothing can be removed, or the ratio is out of reach; says the range. One of
            latency is checked later (:func:`check_reach`).
    """
    example = images[:2].contiguous()
    base = copied(module)
    dense = trace(base, example)
    structure = find_structure(dense, branches=_branches_go(config))
    asked = select(dense, structure.groups, exclude=config.exclude, include=config.include)
    groups, inexact = exact_groups(base, torch.randn_like(example), asked.groups)
    changed = {c.layer for g in groups for c in g.consumers} | set(solvable(dense))
    biased = [n for n in dense.layers() if n in changed and needs_bias(dense, n)]
    dense = with_biases(dense, biased)
    trusted = try_masking(dense, groups, example)
    groups = [g for g in groups if g.name not in trusted.excluded]
    excluded = structure.excluded | asked.excluded | inexact | trusted.excluded
    if not groups:
        why = "".join(f"\n    {name}: {reason}" for name, reason in excluded.items())
        raise PruneError(
            f"{type(module).__name__} has no structure that can be removed{why}",
            fix="pass --ratio 0 to export the dense model",
        )
    work = copied(base)
    prepared = Prepared(
        dense.on(work), dense, tuple(groups), excluded, tuple(biased),
        sizes=SizeModel(work, example, groups),
        dense_size=SizeModel(module, example, groups).size(),
        limits=_limits(groups, config),
        example=example, together=trusted.together, notes=asked.notes,
    )  # fmt: skip
    if config.ratio_of != "latency":
        check_reach(prepared, config)
    return prepared


def _branches_go(config: PruneConfig) -> bool:
    """Only where effects rank, and what is left is refitted: nothing else makes up for a branch."""
    return config.branches and config.refit and config.criterion == "cswap"


def _limits(groups: list[Group], config: PruneConfig) -> Limits:
    """What the groups are aligned to; never split for a latency, which odd widths do not save.

    ONNX Runtime has no blocked kernels for them: networks with a few single units gone take up
    to 1.5 times as long as the dense one (benchmarks/LOG.md).
    """
    alignments = {g.name: _alignment(g, config.round_to) for g in groups}
    floors = {g.name: 0 if g.kind == "branch" else alignments[g.name] for g in groups}
    split = config.round_to == "auto" and config.ratio_of != "latency"
    return Limits(alignments, floors, split)


def _alignment(group: Group, round_to: int | str) -> int:
    if group.kind in ("heads", "branch"):
        return 1
    if isinstance(round_to, int):
        return min(round_to, group.units)
    aligned = _ALIGNED_SMALL if group.units < _SMALL else _ALIGNED
    return 1 if group.units % aligned else aligned


def check_reach(net: Prepared, config: PruneConfig) -> None:
    """Fail where a ratio cannot be met; a :class:`PruneError` says the range."""
    of, ratio, floors = config.ratio_of, config.ratio, net.limits.floors
    total = net.dense_size.amount(of)
    most = 1 - smallest(net.sizes, net.groups, floors).amount(of) / total
    steps = {g.name: 1 if net.limits.split else net.limits.alignments[g.name] for g in net.groups}
    savings = [
        net.sizes.saving(g.name, range(g.units % steps[g.name] or steps[g.name]), of)
        for g in net.groups
        if g.units > floors[g.name]
    ]
    least = min(savings, default=0) / total
    if of == "latency" and ratio > most:
        raise PruneError(
            f"a speed-up of {1 / (1 - ratio):.2f}x cannot be reached: without all that may go, "
            f"this network would be {1 / (1 - most):.2f}x as fast, as far as its nodes tell",
            fix=f"pass --speedup {np.floor(100 / (1 - most) * 0.9) / 100:g} or less",
        )
    if of != "latency" and (ratio > most or ratio < least / 2):
        what = {"params": "parameters", "channels": "units"}.get(of, "MACs")
        raise PruneError(
            f"--ratio {ratio:g} of the {what} cannot be met: this network can lose "
            f"{least:.2%} to {most:.2%} of its {total:,.0f} {what}",
            fix=f"pass a ratio from {least:.4f} to {np.floor(most * 1e4) / 1e4:.4f}, or 0 to "
            "export the dense model",
        )
