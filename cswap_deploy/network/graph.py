"""The network as a graph that can be cut at a layer: run up to the cut once, then what follows.

The graph is ``torch.export``'s, the one that the ONNX export uses too. It is executed node by node
on the live parameters of the module, so weights that are masked or refitted take effect at the next
run with no new export.

Source: PyTorch documentation, "torch.export", "torch.fx".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from cswap_deploy.errors import ExportError, first_line
from cswap_deploy.models.outputs import OUTPUT, tensors_alone
from cswap_deploy.network.branches import streams_first
from cswap_deploy.network.nodes import (
    CONSUMING,
    ancestors,
    batch_dim,
    bytes_of,
    descendants,
    elements,
    memory_format_of,
    size_at,
)
from cswap_deploy.network.outputs import Output, measured_outputs
from cswap_deploy.network.placing import device_of, moved
from cswap_deploy.network.units import Consumer
from cswap_deploy.progress import captured

Env = dict[fx.Node, Any]

_MANY_ROWS = 256
"""Rows from which a convolution is worth its set-up."""

_RECURRENT = {
    torch.ops.aten.lstm.input,
    torch.ops.aten.gru.input,
    torch.ops.aten.rnn_tanh.input,
    torch.ops.aten.rnn_relu.input,
}

_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Suffix:
    """What must run again when some layers' outputs change."""

    nodes: tuple[fx.Node, ...]
    """In order of execution, the changed layers included."""
    cached: tuple[fx.Node, ...]
    """Values from before the cut that these nodes read."""


class Graph:
    """An exported network, executable in parts on a module's live parameters; see :func:`trace`."""

    def __init__(
        self, program: ExportedProgram, module: nn.Module, names: Sequence[str] = (OUTPUT,)
    ) -> None:
        self.module = module
        self.program = program
        """What was exported; other modules of the architecture can be bound to it."""
        self.output_names = tuple(names)
        """Of the tensors that the network returns, in order."""
        self.outputs: tuple[fx.Node, ...] = ()
        """What it returns."""
        self.measured: tuple[Output, ...] = ()
        """Its floating-point outputs with one row an image: what effects are measured on."""
        self.nodes: list[fx.Node] = []
        """Operations, in the order in which they run."""
        self.bound: dict[fx.Node, Callable[[], Any]] = {}
        """Placeholder -> reads the parameter, buffer or constant."""
        self.names: dict[fx.Node, str] = {}
        """Placeholder -> dotted name of the parameter or buffer."""
        self.targets: dict[fx.Node, Callable[..., Any]] = {}
        """Operation -> what computes it."""
        self._bind_inputs(program)
        for node in program.graph.nodes:
            if node.op == "output":
                specs = zip(node.args[0], program.graph_signature.output_specs, strict=True)
                returned = [n for n, spec in specs if spec.kind is OutputKind.USER_OUTPUT]
                self.outputs = tuple(n for n in returned if isinstance(n, fx.Node))
                self.measured = measured_outputs(returned, names, self.input, module)
            # Assertions about a value, which nothing reads, would not hold in another precision.
            elif node.op == "call_function" and (node.users or _in_place(node.target)):
                self.nodes.append(node)
                self.targets[node] = _functional(node.target)
        self.nodes = streams_first(self.nodes)
        self.sizes = {n for n in self.nodes if isinstance(n.meta.get("val"), torch.SymInt)}
        """Operations on sizes that depend on the batch."""
        self._sizes_at: dict[tuple[fx.Node, int], int] = {}
        self._kept = frozenset(output.node for output in self.measured)
        self._last_use = _last_uses(self.nodes)
        self._readers = self._find_readers()
        self.code = program.graph_module.code
        """The graph as text; part of what identifies a model."""

    def on(self, module: nn.Module) -> Graph:
        """The same graph on another module of the same architecture; no new export."""
        return Graph(self.program, module, self.output_names)

    def to(self, device: torch.device) -> Graph:
        """A copy of the network on another device."""
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(copy.deepcopy(self.program), device)
        return Graph(program, moved(self.module, device), self.output_names)

    def readers(self, layer: str) -> Sequence[fx.Node]:
        """The convolution or linear nodes that read a layer's weight itself."""
        return self._readers.get(layer, ())

    def layers(self) -> list[str]:
        """All convolutions and linear layers with a weight of their own, in order of execution."""
        return list(self._readers)

    def layer(self, name: str) -> Consumer:
        """A convolution or linear layer."""
        return cast(Consumer, self.module.get_submodule(name))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return device_of(self.module)

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Node -> its place in :attr:`nodes`."""
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def alive(self) -> list[int]:
        """Bytes of the values of one image that are alive before each node runs."""
        found, alive = [], bytes_of(self.input)
        values = {self.input, *self.nodes} - self._kept
        for node in self.nodes:
            found.append(alive)
            dead = [source for source in self._last_use.get(node, ()) if source in values]
            alive += bytes_of(node) - sum(map(bytes_of, dead))
        return found

    def owner(self, node: fx.Node) -> nn.Module:
        """The module whose parameter or buffer a placeholder is."""
        return self.module.get_submodule(self.names[node].rpartition(".")[0])

    def suffix(self, changed: Iterable[fx.Node], *, given: bool = False) -> Suffix:
        """Everything that depends on some nodes' outputs, those nodes first.

        Args:
            changed: The nodes.
            given: Their new values are given; what they read is not needed then.
        """
        first = set(changed)
        dirty = descendants(self.nodes, first)
        useful = set().union(*map(ancestors, self._kept))
        nodes = tuple(n for n in self.nodes if n in dirty and n in useful)
        inputs = self._kept | {
            a for n in nodes if not (given and n in first) for a in n.all_input_nodes
        }
        cached = tuple(
            n for n in self.nodes if n in inputs and n not in dirty and n not in self.sizes
        )
        if self.input in inputs:
            cached = (self.input, *cached)
        return Suffix(nodes, cached)

    def macs(self, nodes: Iterable[fx.Node]) -> int:
        """Multiply-accumulates of some nodes' convolutions and linear layers, for one image."""
        return sum(
            elements(node) * node.args[1].meta["val"][0].numel()  # type: ignore[union-attr]
            for node in nodes
            if node.target in CONSUMING
        )

    def run(self, images: Tensor, *, keep: Collection[fx.Node] = ()) -> tuple[Tensor, Env]:
        """Outputs of images (N, C, H, W) (see :meth:`rows`), and the values of ``keep``."""
        *_, (_, env) = self.step(images, keep=keep)  # one environment, from the first to the last
        return self.rows(env), {node: env[node] for node in keep if node in env}

    def rows(self, env: Env) -> Tensor:
        """All :attr:`measured` outputs as one row an image, one after the other: (N, elements).

        Logits (N, classes) are that already.
        """
        values = [self.value(output.node, env) for output in self.measured]
        parts = [v if v.ndim == 2 else v.reshape(len(v), -1) for v in values]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def first_not_finite(self, images: Tensor) -> tuple[str, str]:
        """The first layer whose output is not finite, and what it holds; ``the output`` if none."""
        with torch.inference_mode():
            for node, env in self.step(images):
                value = self.execute(node, env)
                if isinstance(value, Tensor) and not torch.isfinite(value).all():
                    stack = node.meta.get("nn_module_stack") or {}
                    path = [str(module[0]) for module in stack.values()]
                    what = "NaN" if torch.isnan(value).any() else "infinity"
                    return (path[-1] if path and path[-1] else node.name), what
        return "the output", "finite when run again"

    def step(
        self, images: Tensor, *, keep: Collection[fx.Node] = ()
    ) -> Iterator[tuple[fx.Node, Env]]:
        """Execute node by node; yields before each node, which then runs on what it finds.

        The values of ``keep`` stay in the environment after their last use.
        """
        yield from self.resume({self.input: images}, 0, len(images), keep=keep)

    def resume(
        self, env: Env, first: int, images: int, *, keep: Collection[fx.Node] = ()
    ) -> Iterator[tuple[fx.Node, Env]]:
        """As :meth:`step`, from the node at position ``first`` on, whose values ``env`` has.

        ``env`` is changed. A node whose value is put there meanwhile is not executed.
        """
        for node in self.nodes[first:]:
            yield node, env
            if node not in env:
                env[node] = self.execute(node, env, batch=images)
            for dead in self._last_use.get(node, ()):
                if dead not in keep and dead not in self._kept:
                    env.pop(dead, None)

    def run_suffix(
        self,
        suffix: Suffix,
        cached: Env,
        *,
        images: int,
        variants: int,
        replace: Mapping[fx.Node, Callable[[fx.Node, Env], Tensor]],
    ) -> Tensor:
        """Execute what follows a cut, for several variants of the network in one batch.

        Args:
            suffix: Of the replaced nodes.
            cached: Values of ``suffix.cached``.
            images: N, how many images they were computed for.
            variants: V; row ``v * N + n`` is image n under variant v.
            replace: How to compute a changed node; it sees the values of the V * N batch.

        Returns:
            Outputs (V * N, elements); see :meth:`rows`.
        """
        env: Env = {
            node: value if (dim := batch_dim(node)) is None else _Repeated(value, variants, dim)
            for node, value in cached.items()
        }
        last = _last_uses(suffix.nodes)
        for node in suffix.nodes:
            if node in replace:
                env[node] = replace[node](node, env)
            else:
                env[node] = self.execute(node, env, batch=variants * images)
            for dead in last.get(node, ()):
                if dead not in self._kept:
                    env.pop(dead, None)
        return self.rows(env)

    def execute(self, node: fx.Node, env: Env, *, batch: int | None = None) -> Any:
        """One node, on values from ``env`` and on live parameters."""

        def read(n: fx.Node) -> Any:
            return self._size(n, env, batch) if n in self.sizes else self.argument(n, env, node)

        if node in self.sizes:
            return self._size(node, env, batch)
        args = fx.node.map_arg(node.args, read)
        kwargs = fx.node.map_arg(node.kwargs, read)
        return self.targets[node](*args, **kwargs)

    def argument(self, source: fx.Node, env: Env, reader: fx.Node) -> Any:
        """A value as one of the nodes that read it gets it."""
        return self.value(source, env)

    def value(self, node: fx.Node, env: Env) -> Any:
        """A node's value: a live parameter, or what was computed."""
        if node in self.bound:
            return self.bound[node]()
        found = env[node]
        if isinstance(found, _Repeated):
            found = env[node] = found.tensor()
        return found

    def _size(self, node: fx.Node, env: Env, batch: int | None) -> Any:
        """A scalar that depends on the batch only."""
        if batch is not None:
            if (node, batch) not in self._sizes_at:
                self._sizes_at[node, batch] = size_at(node.meta["val"], batch)
            return self._sizes_at[node, batch]
        if node.target is torch.ops.aten.sym_size.int:
            source, dim = node.args
            assert isinstance(source, fx.Node)
            return env[node] if node in env else env[source].shape[dim]
        args = fx.node.map_arg(node.args, lambda n: self._size(n, env, batch))
        assert callable(node.target)
        return node.target(*args)

    def _bind_inputs(self, program: ExportedProgram) -> None:
        """Connect placeholders to the module's live tensors, and the one user input."""
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            target = str(spec.target)
            if spec.kind in {InputKind.PARAMETER, InputKind.BUFFER}:
                self.names[node] = target
            if spec.kind is InputKind.USER_INPUT:
                self.input = node
            elif target in program.constants:  # buffers that are not persistent, too
                self.bound[node] = partial(program.constants.__getitem__, target)
            else:
                owner, _, name = target.rpartition(".")
                self.bound[node] = partial(getattr, self.module.get_submodule(owner), name)

    def reader_of(self, node: fx.Node) -> str | None:
        """The layer whose weight a convolution or linear node reads itself, if there is one."""
        weight = node.args[1] if node.target in CONSUMING else None
        name = self.names.get(weight, "") if isinstance(weight, fx.Node) else ""
        layer, _, last = name.rpartition(".")
        own = last == "weight" and isinstance(self.module.get_submodule(layer), Consumer)
        return layer if own else None

    def _find_readers(self) -> dict[str, list[fx.Node]]:
        readers: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if (layer := self.reader_of(node)) is not None:
                readers.setdefault(layer, []).append(node)
        return readers


def trace(module: nn.Module, example: Tensor) -> Graph:
    """Export a module with a dynamic batch and make it executable in parts.

    Args:
        module: In eval mode; its parameters stay shared with the graph.
        example: (N, C, H, W) with N >= 2.

    Raises:
        ExportError: ``torch.export`` cannot trace the module; the message has its words.
    """
    try:
        with torch.no_grad(), captured(), _plain_attention(), tensors_alone(module) as names:
            program = torch.export.export(
                module, (example.contiguous(),), dynamic_shapes=({0: Dim("batch")},), strict=False
            )
            # Regions without gradients or of another precision are graphs of their own until then.
            if _mutates_shared_values(program.graph) or _has_inner_graphs(program.graph):
                program = program.run_decompositions({})
    except Exception as err:
        words = str(err).strip().splitlines()
        raise ExportError(
            f"torch.export {torch.__version__} cannot trace {type(module).__name__} with a "
            f"dynamic batch: {first_line(err)}",
            fix="keep Python control flow on tensor values, and batch arithmetic, out of forward",
            log=tuple(words),
        ) from err
    if _has_inner_graphs(program.graph):
        raise ExportError(
            f"{type(module).__name__} uses control-flow operators, which cannot be cut",
            fix="replace torch.cond and the like by plain tensor code",
        )
    return Graph(program, module, names)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused encoder layer, in which nothing can be followed."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Repeated:
    """A cached value that is repeated for every variant only when something reads it."""

    __slots__ = ("dim", "value", "variants")

    def __init__(self, value: Tensor, variants: int, dim: int) -> None:
        self.value, self.variants, self.dim = value, variants, dim

    def tensor(self) -> Tensor:
        times = [self.variants if d == self.dim else 1 for d in range(self.value.ndim)]
        out = self.value.repeat(times)
        return out.contiguous(memory_format=memory_format_of(self.value))


def _has_inner_graphs(graph: fx.Graph) -> bool:
    return any(n.op == "get_attr" for n in graph.nodes)


def _in_place(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _mutates_shared_values(graph: fx.Graph) -> bool:
    """Whether an in-place operation changes a value that something else reads too."""
    return any(
        _in_place(n.target)
        and (not str(n.target).split(".")[1].endswith("_") or len(n.args[0].users) > 1)
        for n in graph.nodes
        if n.op == "call_function"
    )


def _functional(target: Any) -> Callable[..., Any]:
    """What computes a node; out of place, since cached values must survive a suffix run."""
    if target is torch.ops.aten.linear.default:
        return _linear
    if target is torch.ops.aten.view.default:
        return torch.ops.aten.reshape.default  # values may be laid out otherwise than when traced
    if target in _RECURRENT:
        return partial(_recurrent, target)
    if _in_place(target):
        _, name, overload = str(target).split(".")
        target = getattr(getattr(torch.ops.aten, name.removesuffix("_")), overload)
    return cast(Callable[..., Any], target)


def _recurrent(target: Any, x: Tensor, state: Any, weights: Any, *args: Any) -> Any:
    """A recurrent layer; one whose state is of another batch would write where it must not."""
    batch_first = bool(args[-1])
    for part in state if isinstance(state, list | tuple) else [state]:
        if x.ndim == 3 and part.shape[1] != x.shape[0 if batch_first else 1]:
            raise RuntimeError(
                f"the state of a recurrent layer is of {part.shape[1]} images, its input of "
                f"{x.shape[0 if batch_first else 1]}"
            )
    return target(x, state, weights, *args)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer; in float32 on a CPU as the 1x1 convolution that it is.

    PyTorch multiplies matrices with MKL, which on AMD's CPUs reaches less than half of what its
    convolutions reach with oneDNN (benchmarks/LOG.md).
    """
    inputs = x.shape[-1]
    rows = x.numel() // max(inputs, 1)
    whole = x.device.type == "cpu" and x.dtype is torch.float32
    if not (whole and _ONEDNN and rows >= _MANY_ROWS):
        return torch.nn.functional.linear(x, weight, bias)
    as_map = x.reshape(1, rows, 1, inputs).permute(0, 3, 1, 2)
    out = torch.nn.functional.conv2d(as_map, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _last_uses(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    last = {source: node for node in nodes for source in node.all_input_nodes}
    dead: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        dead.setdefault(node, []).append(source)
    return dead
