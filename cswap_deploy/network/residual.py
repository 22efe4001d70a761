"""Residual branches as units: a whole block, an attention or an MLP that can be left out.

A branch that adds to a stream of its own shape can go as a whole: what is left of the block is the
stream. It is masked where it ends, by weights of zero, and deleted for real: the block becomes an
identity, or the sub-layer that ends the branch gives nothing.

Source: whole blocks dropped rather than filters, for latency, with few images: PRACTISE
(arXiv:2202.07861).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from cswap_deploy.network.branches import Branch, branch_of
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.groups import Removable, find_groups
from cswap_deploy.network.nodes import ancestors, descendants
from cswap_deploy.network.units import Emptied, Group, Member, Reader

_aten = torch.ops.aten
_TAILS = {_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default}
"""What may follow the addition inside a block: it does nothing to what it has been through."""


class Nothing(nn.Module):
    """In the place of a branch's last layers: a zero, which is added to the stream."""

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """() zero, of the type and on the device of the input."""
        return x.new_zeros(())


def find_branches(graph: Graph) -> list[Group]:
    """Every residual branch that can go as a whole, as a group of one unit, in order.

    What was found is checked by :func:`network.deletion.exact_groups`.
    """
    modules = _Modules(graph)
    found: dict[str, Group] = {}
    for layer in graph.layers():
        if (branch := _ended_by(graph, layer)) is None:
            continue
        inside = _inside(graph, branch, modules.live)
        emptied = modules.emptied(branch, inside, layer) if inside else ()
        if emptied:
            group = _group(graph, layer, branch, emptied)
            found.setdefault(group.name, group)
    return list(found.values())


def find_structure(graph: Graph, *, branches: bool = True) -> Removable:
    """Groups and residual branches; each group with the branches that take all of it along."""
    found = find_groups(graph)
    whole = find_branches(graph) if branches else []
    outputs = {f"{layer}.weight" for layer in graph.layers() if _ended_by(graph, layer)}

    def takes(branch: Group, group: Group) -> bool:
        return all(branch.holds(reader.layer) for reader in group.consumers)

    groups = [
        replace(
            group, within=tuple(branch.name for branch in whole if takes(branch, group)),
            stream=any(m.tensor in outputs and m.dim == 0 for m in group.members),
        )
        for group in found.groups
    ]  # fmt: skip
    return replace(found, groups=(*groups, *whole))


def _ended_by(graph: Graph, layer: str) -> Branch | None:
    """The residual branch that a layer ends, if it is called once."""
    readers = graph.readers(layer)
    return branch_of(readers[0]) if len(readers) == 1 else None


def silence(module: nn.Module, group: Group) -> None:
    """Let a branch add nothing, in place: the last layer of it, and the norm behind, are zero."""
    with torch.no_grad():
        for name in group.silenced:
            layer = module.get_submodule(name)
            for parameter in layer.parameters(recurse=False):
                parameter.zero_()
            if layer._parameters.get("weight") is None and hasattr(layer, "running_mean"):
                layer.running_mean.zero_()  # type: ignore[operator]


def delete_branch(module: nn.Module, group: Group) -> None:
    """Delete a branch, in place."""
    for name, nothing in group.emptied:
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, Nothing() if nothing else nn.Identity())


def removed_branches(removed: Mapping[str, Iterable[int]], groups: Iterable[Group]) -> list[Group]:
    """The branches that are gone."""
    return [g for g in groups if g.kind == "branch" and list(removed.get(g.name, ()))]


def _group(graph: Graph, layer: str, branch: Branch, emptied: tuple[Emptied, ...]) -> Group:
    end = graph.layer(layer)
    inputs = end.in_channels if isinstance(end, nn.Conv2d) else end.in_features
    norms = [
        graph.names[node.args[3]].rpartition(".")[0]  # type: ignore[index]
        for node in branch.path[1:]
        if node.target is _aten.batch_norm.default
    ]
    gone = [
        f"{path}.{name}"
        for path, _ in emptied
        for name, _ in graph.module.get_submodule(path).named_parameters()
    ]
    return Group(
        _name(emptied, layer),
        "branch",
        root_indices=((0,),),
        consumers=(Reader(layer, (tuple(range(inputs)),)),),
        members=tuple(Member(name, -1, ((0,),)) for name in dict.fromkeys(gone)),
        emptied=emptied,
        silenced=(layer, *norms[:1]),
    )


def _name(emptied: Sequence[Emptied], layer: str) -> str:
    """The block, or the sub-layer that ends the branch; no layer, whose own units have its name."""
    last = next(path for path, nothing in emptied if nothing or len(emptied) == 1)
    return last if last != layer else f"{layer} and before"


def _inside(graph: Graph, branch: Branch, live: set[fx.Node]) -> set[fx.Node]:
    """What the branch computes from the stream alone and for the addition alone; else nothing."""
    end = branch.path[-1]
    behind = descendants(graph.nodes, [branch.stream])
    inside = (ancestors(end) & behind & set(graph.nodes)) - {branch.stream}
    if branch.path[0] not in inside:
        return set()
    allowed, there = inside | {branch.stream} | graph.sizes, set(graph.nodes)
    for node in inside - graph.sizes:
        enters = {a for a in node.all_input_nodes if a in live}
        leaves = {u for u in node.users if u in there}
        if enters - allowed or leaves - allowed - ({branch.add} if node is end else set()):
            return set()
    return inside


class _Modules:
    """Which nodes each module runs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.live = descendants(graph.nodes, [graph.input])
        """What depends on the images."""
        self.nodes: dict[str, set[fx.Node]] = defaultdict(set)
        self.again: set[str] = set()
        """Modules that are called more than once."""
        for node in graph.nodes:
            for key, path in _stack(node):
                self.nodes[path].add(node)
                if "@" in key:
                    self.again.add(path)

    def emptied(self, branch: Branch, inside: set[fx.Node], layer: str) -> tuple[Emptied, ...]:
        """The modules that become something else: a block by itself, or all of the branch's."""
        block = self._block(branch, inside)
        if block:
            return (Emptied(block, nothing=False),)
        found: dict[str, None] = {}
        for node in self.graph.nodes:
            if node in inside:
                path = next((p for _, p in _stack(node) if p and self.nodes[p] <= inside), None)
                if path is not None:
                    found[path] = None
        if any(p in self.again for p in found):
            return ()
        last = [p for p in found if p == layer or layer.startswith(f"{p}.")]
        if not last or self._shared(found):
            return ()
        return tuple(Emptied(p, nothing=p == last[0]) for p in found)

    def _block(self, branch: Branch, inside: set[fx.Node]) -> str:
        """The module that does nothing but this branch and its addition; empty if there is none."""
        path = next((path for _, path in _stack(branch.add)[::-1]), "")
        if not path or path in self.again or not inside - self.graph.sizes <= self.nodes[path]:
            return ""
        rest = (self.nodes[path] & self.live) - inside - {branch.add} - self.graph.sizes
        done = all(node.target in _TAILS for node in rest) and not self._shared([path])
        return path if done else ""

    def _shared(self, paths: Iterable[str]) -> bool:
        """Whether something else reads the modules' parameters too."""
        chosen = list(paths)
        own = {n for p in chosen for n in self.nodes[p]}
        module = self.graph.module
        mine = {id(value) for p in chosen for value in module.get_submodule(p).parameters()}
        for placeholder, name in self.graph.names.items():
            owner, _, last = name.rpartition(".")
            value = getattr(module.get_submodule(owner), last, None)
            if id(value) in mine and any(u not in own for u in placeholder.users):
                return True
        return False


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """(key, dotted path) of the modules that a node runs in, from the outermost on."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(str(key), str(path)) for key, (path, _) in stack.items()]
