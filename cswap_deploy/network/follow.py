"""Follow labels through an exported graph: every operation is executed on labels, not on numbers.

An operation that moves elements moves their labels. One that joins elements couples them. One that
mixes channels in a way that is not linear, or that is not known here, blocks what flows into it:
that stays as it is, with the reason, and everything else can still be removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cswap_deploy.errors import first_line
from cswap_deploy.network.coupling import Coupling, Product, Read, Spelled, Value, compressed
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.nodes import FEW, opname, shape_in
from cswap_deploy.network.operations import (
    ALONG,
    MOVING,
    REDUCING,
    RESHAPING,
    SAME,
    SPATIAL,
    convolves,
    module_of,
    pointwise,
    said,
)  # fmt: skip

_Labelled = Value | list[Value] | None
"""Of a constant: nothing."""

_CANNOT = (
    RuntimeError, IndexError, KeyError, ValueError, TypeError, AssertionError, NotImplementedError,
)  # fmt: skip
"""What torch raises where labels do not fit an operation as numbers do."""
_MOST_CELLS = 1 << 21
"""Parameters with more elements are not followed but through a layer that owns them."""


class UnfollowedError(Exception):
    """An operation that cannot be followed; the message is the reason."""


def follow(graph: Graph) -> Coupling:
    """Execute a graph on labels; see :mod:`network.coupling`."""
    return _Follower(graph).run()


class _Follower:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.coupling = graph, Coupling()
        self._values: dict[fx.Node, _Labelled] = {}
        self._constants: dict[fx.Node, Any] = {}
        self._weights: set[Any] = {
            n.args[1] for n in graph.nodes if convolves(n) and n.args[1] in graph.names
        }
        """Weights that a layer's own operation reads."""

    def run(self) -> Coupling:
        for node in self.graph.nodes:
            if node in self.graph.sizes:
                continue
            try:
                self._values[node] = self._value(node)
            except UnfollowedError as err:
                self._values[node] = self._stop(node, str(err))
            except _CANNOT as err:
                reason = f"{said(node)} cannot be followed: {first_line(err)}"
                self._values[node] = self._stop(node, reason)
        for output in self.graph.outputs:
            for value in self._tensors([output]):
                self.coupling.block(value.labels, "")
        self._watch_weights()
        return self.coupling

    def _stop(self, node: fx.Node, reason: str) -> _Labelled:
        """Leave whole what flows into a node."""
        for value in self._tensors(node.all_input_nodes):
            self.coupling.block(value.labels, reason)
        return self._fixed(node)

    def _fixed(self, node: fx.Node) -> _Labelled:
        found = node.meta.get("val")
        if isinstance(found, list | tuple):
            return [Value.fixed(shape_in(v)) for v in found if isinstance(v, Tensor)]
        return Value.fixed(shape_in(found)) if isinstance(found, Tensor) else None

    def _watch_weights(self) -> None:
        """A layer's weight that is also used in another way stays as it is."""
        for node in self._weights:
            name = self.graph.names[node]
            if any(not convolves(user) or user.args[1] is not node for user in node.users):
                for dim in (0, 1):
                    if (name, dim) in self.coupling.axes:
                        labels = self.coupling.axes[name, dim]
                        self.coupling.block(labels, f"{name} is used outside of its layer, too")

    # --- what a node reads ---

    def _read(self, node: Any) -> _Labelled:
        """Labels of an argument; nothing for constants."""
        if not isinstance(node, fx.Node):
            return None
        if node in self._values:
            return self._values[node]
        if node is self.graph.input:
            return Value.fixed(shape_in(node.meta["val"]))
        name, value = self.graph.names.get(node), node.meta.get("val")
        if name is None or not isinstance(value, Tensor) or value.numel() < 2:
            return None
        if node in self._weights or value.numel() > _MOST_CELLS:
            return Value.fixed(value.shape)
        if not value.is_floating_point():  # positions and masks are no units
            return None
        return self.coupling.cell(name, tuple(value.shape))

    def _tensors(self, nodes: Iterable[Any]) -> list[Value]:
        found = [self._read(n) for n in nodes]
        return [v for f in found for v in (f if isinstance(f, list) else [f]) if v is not None]

    def _one(self, node: Any) -> Value:
        """The labels of a tensor; those of a constant are fixed."""
        found = self._read(node)
        if isinstance(found, Value):
            return found
        return Value.fixed(shape_in(node.meta["val"]))

    def _concrete(self, node: fx.Node) -> Any:
        """A value that no image decides."""
        if node in self.graph.sizes:
            return shape_in([node.meta["val"]])[0]
        if node not in self._constants:
            if node is self.graph.input or isinstance(self._values.get(node), Value | list):
                raise UnfollowedError(f"{node.name} decides where elements go")
            if node in self.graph.bound:
                self._constants[node] = self.graph.bound[node]()
            else:
                self._constants[node] = self._compute(node, self._concrete)
        return self._constants[node]

    def _compute(self, node: fx.Node, read: Callable[[fx.Node], Any]) -> Any:
        args = fx.node.map_arg(node.args, read)
        return self.graph.targets[node](*args, **fx.node.map_arg(node.kwargs, read))

    # --- the rules ---

    def _value(self, node: fx.Node) -> _Labelled:
        name = opname(node)
        if name == "getitem":
            found = self._read(node.args[0])
            return found[node.args[1]] if isinstance(found, list) else None  # type: ignore[index]
        rule: Callable[[fx.Node], _Labelled] | None = getattr(self, f"_on_{name}", None)
        if rule is None and convolves(node):
            rule = self._convolve
        if rule is not None:
            return rule(node)
        if not self._tensors(node.all_input_nodes):
            return None  # a constant
        if name in MOVING:
            return self._move(node, name)
        if name in REDUCING:
            return self._reduce(node)
        if name in ALONG:
            return self._along(node)
        if SPATIAL.match(name):
            return self._pool(node, name)
        if name in SAME or pointwise(node):
            return self._join(node)
        raise UnfollowedError(f"goes through {said(node)}, which is not followed")

    def _join(self, node: fx.Node) -> _Labelled:
        """Element by element; a constant's size is the code's business."""
        parts = self._tensors(node.all_input_nodes)
        found = self.coupling.meet(parts)
        outputs = node.meta.get("val")
        return [found] * len(outputs) if isinstance(outputs, list | tuple) else found

    def _move(self, node: fx.Node, name: str) -> _Labelled:
        moved = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
        if not self._tensors(moved):
            return None

        def read(n: fx.Node) -> Any:
            if n in moved:
                return self._one(n).full
            return None if name.endswith("_as") else self._concrete(n)

        mapped: Any = fx.node.map_arg((node.args, node.kwargs), read)
        args, kwargs = mapped
        found: Any
        if name in {"view", "_unsafe_view", "view_as", "reshape_as"}:
            found = args[0].reshape(shape_in(node.meta["val"]))
        elif name == "expand_as":
            found = args[0].expand(shape_in(node.meta["val"]))
        elif name in {"constant_pad_nd", "pad"}:
            found = torch.ops.aten.constant_pad_nd(args[0], args[1], 0)
            if name == "pad" and len(args) > 2 and args[2] != "constant":
                found = torch.ops.aten.pad(args[0].double(), *args[1:]).long()
        elif name == "native_channel_shuffle":
            found = torch.ops.aten.channel_shuffle(*args)
        else:
            found = self.graph.targets[node](*args, **kwargs)
        if isinstance(found, Tensor):
            value = Value.of(found)
            if name in RESHAPING:
                self.coupling.boxes.append(value.labels)
            self._spell(node, value)
            return value
        parts = [Value.of(part) for part in found]
        self._spell(node, *parts)
        self._same_from_each(parts)
        return parts

    def _spell(self, node: fx.Node, *values: Value) -> None:
        for value in values:
            if value.varies(range(len(value.shape))):
                self.coupling.spelled.append(Spelled(module_of(node), value))

    def _same_from_each(self, parts: Sequence[Value]) -> None:
        """Equal parts stay equal: what leaves one of them leaves each."""
        shapes = {p.shape for p in parts}
        if len(parts) > 1 and len(shapes) == 1:
            ndim = len(parts[0].shape)
            sizes = [max(p.labels.shape[d] for p in parts) for d in range(ndim)]
            self.coupling.boxes.append(torch.stack([p.labels.expand(sizes) for p in parts]))

    def _reduce(self, node: fx.Node) -> _Labelled:
        value = self._one(node.args[0])
        at = 2 if opname(node) in {"linalg_vector_norm", "norm"} else 1
        dims = node.kwargs.get("dim", node.args[at] if len(node.args) > at else None)
        ndim = len(value.shape)
        if isinstance(dims, int):
            dims = [dims]
        if not isinstance(dims, list | tuple) or not dims:
            dims = range(ndim)
        which = {int(d) % ndim for d in dims if isinstance(d, int)}
        value = self.coupling.tie(value, sorted(which), f"{said(node)} joins its channels")
        found = node.meta["val"]
        first = found[0] if isinstance(found, list | tuple) else found
        shape = shape_in(first)
        kept = [s for d, s in enumerate(value.labels.shape) if d not in which]
        labels = value.labels if len(shape) == ndim else value.labels.reshape(kept)
        reduced = Value(labels, shape)
        return [reduced] * len(found) if isinstance(found, list | tuple) else reduced

    def _along(self, node: fx.Node) -> _Labelled:
        value = self._one(node.args[0])
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
        assert isinstance(dim, int)
        return self.coupling.tie(value, [dim], f"{said(node)} joins its channels")

    def _pool(self, node: fx.Node, name: str) -> _Labelled:
        value = self._one(node.args[0])
        digits = re.search(r"(\d)d", name)
        count = int(digits[1]) if digits else 2
        found = node.meta["val"]
        last = range(len(value.shape) - count, len(value.shape))
        value = self.coupling.tie(value, last, f"{said(node)} joins its channels")
        if isinstance(found, list | tuple):
            return [Value(value.labels, shape_in(f)) for f in found]
        return Value(value.labels, shape_in(found))

    def _norm_over(self, value: Value, dims: Iterable[int], kind: str) -> Value:
        return self.coupling.tie(value, dims, f"feeds {kind}, which normalises across channels")

    def _on_layer_norm(self, node: fx.Node) -> _Labelled:
        sizes: Any = node.args[1]
        kind = "RMSNorm" if opname(node) == "rms_norm" else "LayerNorm"
        return self._norm_over(self._one(node.args[0]), range(-len(sizes), 0), kind)

    _on_rms_norm = _on_layer_norm

    def _on_native_layer_norm(self, node: fx.Node) -> _Labelled:
        found = self._on_layer_norm(node)
        return [found] * 3 if isinstance(found, Value) else None

    def _on_group_norm(self, node: fx.Node) -> _Labelled:
        value, groups = self._one(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
        value = self._norm_over(value, range(2, len(value.shape)), "GroupNorm")
        if groups < value.shape[1] and value.varies([1]):
            batch, channels, *rest = value.shape
            labels = value.labels.reshape(-1, groups, channels // groups, *[1] * len(rest))
            parts = Value(labels, (batch, groups, channels // groups, *rest))
            parts = self._norm_over(parts, [2], "GroupNorm")
            value = Value.of(parts.full.reshape(value.shape))
        return self._scaled(node, value, node.args[2:4])

    def _on_instance_norm(self, node: fx.Node) -> _Labelled:
        value = self._one(node.args[0])
        value = self._norm_over(value, range(2, len(value.shape)), "InstanceNorm")
        return self._scaled(node, value, node.args[1:5])

    def _on_batch_norm(self, node: fx.Node) -> _Labelled:
        return self._scaled(node, self._one(node.args[0]), node.args[1:5])

    def _on__native_batch_norm_legit_no_training(self, node: fx.Node) -> _Labelled:
        found = self._scaled(node, self._one(node.args[0]), node.args[1:5])
        return [found] * 3

    def _on_cudnn_batch_norm(self, node: fx.Node) -> _Labelled:
        return [self._scaled(node, self._one(node.args[0]), node.args[1:5])]

    def _on_prelu(self, node: fx.Node) -> _Labelled:
        return self._scaled(node, self._one(node.args[0]), node.args[1:2])

    def _scaled(self, node: fx.Node, value: Value, vectors: Sequence[Any]) -> Value:
        """Coupled with vectors that have an element for each channel (dimension 1)."""
        for vector in self._tensors(vectors):
            shape = [1] * len(value.shape)
            if len(shape) > 1:
                shape[1] = vector.shape[0]
            labels = vector.labels.reshape([-1 if s > 1 else 1 for s in shape])
            value = self.coupling.meet([value, Value(labels, tuple(shape))])
        return value

    def _on_glu(self, node: fx.Node) -> _Labelled:
        value = self._one(node.args[0])
        dim = int(node.args[1]) if len(node.args) > 1 else -1  # type: ignore[arg-type]
        parts = [Value.of(part) for part in value.full.chunk(2, dim)]
        self._same_from_each(parts)
        return self.coupling.meet(parts)

    def _on_im2col(self, node: fx.Node) -> _Labelled:
        value = self._one(node.args[0])
        kernel: Any = node.args[1]
        if value.varies([2, 3]):
            raise UnfollowedError(f"goes through {said(node)}, which is not followed")
        channels = value.labels[:1, :, 0, 0].expand(1, value.shape[1])
        labels = channels.repeat_interleave(kernel[0] * kernel[1], 1).unsqueeze(-1)
        return Value(compressed(labels), shape_in(node.meta["val"]))

    # --- products ---

    def _convolve(self, node: fx.Node) -> _Labelled:
        """A convolution or a linear layer: what it reads ends there, and its outputs begin."""
        value, weight = self._one(node.args[0]), node.args[1]
        linear = opname(node) == "linear"
        dim = len(value.shape) - 1 if linear else 1
        name = self.graph.names.get(weight) if isinstance(weight, fx.Node) else None
        layer = self.graph.reader_of(node)
        words = layer or name or said(node)
        others = [d for d in range(len(value.shape)) if d != dim]
        value = self.coupling.tie(value, others, f"{words} mixes it along another dimension")
        inputs = value.labels.expand(
            [value.shape[d] if d == dim else 1 for d in range(len(value.shape))]
        ).reshape(-1)
        if name is None:
            self.coupling.block(inputs, f"{words} computes its weight on the way")
            return self._through_pieces(node) if linear else self._fixed(node)
        shape = tuple(weight.meta["val"].shape)  # type: ignore[union-attr]
        transposed = "transpose" in opname(node)
        groups = int(node.args[6]) if not linear and len(node.args) > 6 else 1  # type: ignore[arg-type]
        out_dim, in_dim = (1, 0) if transposed else (0, 1)
        outputs = self.coupling.axis(name, out_dim, shape[out_dim])
        by_itself = groups > 1 and shape[1] == 1 and not transposed
        if transposed and groups > 1:
            self.coupling.block(inputs, f"is read by {words}, a transposed convolution in groups")
            self.coupling.block(outputs, f"{words} is a transposed convolution in groups")
            return self._fixed(node)
        if by_itself:
            self.coupling.link(outputs, inputs.repeat_interleave(len(outputs) // len(inputs)))
        else:
            columns = self.coupling.axis(name, in_dim, shape[in_dim])
            self.coupling.link(inputs, columns.repeat(len(inputs) // len(columns)))
            if groups > 1:  # equal groups stay equal: the same slot leaves each
                slots = outputs.view(groups, -1)
                self.coupling.link(slots, slots[:1])
            if layer is not None:
                self.coupling.reads.append(Read(layer, inputs))
            else:
                kind = "a transposed convolution" if transposed else opname(node)
                self.coupling.block(inputs, f"is read by {words}, {kind} that cannot be masked")
        self._bias(node, name, outputs)
        out = list(shape_in(node.meta["val"]))
        labels = outputs.view([-1 if d == dim else 1 for d in range(len(out))])
        return Value(labels, tuple(out))

    def _through_pieces(self, node: fx.Node) -> _Labelled:
        """A linear map by a piece of a parameter, as one of query, key and value: its rows go."""
        weight = self._one(node.args[1])
        rows = self.coupling.tie(weight, [1], "").labels.reshape(-1)
        out = shape_in(node.meta["val"])
        bias = self._tensors(node.args[2:3])
        if bias:
            self.coupling.link(bias[0].full, rows.expand(weight.shape[0]))
        return Value(rows.view([1] * (len(out) - 1) + [-1]), out)

    def _bias(self, node: fx.Node, weight: str, outputs: Tensor) -> None:
        """A layer's own bias goes with its outputs; another tensor is coupled with them."""
        bias = node.args[2] if len(node.args) > 2 else None
        if not isinstance(bias, fx.Node):
            return
        owner, _, _ = weight.rpartition(".")
        if self.graph.names.get(bias) != f"{owner}.bias".lstrip(".") or not weight.endswith(
            ".weight"
        ):
            self.coupling.link(self._one(bias).full, outputs)

    def _on_matmul(self, node: fx.Node) -> _Labelled:
        a, b = (self._factor(n) for n in node.args[:2])
        return self._product(node, a, b)

    _on_bmm = _on_mm = _on_matmul

    def _on_baddbmm(self, node: fx.Node) -> _Labelled:
        a, b = (self._factor(n) for n in node.args[1:3])
        found = self._product(node, a, b)
        return self.coupling.meet([found, *self._tensors(node.args[:1])])

    _on_addmm = _on_baddbmm

    def _factor(self, node: Any) -> Value:
        """One side of a product; a parameter multiplied so is no layer, and stays as it is."""
        return Value.fixed(self._one(node).shape) if node in self.graph.names else self._one(node)

    def _product(self, node: fx.Node, a: Value, b: Value) -> Value:
        if min(len(a.shape), len(b.shape)) < 2:
            raise UnfollowedError(f"goes through {said(node)}, which is not followed")
        wide = max(len(a.shape), len(b.shape)) - 2
        batch = "abcdefgh"[:wide]
        first, second = batch[wide - len(a.shape) + 2 :], batch[wide - len(b.shape) + 2 :]
        found = self.coupling.contract([a, b], [f"{first}mk", f"{second}kn"], f"{batch}mn")
        self._count(found, a.shape[-1])
        return found

    def _count(self, found: Value, depth: int) -> None:
        """Note what a product of activations costs; its first dimension holds the batch."""
        total = 1
        for size in found.shape:
            total *= size
        self.coupling.products.append(Product(found.labels, total * depth // FEW))

    def _on_einsum(self, node: fx.Node) -> _Labelled:
        equation, tensors = node.args[:2]
        letters, _, out = str(equation).replace(" ", "").partition("->")
        if "." in letters or not out:
            raise UnfollowedError(f"goes through einsum {equation!r}, which is not followed")
        parts = [self._factor(t) for t in tensors]  # type: ignore[union-attr]
        found = self.coupling.contract(parts, letters.split(","), out)
        every = (s for p in parts for s in p.shape)
        sizes = dict(zip("".join(letters.split(",")), every, strict=True))
        depth = 1
        for letter in sizes.keys() - set(out):
            depth *= sizes[letter]
        if len(parts) > 1:
            self._count(found, depth)
        return found

    def _on_scaled_dot_product_attention(self, node: fx.Node) -> _Labelled:
        q, k, v = (self._one(n) for n in node.args[:3])
        if k.shape[:-2] != q.shape[:-2]:
            raise UnfollowedError("goes through attention with fewer keys than queries")
        scores = self._product(node, q, _swapped(k))
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        scores = self.coupling.meet([scores, *self._tensors([mask])])
        if scores.varies([-1]):
            raise UnfollowedError("goes through attention whose keys are units")
        return self._product(node, scores, v)


def _swapped(value: Value) -> Value:
    *batch, rows, columns = value.shape
    return Value(value.labels.transpose(-1, -2), (*batch, columns, rows))
