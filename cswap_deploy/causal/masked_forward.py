"""Masked forwards: intervene on units, run what follows, compare the predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cswap_deploy.causal.bfloat16 import HalfGraph
from cswap_deploy.causal.effects import kl_divergence, relative_effect
from cswap_deploy.causal.epilogue import Tail, tail_of
from cswap_deploy.causal.interventions import (
    Moments,
    StandIn,
    constant_output,
    contribution,
    mix,
    stand_ins,
)
from cswap_deploy.errors import StageError
from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.nodes import batched, bytes_of, elements, input_of
from cswap_deploy.network.units import Consumer, Group, channel_dim


class Cut:
    """Some units of a group, ready to be measured: what a forward must keep, what runs again."""

    def __init__(
        self,
        graph: Graph,
        group: Group,
        units: Sequence[int],
        moments: Mapping[str, Moments],
        *,
        fan: bool = False,
    ) -> None:
        """Find where the network is cut, and what takes each unit's place.

        Args:
            graph: The network as it stands.
            group: Where the units are.
            units: Which of them, by index.
            moments: Of the consumers' inputs; empty for the zero intervention.
            fan: Compute what follows the only consumer with :mod:`causal.fanout`, where that is
                possible: on a GPU variants then leave it at the speed of memory. Not in bfloat16.
        """
        self.graph, self.group = graph, group
        self.units = np.asarray(units, dtype=np.int64)
        device = next(graph.module.parameters()).device
        self.consumers = [
            (
                node,
                c.layer,
                [
                    s.to(device)
                    for s in stand_ins(moments.get(c.layer), [c.indices[u] for u in units])
                ],
            )
            for c in group.consumers
            for node in graph.readers(c.layer)
        ]
        self._suffix = graph.suffix(node for node, _, _ in self.consumers)
        inside = set(self._suffix.nodes)
        self._consumers = [c for c in self.consumers if c[0] in inside]
        first = [c for c in self.consumers if input_of(c[0]) not in inside]
        self._first = {node for node, *_ in first}
        self._tail = self._find_tail(inside) if fan else None
        if self._tail is not None:
            self._suffix = graph.suffix([self._tail.last], given=True)
        others = {self._tail.other} if self._tail is not None and self._tail.other else set()
        self.keep = frozenset(
            {*self._suffix.cached, *(c[0] for c in first), *(input_of(c[0]) for c in first)}
            | others
        )
        """Nodes whose values :meth:`measure` needs."""
        self.kept_bytes = sum(bytes_of(node) for node in self.keep)
        """Of one image."""
        self.largest = max((elements(n) for n in self._suffix.nodes), default=1)
        """Elements of the largest value behind the cut, of one image."""

    def _find_tail(self, inside: set[fx.Node]) -> Tail | None:
        if len(self._consumers) != 1 or len(self._first) != 1:
            return None
        ((node, layer, _),) = self._consumers
        return tail_of(node, self.graph.module.get_submodule(layer), inside=inside)

    def measure(
        self,
        kept: Env,
        logits: Tensor,
        labels: Tensor,
        *,
        variant_bytes: int,
        together: bool = True,
        half: HalfGraph | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both effects of the units on the images of one forward.

        Args:
            kept: Values of ``keep``, for N images.
            logits: (N, classes), of the same forward.
            labels: (N,).
            variant_bytes: Variants are batched until the largest value behind the cut has this
                many bytes.
            together: Whether images and variants may share a batch as they come; otherwise each
                variant runs by itself, on all N images.
            half: Runs what follows the cut in bfloat16; the unmasked network is then run in the
                same arithmetic for comparison.
            tick: Called with the number of (unit, image) pairs finished.

        Returns:
            Relative change of the true class's probability and KL divergence, each
            (units, N) float64.

        Raises:
            StageError: A prediction is not finite.
        """
        per_image = (2 if half is not None else 4) * self.largest
        chunk = max(1, min(len(logits), variant_bytes // per_image)) if together else len(logits)
        found = []
        for begin in range(0, len(logits), chunk):
            part = slice(begin, begin + chunk)
            values = {n: v[part] if batched(n) else v for n, v in kept.items() if n in self.keep}
            count = len(logits[part])
            step = max(1, variant_bytes // (per_image * count)) if together else 1
            graph: Graph = self.graph if half is None else half
            base = logits[part] if half is None else self._run(graph, values, None, count)
            effects = []
            for at in range(0, len(self.units), step):
                chosen = range(at, min(at + step, len(self.units)))
                masked = self._run(graph, values, chosen, count)
                effects.append(_compare(masked, base, labels[part], len(chosen), self.group.name))
                if tick is not None:
                    tick(len(chosen) * count)
            found.append([torch.cat(e) for e in zip(*effects, strict=True)])
        xi, divergence = (torch.cat(e, 1) for e in zip(*found, strict=True))
        return xi, divergence

    def _run(self, graph: Graph, kept: Env, chosen: Sequence[int] | None, images: int) -> Tensor:
        """Logits of some variants, or (``None``) of the network without any intervention."""
        cached = {n: kept[n] for n in self._suffix.cached}
        if self._tail is not None and chosen is not None:
            return self._fan_out(self._tail, kept, chosen, images)
        replace: dict[fx.Node, Callable[[fx.Node, Env], Tensor]] = {}
        for node, layer, units in self._consumers:
            output, input_ = kept.get(node), kept.get(input_of(node))
            if chosen is not None:
                variants = [units[v] for v in chosen]
                replace[node] = _Intervention(
                    graph, self.graph, layer, variants, output, input_, cut=node in self._first
                )
            elif node in self._first:
                assert output is not None
                replace[node] = partial(_given, output)
        variants_ = 1 if chosen is None else len(chosen)
        return graph.run_suffix(
            self._suffix, cached, images=images, variants=variants_, replace=replace
        )

    def _fan_out(self, tail: Tail, kept: Env, chosen: Sequence[int], images: int) -> Tensor:
        ((_, name, units),) = self._consumers
        layer: Consumer = self.graph.module.get_submodule(name)  # type: ignore[assignment]
        value = tail.variants(self.graph, layer, [units[v] for v in chosen], kept)
        cached = {n: kept[n] for n in self._suffix.cached}
        return self.graph.run_suffix(
            self._suffix, cached, images=images, variants=len(chosen),
            replace={tail.last: partial(_given, value)},
        )  # fmt: skip


def _given(value: Tensor, node: fx.Node, env: Env) -> Tensor:
    return value


class _Intervention:
    """A consumer's output for several variants, one unit intervened on in each."""

    def __init__(
        self,
        graph: Graph,
        whole: Graph,
        layer: str,
        stand_ins: list[StandIn],
        output: Tensor | None,
        input_: Tensor | None,
        *,
        cut: bool,
    ) -> None:
        self.graph, self.stand_ins = graph, stand_ins
        self.layer: Consumer = whole.module.get_submodule(layer)  # type: ignore[assignment]
        self.output, self.input = output, input_
        self.cut = cut

    def __call__(self, node: fx.Node, env: Env) -> Tensor:
        out = self._subtract(node) if self.cut else self._replace(node, env)
        shape = [1] * out.ndim
        shape[channel_dim(self.layer)] = -1
        for part, stand_in in zip(out.chunk(len(self.stand_ins)), self.stand_ins, strict=True):
            constant = constant_output(self.layer, stand_in)
            if constant is not None:
                part.add_(constant.view(shape))
        return out

    def _subtract(self, node: fx.Node) -> Tensor:
        """(V * N, ...): z - W_n * (a_n - A a), from the cached input and output."""
        assert self.output is not None
        assert self.input is not None
        count = len(self.output)
        shape = (len(self.stand_ins) * count, *self.output.shape[1:])
        maps = self.output.ndim == 4
        last = maps and self.output.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        out = torch.empty(
            shape, dtype=self.output.dtype, device=self.output.device, memory_format=layout
        )
        for part, stand_in in zip(out.chunk(len(self.stand_ins)), self.stand_ins, strict=True):
            lost = contribution(self.layer, node, self.input, stand_in)
            torch.sub(self.output, lost, out=part)
        return out

    def _replace(self, node: fx.Node, env: Env) -> Tensor:
        """(V * N, ...): the consumer run on inputs of which each variant has its own replaced."""
        source = input_of(node)
        x: Tensor = self.graph.value(source, env).clone()
        dim = channel_dim(self.layer)
        for part, stand_in in zip(x.chunk(len(self.stand_ins)), self.stand_ins, strict=True):
            new = 0.0 if stand_in.weights is None else mix(stand_in.weights.to(x.dtype), part, dim)
            rows = part.movedim(dim, 1)
            rows[:, stand_in.index] = new if isinstance(new, float) else new.movedim(dim, 1)
        out: Tensor = self.graph.execute(node, {**env, source: x}, batch=len(x))
        return out


def _compare(
    masked: Tensor, logits: Tensor, labels: Tensor, variants: int, group: str
) -> tuple[Tensor, Tensor]:
    """Both effects, (V, N) each, computed in float64."""
    base = logits.double()
    changed = masked.double().view(variants, len(logits), -1)
    if not torch.isfinite(changed).all():
        raise StageError(
            f"the network's output is not finite while the units of {group} are measured",
            fix="check the weights and the preprocessing (--mean, --std) of this model",
        )
    rows = torch.arange(len(labels), device=labels.device)
    p = F.softmax(base, -1)[rows, labels].clamp_min(torch.finfo(torch.float64).tiny)
    p_masked = F.softmax(changed, -1)[:, rows, labels]
    return relative_effect(p_masked, p), kl_divergence(changed, base)
