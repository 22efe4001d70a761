"""Node names that say which PyTorch module a node came from: ``layer1.0.conv1/Conv``."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(graph: Any, *, modules: Mapping[str, str]) -> None:
    """Name every node ``MODULE/OPERATOR`` after the PyTorch module it came from.

    A weight's name (``layer1.0.conv1.weight``) says most, as it outlives what is folded into it. A
    node that a graph pass made is in no module's record: its module is that of what reads it. The
    second, third ... node of the same name gets ``_1``, ``_2`` ...

    Args:
        graph: ``onnx.GraphProto``, in topological order; changed in place.
        modules: Name of a tensor -> path of the module that made it; ``""`` is the network itself.
    """
    owners = {
        tensor.name: owner
        for tensor in graph.initializer
        for owner, _, kind in [tensor.name.rpartition(".")]
        if kind in ("weight", "bias")
    }
    readers: dict[str, str] = {}
    names: list[str] = []
    for node in reversed(graph.node):
        said = [owners[name] for name in node.input if name in owners]
        said += [modules[name] for name in node.output if name in modules]
        said += [readers[name] for name in node.output if name in readers]
        module = said[0] if said else ""
        for name in node.input:
            readers.setdefault(name, module)
        names.append(f"{module}/{node.op_type}" if module else node.op_type)
    taken: Counter[str] = Counter()
    for node, name in zip(graph.node, reversed(names), strict=True):
        node.name = f"{name}_{taken[name]}" if taken[name] else name
        taken[name] += 1


def module_of(node_name: str) -> str:
    """The PyTorch module in a node's name; empty for the network itself."""
    return node_name.rpartition("/")[0]


def is_meant(node_name: str, by: str) -> bool:
    """Whether a user's word means a node.

    Args:
        node_name: ``blocks.0.attn.qkv/MatMul``.
        by: A module, which means all that is in it (``blocks.0.attn``), or a pattern of nodes
            (``*/Softmax``).
    """
    return fnmatchcase(node_name, by) or node_name.startswith((f"{by}/", f"{by}."))


def exported_modules(graph: Any) -> dict[str, str]:
    """Name of a tensor -> path of the module that made it, as torch's exporter stored it.

    Args:
        graph: ``onnx.GraphProto`` as ``torch.onnx.export`` makes it, metadata and all.
    """
    found: dict[str, str] = {}
    for node in graph.node:
        # A list as text: the modules from the outside in, and last the operator.
        stored = next((p.value for p in node.metadata_props if p.key == _SCOPES), None)
        scopes = [] if stored is None else ast.literal_eval(stored)
        # Nodes of shape arithmetic carry a placeholder instead of the network's own scope.
        if len(scopes) > 1 and scopes[0] == "":
            found |= dict.fromkeys(node.output, scopes[-2])
    return found
