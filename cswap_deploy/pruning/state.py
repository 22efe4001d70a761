"""Where the loop stands after a round, and the store of finished rounds.

With the weights that is enough to go on after an interruption, which thus costs one round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError
from torch import nn

from cswap_deploy.network.deletion import contiguous_state
from cswap_deploy.network.units import Group
from cswap_deploy.records.plan import RoundLog, UnitEffect
from cswap_deploy.records.store import Store, stage_key


@dataclass(slots=True)
class State:
    """What rounds have removed, measured and refitted so far."""

    round: int = 0
    removed: dict[str, list[int]] = field(default_factory=dict)
    """Group -> units, in the order in which they went."""
    effects: dict[str, dict[int, UnitEffect]] = field(default_factory=dict)
    """Group -> unit -> its latest effect."""
    rounds: list[RoundLog] = field(default_factory=list)
    refitted: tuple[str, ...] = ()
    not_refitted: tuple[str, ...] = ()
    producers: tuple[str, ...] = ()
    """Layers whose units were reconstructed."""
    starved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Layers whose last refit had fewer rows than unknowns: both."""

    def costs(self, group: Group, effect: Literal["kl", "true-class"]) -> np.ndarray:
        """(units,) the latest effects that rank; zero where nothing was measured yet."""
        latest = self.effects.get(group.name)
        if latest is None:
            return np.zeros(group.units)
        kl = effect == "kl"
        return np.array([latest[u].kl if kl else latest[u].harm for u in range(group.units)])


_STATE = TypeAdapter(State)


class RoundStore:
    """The rounds of one pruning, or of several that begin alike, by the ratios that they end at."""

    def __init__(self, store: Store, prune_key: str, *, resume: bool = True) -> None:
        """Without ``resume`` rounds are only kept: what an interrupted run left is not found."""
        self._store, self._prune_key, self._resume = store, prune_key, resume
        self._path: Sequence[float] = ()

    def load(self, module: nn.Module, path: Sequence[float]) -> State | None:
        """The latest finished round on a path; puts its weights into ``module``.

        Args:
            module: The network to mask, as it was before the first round.
            path: The ratio that each round ends at.
        """
        from safetensors.torch import load_file

        self._path = path
        for round_ in range(len(path) if self._resume else 0, 0, -1):
            folder = self._store.find(self._key(path[:round_]))
            if folder is None:
                continue
            try:
                state = _STATE.validate_json((folder / "state.json").read_bytes())
            except ValidationError:
                continue  # by another version of this file: measure again
            module.load_state_dict(load_file(folder / "masked.safetensors"), strict=True)
            return state
        return None

    def forget(self, *, last: bool = True) -> None:
        """Drop the rounds of the path: the stage is finished. Without ``last`` that one stays."""
        for done in range(1, len(self._path) + last):
            self._store.remove(self._key(self._path[:done]))

    def save(self, state: State, module: nn.Module, path: Sequence[float]) -> None:
        """Keep a finished round; ``path`` as in :meth:`load`."""
        from safetensors.torch import save_file

        self._path = path
        with self._store.create(self._key(path[: state.round]), stage="round") as folder:
            (folder / "state.json").write_bytes(_STATE.dump_json(state))
            save_file(contiguous_state(module), folder / "masked.safetensors")

    def _key(self, path: Sequence[float]) -> str:
        return stage_key(
            "round", version=10, inputs={"prune": self._prune_key}, settings={"path": list(path)},
            tools={},
        )  # fmt: skip
