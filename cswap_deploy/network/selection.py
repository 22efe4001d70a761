"""Which groups the user lets units leave: ``--exclude`` and ``--include``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from cswap_deploy.errors import UsageError
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.units import TRANSPOSED, Group


@dataclass(frozen=True, slots=True)
class Selection:
    """The groups that may lose units, and what the patterns matched."""

    groups: tuple[Group, ...]
    excluded: dict[str, str]
    """Group -> the pattern that keeps it whole."""
    notes: tuple[str, ...]


def select(
    graph: Graph, groups: Sequence[Group], *, exclude: Sequence[str], include: Sequence[str]
) -> Selection:
    """Leave whole what the user's patterns say.

    A pattern is matched against the names of layers (``layer4.*``), where ``*`` goes over dots
    too. A group is matched where a layer that produces some of its units is.

    Raises:
        UsageError: A pattern matches no layer of the network.
    """
    layers = [name for name, _ in graph.module.named_modules() if name]
    makers = {group.name: producers(graph, group) for group in groups}
    notes: list[str] = []
    excluded: dict[str, str] = {}
    allowed: set[str] = set()
    for flag, patterns in (("--exclude", exclude), ("--include", include)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                close = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3)
                raise UsageError(
                    f"{flag} {pattern!r} matches no layer of {type(graph.module).__name__}",
                    fix=f"for example {', '.join(map(repr, close or layers[:3]))}; "
                    "`cswap-deploy inspect --groups MODEL` lists them",
                )
            hit = [n for n, of in makers.items() if any(fnmatchcase(p, pattern) for p in of)]
            notes.append(f"{flag} {pattern!r} matched {_counted(hit)}")
            if flag == "--include":
                allowed |= {*hit}
            else:
                excluded |= dict.fromkeys(hit, f"{flag} {pattern!r}")
    if include:
        left = [g.name for g in groups if g.name not in allowed]
        excluded = dict.fromkeys(left, "not in --include") | excluded
    chosen = tuple(g for g in groups if g.name not in excluded)
    return Selection(chosen, excluded, tuple(notes))


def producers(graph: Graph, group: Group) -> list[str]:
    """The layers (or bare parameters) that produce a group's units, the root first."""
    found = [group.name]
    for member in group.members:
        owner, _, last = member.tensor.rpartition(".")
        layer = graph.module.get_submodule(owner)
        if last == "weight" and getattr(layer, "weight", None) is not None:
            outputs = int(isinstance(layer, TRANSPOSED))
            if layer.weight.ndim > 1 and member.dim == outputs:  # type: ignore[operator]
                found.append(owner)
    return list(dict.fromkeys(found))


def _counted(names: Sequence[str]) -> str:
    if not names:
        return "no group"
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{len(names)} group{'s' if len(names) > 1 else ''}: {shown}"
