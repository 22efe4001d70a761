"""Fused epilogues: norm, addition and activation behind a consumer, computed in the same kernel.

Between a consumer and the next convolution or linear layer a network does little arithmetic and
much reading and writing. :func:`fanout.masked_fanout` computes all of it for many variants in one
pass over memory; this finds which nodes it covers, and gathers its arguments.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cswap_deploy.causal.fanout import Activation, ActivationKind, Epilogue, Fanout, masked_fanout
from cswap_deploy.causal.interventions import AblationValue, constant_output, mix, stack
from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.nodes import batched, input_of
from cswap_deploy.network.offsets import scale_and_shift
from cswap_deploy.network.unfolding import window_of
from cswap_deploy.network.units import Consumer, channel_dim

_aten = torch.ops.aten
_SAME = {_aten.dropout.default}
_KINDS: dict[Any, ActivationKind] = {
    _aten.relu.default: "relu", _aten.relu_.default: "relu",
    _aten.hardtanh.default: "hardtanh", _aten.hardtanh_.default: "hardtanh",
    _aten.silu.default: "silu", _aten.silu_.default: "silu",
    _aten.gelu.default: "gelu",
    _aten.hardswish.default: "hardswish", _aten.hardswish_.default: "hardswish",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FusedEpilogue:
    """A consumer's node and what alone reads it, as far as the kernel goes."""

    nodes: tuple[fx.Node, ...]
    norm: fx.Node | None
    other: fx.Node | None
    """What is added; from before the cut."""
    activation: Activation

    @property
    def last(self) -> fx.Node:
        """The node whose value the kernel computes."""
        return self.nodes[-1]

    def variants(
        self, graph: Graph, layer: Consumer, values: Sequence[AblationValue], kept: Env
    ) -> Tensor:
        """(V * N, ...): the value of ``last``, one unit intervened on in each variant.

        Args:
            graph: The network as it stands.
            layer: The consumer.
            values: Of each variant; all of the same number of inputs.
            kept: Values of the consumer's node, its input and ``other``.
        """
        node = self.nodes[0]
        x, z = kept[input_of(node)], kept[node]
        dim = channel_dim(layer)
        together = stack(values)
        index = together.index
        rest = x.index_select(dim if dim >= 0 else x.ndim + dim, index.flatten())
        if together.weights is not None:
            rest = rest - mix(together.weights.to(x.dtype), x, dim)
        # (N, V * B, H, W) or (N, ..., V * B) -> the variants first
        rest = rest.unflatten(dim, tuple(index.shape)).movedim(1 if dim == 1 else -2, 0)
        constants = [constant_output(layer, v) for v in values]
        scale, shift = None, None
        if self.norm is not None:
            scale, shift = (t.float() for t in scale_and_shift(graph, self.norm, torch.float64))
        other = None if self.other is None else kept[self.other]
        return masked_fanout(
            Fanout(
                z,
                rest,
                layer.weight.detach()[:, index].movedim(1, 0),
                constant=None if constants[0] is None else torch.stack(constants).to(x.dtype),  # type: ignore[arg-type]
                window=window_of(node, layer),
                epilogue=Epilogue(scale, shift, other, self.activation),
            )
        )


def find_fused_epilogue(
    node: fx.Node, layer: nn.Module, *, inside: Container[fx.Node]
) -> FusedEpilogue | None:
    """Follow a consumer's output through a norm, an addition and an activation.

    ``inside`` is what runs again behind the cut, ``node`` included. ``None`` for grouped
    convolutions, which the kernel does not compute.
    """
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return None
    nodes, norm, other, activation = [node], None, None, Activation()
    while len(users := list(nodes[-1].users)) == 1:
        (user,) = users
        if user.target is _aten.batch_norm.default and user.args[0] is nodes[-1]:
            if norm is not None or other is not None or user.args[5]:
                break
            norm = user
        elif user.target in (_aten.add.Tensor, _aten.add_.Tensor) and not user.kwargs:
            others = [a for a in user.all_input_nodes if a is not nodes[-1]]
            if (
                other is not None
                or len(others) != 1
                or others[0] in inside
                or not _alike(user, nodes[-1], others[0])
            ):
                break
            other = others[0]
        elif (kind := _KINDS.get(user.target)) is not None:
            nodes.append(user)
            activation = _activation(kind, user)
            break
        elif user.target not in _SAME:
            break
        nodes.append(user)
    return FusedEpilogue(tuple(nodes), norm, other, activation)


def _activation(kind: ActivationKind, node: fx.Node) -> Activation:
    if kind == "hardtanh":
        limits: list[Any] = [*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :]]
        return Activation(kind, float(limits[0]), float(limits[1]))
    if kind == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
        return Activation("gelu_tanh")
    return Activation(kind)


def _alike(*nodes: fx.Node) -> bool:
    """Whether all values have the same shape: the addition broadcasts nothing."""
    shapes = [n.meta["val"].shape[1:] for n in nodes if batched(n)]
    return len(shapes) == len(nodes) and all(shape == shapes[0] for shape in shapes)
