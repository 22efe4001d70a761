"""What follows a consumer so closely that one kernel computes it too: norm, addition, activation.

Between a consumer and the next convolution or linear layer a network does little arithmetic and
much reading and writing. :func:`fanout.masked_fanout` computes all of it for many variants in one
pass over memory; this finds what it may take over, and gathers its arguments.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cswap_deploy.causal.fanout import Activation, ActivationKind, Epilogue, Window, masked_fanout
from cswap_deploy.causal.interventions import StandIn, constant_output, mix
from cswap_deploy.network.graph import Env, Graph
from cswap_deploy.network.nodes import batched
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
class Tail:
    """A consumer's node and what alone reads it, as far as the kernel goes."""

    nodes: tuple[fx.Node, ...]
    norm: fx.Node | None
    other: fx.Node | None
    """What is added; from before the cut."""
    activation: Activation
    window: Window

    @property
    def last(self) -> fx.Node:
        """The node whose value the kernel computes."""
        return self.nodes[-1]

    def variants(
        self, graph: Graph, layer: Consumer, stand_ins: Sequence[StandIn], kept: Env
    ) -> Tensor:
        """(V * N, ...): the value of ``last``, one unit intervened on in each variant.

        Args:
            graph: The network as it stands.
            layer: The consumer.
            stand_ins: Of each variant; all of the same number of inputs.
            kept: Values of the consumer's node, its input and ``other``.
        """
        node = self.nodes[0]
        x, z = kept[node.args[0]], kept[node]  # type: ignore[index]
        dim = channel_dim(layer)
        index = torch.stack([s.index for s in stand_ins]).to(x.device)
        rest = x.index_select(dim if dim >= 0 else x.ndim + dim, index.flatten())
        if stand_ins[0].weights is not None:
            weights = torch.cat([s.weights for s in stand_ins])  # type: ignore[misc]
            rest = rest - mix(weights.to(x), x, dim)
        # (N, V * B, H, W) or (N, ..., V * B) -> the variants first
        rest = rest.unflatten(dim, tuple(index.shape)).movedim(1 if dim == 1 else -2, 0)
        constants = [constant_output(layer, s) for s in stand_ins]
        constant = None if constants[0] is None else torch.stack(constants).to(x)  # type: ignore[arg-type]
        scale, shift = _scale_and_shift(graph, self.norm)
        return masked_fanout(
            z,
            rest,
            layer.weight.detach()[:, index].movedim(1, 0),
            constant=constant,
            window=self.window,
            epilogue=Epilogue(
                scale=scale,
                shift=shift,
                other=None if self.other is None else kept[self.other],
                activation=self.activation,
            ),
        )


def tail_of(node: fx.Node, layer: nn.Module, *, inside: Container[fx.Node]) -> Tail | None:
    """Follow a consumer's output through a norm, an addition and an activation.

    Args:
        node: The consumer's.
        layer: The consumer.
        inside: What runs again behind the cut, ``node`` included.

    Returns:
        ``None`` for consumers that the kernel does not compute: grouped convolutions, and padding
        that is no number.
    """
    window = Window()
    if isinstance(layer, nn.Conv2d):
        found = _window(node)
        if layer.groups != 1 or found is None:
            return None
        window = found
    nodes, norm, other, activation = [node], None, None, Activation()
    while True:
        users = list(nodes[-1].users)
        if len(users) != 1:
            break
        (user,) = users
        if user.target in _SAME:
            pass
        elif user.target is _aten.batch_norm.default and user.args[0] is nodes[-1]:
            if norm is not None or other is not None or user.args[5]:
                break
            norm = user
        elif user.target in (_aten.add.Tensor, _aten.add_.Tensor) and not user.kwargs:
            others = [a for a in user.all_input_nodes if a is not nodes[-1]]
            if other is not None or len(others) != 1 or others[0] in inside:
                break
            if not _alike(user, nodes[-1], others[0]):
                break
            other = others[0]
        elif (kind := _KINDS.get(user.target)) is not None:
            nodes.append(user)
            activation = _activation(kind, user)
            break
        else:
            break
        nodes.append(user)
    return Tail(tuple(nodes), norm, other, activation, window)


def _activation(kind: ActivationKind, node: fx.Node) -> Activation:
    if kind == "hardtanh":
        limits: list[Any] = [*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :]]
        return Activation(kind, float(limits[0]), float(limits[1]))
    if kind == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
        return Activation("gelu_tanh")
    return Activation(kind)


def _window(node: fx.Node) -> Window | None:
    """Of a convolution's node; ``None`` where its padding is no number."""
    given: list[Any] = [*node.args[3:]]
    stride, padding, dilation = (given + [[1, 1], [0, 0], [1, 1]][len(given) :])[:3]
    if isinstance(padding, str):
        return None
    return Window(_pair(stride), _pair(padding), _pair(dilation))


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[-1])


def _scale_and_shift(graph: Graph, norm: fx.Node | None) -> tuple[Tensor | None, Tensor | None]:
    """What a batch norm multiplies each channel by, and what it then adds; (O,) float32."""
    if norm is None:
        return None, None
    gamma, beta, mean, var = (
        None if a is None else graph.value(a, {}).detach().double()  # type: ignore[arg-type]
        for a in norm.args[1:5]
    )
    assert mean is not None
    assert var is not None
    scale = (var + norm.args[7]).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    return scale.float(), shift.float()


def _alike(*nodes: fx.Node) -> bool:
    """Whether all values have the same shape: the addition broadcasts nothing."""
    shapes = [n.meta["val"].shape[1:] for n in nodes if batched(n)]
    return len(shapes) == len(nodes) and all(shape == shapes[0] for shape in shapes)
