"""Rounds of a pruning that is not finished yet, kept so that an interruption costs one round."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError
from torch import nn

from cswap_deploy.pruning.state import State
from cswap_deploy.records.store import Store, stage_key

_STATE = TypeAdapter(State)


class RoundStore:
    """The rounds of one pruning, by the key of its stage."""

    def __init__(self, store: Store, prune_key: str) -> None:
        self._store, self._prune_key = store, prune_key

    def load(self, module: nn.Module, *, most: int) -> State | None:
        """The latest finished round; puts its weights into ``module``.

        Args:
            module: The network to mask, as it was before the first round.
            most: How many rounds there can be.

        Returns:
            The state after that round, or ``None`` when there is none.
        """
        from safetensors.torch import load_file

        for round_ in range(most, 0, -1):
            folder = self._store.find(self._key(round_))
            if folder is None:
                continue
            try:
                state = _STATE.validate_json((folder / "state.json").read_bytes())
            except ValidationError:
                continue  # by another version of this file: measure again
            module.load_state_dict(load_file(folder / "masked.safetensors"), strict=True)
            return state
        return None

    def forget(self, most: int) -> None:
        """Drop all rounds: the stage is finished."""
        for round_ in range(1, most + 1):
            self._store.remove(self._key(round_))

    def save(self, state: State, module: nn.Module) -> None:
        """Keep a finished round."""
        from safetensors.torch import save_file

        with self._store.create(self._key(state.round)) as folder:
            (folder / "state.json").write_bytes(_STATE.dump_json(state))
            tensors = {k: v.detach().contiguous() for k, v in module.state_dict().items()}
            save_file(tensors, folder / "masked.safetensors")

    def _key(self, round_: int) -> str:
        return stage_key(
            "round", version=3, inputs={"prune": self._prune_key}, settings={"round": round_},
            tools={},
        )  # fmt: skip
