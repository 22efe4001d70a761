"""Masked forwards: intervene on units, run what follows, compare the predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cswap_deploy.causal.effects import relative_effect
from cswap_deploy.causal.epilogue import FusedEpilogue, find_fused_epilogue
from cswap_deploy.causal.interventions import (
    AblationValue,
    Moments,
    ablation_values,
    constant_output,
    contribution,
    mix,
)  # fmt: skip
from cswap_deploy.causal.tasks import OutputEffect
from cswap_deploy.config import Task
from cswap_deploy.errors import StageError
from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.nodes import (
    batch_dim,
    batched,
    bytes_of,
    elements,
    input_of,
    memory_format_of,
)
from cswap_deploy.network.units import Consumer, Group, channel_dim


class MaskedForward:
    """Some units of a group: what a forward must keep, and what runs again without each of them."""

    def __init__(
        self,
        graph: Graph,
        group: Group,
        units: Sequence[int],
        moments: Mapping[str, Moments],
        *,
        fused: bool = False,
        task: Task = "classify",
    ) -> None:
        """Find where the network is cut, and each unit's ablation value.

        Args:
            graph: The network as it stands.
            group: Where the units are.
            units: Which of them, by index.
            moments: Of the consumers' inputs; empty for the zero intervention.
            fused: Compute what follows the only consumer with :mod:`causal.fanout`, where that is
                possible: on a GPU variants then leave it at the speed of memory. Not in bfloat16.
            task: What the network's outputs are.
        """
        self.graph, self.group = graph, group
        self.effect = OutputEffect(task, graph.measured)
        self.units = np.asarray(units, dtype=np.int64)
        self.consumers: list[tuple[fx.Node, str, list[AblationValue]]] = []
        """Node, layer, and the ablation value of each unit there."""
        for consumer in group.consumers:
            found = moments.get(consumer.layer)
            indices = [consumer.indices[u] for u in units]
            values = ablation_values(found, indices, device=graph.device)
            self.consumers += [(n, consumer.layer, values) for n in graph.readers(consumer.layer)]
        self._suffix = graph.suffix(node for node, _, _ in self.consumers)
        inside = set(self._suffix.nodes)
        self._consumers = [c for c in self.consumers if c[0] in inside]
        self._first = {node for node, _, _ in self.consumers if input_of(node) not in inside}
        self.epilogue = self._find_epilogue(inside) if fused else None
        """What one kernel computes behind the consumer; ``None`` where each operation runs."""
        self._apart = any(not batched(node) for node, _, _ in self.consumers)
        """Whether variants cannot share a batch, since a layer has another dimension first."""
        keep = {*self._first, *(input_of(node) for node in self._first)}
        if self.epilogue is not None:
            self._suffix = graph.suffix([self.epilogue.last], given=True)
            keep |= {self.epilogue.other} if self.epilogue.other is not None else set()
        if task != "classify":  # logits of classes are small, maps are not
            keep |= {output.node for output in graph.measured}
        self.keep = frozenset(keep | {*self._suffix.cached})
        """Nodes whose values :meth:`measure` needs."""
        self.kept_bytes = sum(bytes_of(node) for node in self.keep)
        """Bytes of these values, for one image."""
        self.largest = max((elements(n) for n in self._suffix.nodes), default=1)
        """Elements of the largest value behind the cut, for one image."""

    def _find_epilogue(self, inside: set[fx.Node]) -> FusedEpilogue | None:
        if len(self._consumers) != 1 or len(self._first) != 1:
            return None
        ((node, layer, _),) = self._consumers
        return find_fused_epilogue(node, self.graph.layer(layer), inside=inside)

    def measure(
        self,
        kept: Env,
        logits: Tensor,
        labels: Tensor,
        *,
        variant_bytes: int,
        together: bool = True,
        rounded: Graph | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both effects of the units, (units, N) float64 each, on the images of one forward.

        Args:
            kept: Values of ``keep``, for N images.
            logits: (N, elements), the outputs of the same forward.
            labels: (N,).
            variant_bytes: Of the largest value behind the cut, in one batch of variants.
            together: Whether images and variants may share a batch as they come; otherwise each
                variant runs by itself, on all N images.
            rounded: The network in bfloat16, where what follows the cut then runs.
            tick: Called with the number of (unit, image) pairs finished.

        Raises:
            StageError: A prediction is not finite.
        """
        together = together and not self._apart
        per_image = (2 if rounded is not None else 4) * self.largest
        chunk = max(1, min(len(logits), variant_bytes // per_image)) if together else len(logits)
        found = []
        for begin in range(0, len(logits), chunk):
            part = slice(begin, begin + chunk)
            values = self._part(kept, part, len(logits))
            count = len(logits[part])
            step = max(1, variant_bytes // (per_image * count)) if together else 1
            graph: Graph = self.graph if rounded is None else rounded
            base = logits[part] if rounded is None else self._run(graph, values, None, count)
            effects = []
            for at in range(0, len(self.units), step):
                chosen = range(at, min(at + step, len(self.units)))
                masked = self._run(graph, values, chosen, count)
                effects.append(self._compare(masked, base, labels[part], len(chosen)))
                if tick is not None:
                    tick(len(chosen) * count)
            found.append([torch.cat(e) for e in zip(*effects, strict=True)])
        xi, divergence = (torch.cat(e, 1) for e in zip(*found, strict=True))
        return xi, divergence

    def _compare(
        self, masked: Tensor, outputs: Tensor, labels: Tensor, variants: int
    ) -> tuple[Tensor, Tensor]:
        """Both effects, (V, N) each, computed in float64; without classes the first is zero."""
        base = outputs.double()
        changed = masked.double().view(variants, len(outputs), -1)
        if not torch.isfinite(changed).all():
            raise StageError(
                f"the network's output is not finite while the units of {self.group.name} are "
                "measured",
                fix="check the weights and the preprocessing (--mean, --std) of this model",
            )
        divergence = self.effect.divergence(changed, base)
        if self.effect.task != "classify":
            return torch.zeros_like(divergence), divergence
        rows = torch.arange(len(labels), device=labels.device)
        p = F.softmax(base, -1)[rows, labels].clamp_min(torch.finfo(torch.float64).tiny)
        p_masked = F.softmax(changed, -1)[:, rows, labels]
        return relative_effect(p_masked, p), divergence

    def outputs(self, kept: Env, images: int, *, together: bool = True) -> Tensor:
        """(units, N, elements) of the network without each unit.

        In one batch for each image, or (not ``together``) for each unit.
        """
        units = range(len(self.units))
        if not together or self._apart:
            found = [self._run(self.graph, kept, [u], images) for u in units]
            return torch.stack(found)
        parts = [self._part(kept, slice(n, n + 1), images) for n in range(images)]
        return torch.stack([self._run(self.graph, part, units, 1) for part in parts], 1)

    def _part(self, kept: Env, part: slice, images: int) -> Env:
        """Of the values that are kept for N images, those for some of them."""
        found = {}
        for node in self.keep:
            dim, value = batch_dim(node), kept[node]
            if dim is not None:
                each = value.shape[dim] // images
                begin, end, _ = part.indices(images)
                value = value.narrow(dim, begin * each, (end - begin) * each)
            found[node] = value
        return found

    def _run(self, graph: Graph, kept: Env, chosen: Sequence[int] | None, images: int) -> Tensor:
        """Outputs of some variants, or (``None``) of the network without any intervention."""
        replace: dict[fx.Node, Callable[[fx.Node, Env], Tensor]] = {}
        if self.epilogue is not None and chosen is not None:
            ((_, name, values),) = self._consumers
            variants = [values[v] for v in chosen]
            value = self.epilogue.variants(self.graph, self.graph.layer(name), variants, kept)
            replace[self.epilogue.last] = partial(_given, value)
        else:
            for node, name, values in self._consumers:
                cached = (kept[node], kept[input_of(node)]) if node in self._first else None
                if chosen is not None:
                    variants = [values[v] for v in chosen]
                    layer = self.graph.layer(name)
                    replace[node] = _Intervention(graph, layer, variants, cached)
                elif cached is not None:
                    replace[node] = partial(_given, cached[0])
        return graph.run_suffix(
            self._suffix,
            {node: kept[node] for node in self._suffix.cached},
            images=images,
            variants=1 if chosen is None else len(chosen),
            replace=replace,
        )


def _given(value: Tensor, node: fx.Node, env: Env) -> Tensor:
    return value


@dataclass(frozen=True, slots=True)
class _Intervention:
    """A consumer's output for several variants, one unit intervened on in each."""

    graph: Graph
    """What follows the cut runs on it."""
    layer: Consumer
    values: list[AblationValue]
    """One for each variant."""
    cached: tuple[Tensor, Tensor] | None
    """The output and the input with nothing removed; ``None`` for consumers behind the first."""

    def __call__(self, node: fx.Node, env: Env) -> Tensor:
        cached = self.cached
        out = self._replace(node, env) if cached is None else self._subtract(node, *cached)
        shape = [1] * out.ndim
        shape[channel_dim(self.layer)] = -1
        for part, value in zip(out.chunk(len(self.values)), self.values, strict=True):
            constant = constant_output(self.layer, value)
            if constant is not None:
                part.add_(constant.view(shape))
        return out

    def _subtract(self, node: fx.Node, output: Tensor, x: Tensor) -> Tensor:
        """(V * N, ...): z - W_n * (a_n - A a), from the cached output and input."""
        out = torch.empty(
            (len(self.values) * len(output), *output.shape[1:]), dtype=output.dtype,
            device=output.device, memory_format=memory_format_of(output),
        )  # fmt: skip
        for part, value in zip(out.chunk(len(self.values)), self.values, strict=True):
            torch.sub(output, contribution(self.layer, node, x, value), out=part)
        return out

    def _replace(self, node: fx.Node, env: Env) -> Tensor:
        """(V * N, ...): the consumer run on inputs of which each variant has its own replaced."""
        source = input_of(node)
        x: Tensor = self.graph.value(source, env).clone()
        dim = channel_dim(self.layer)
        for part, value in zip(x.chunk(len(self.values)), self.values, strict=True):
            rows = part.movedim(dim, 1)
            weights = value.weights
            new = 0.0 if weights is None else mix(weights.to(x.dtype), part, dim).movedim(dim, 1)
            rows[:, value.index] = new
        out: Tensor = self.graph.execute(node, {**env, source: x}, batch=len(x))
        return out
