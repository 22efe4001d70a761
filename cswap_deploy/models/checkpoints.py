"""Reading weights from a file without running anything that is in it."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cswap_deploy.errors import UsageError

_WRAPPERS = (
    "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model_state", "model", "net",
)  # fmt: skip
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 5
_DAMAGED = (
    RuntimeError, OSError, EOFError, KeyError, ValueError, AttributeError, TypeError, IndexError,
)  # fmt: skip
"""What ``torch.load`` raises on files that are no checkpoints."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read tensors from a safetensors file or from one that ``torch.save`` wrote.

    Pickles are read with ``weights_only=True``: one that names any code is refused and nothing of
    it runs. Training checkpoints are unwrapped (``state_dict``, ``model``, ...; the averaged
    weights first), and the prefixes of ``DataParallel`` and ``torch.compile`` taken off.

    Raises:
        UsageError: The file is absent, damaged, wants to run code, or holds no tensors.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"the checkpoint {path} {what}")
    loaded = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    state = _unwrap(loaded)
    if not state:
        what = type(loaded).__name__
        if isinstance(loaded, Mapping) and loaded:
            what += f" with {', '.join(map(str, list(loaded)[:_SHOWN]))}"
        raise UsageError(f"{path} holds no weights: a {what}", fix="save model.state_dict()")
    if broken := not_finite(state):
        raise UsageError(
            f"{path} has values that are not finite in {len(broken)} of {len(state)} tensors: "
            f"{_some(broken)}"
        )
    return state


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold an infinity or a NaN."""
    return [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, path: Path, name: str) -> None:
    """Load weights, every one of them.

    Raises:
        UsageError: Keys are missing, unexpected or of another shape; they are counted and named.
    """
    own = module.state_dict()
    optional = {k for k in own if k.endswith("num_batches_tracked")}
    wrong = {
        "missing": [k for k in own if k not in state and k not in optional],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k} {tuple(state[k].shape)}, wanted {tuple(own[k].shape)}"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ],
    }
    lines = [f"    {len(found)} {what}: {_some(found)}" for what, found in wrong.items() if found]
    if lines:
        raise UsageError(
            f"{path} does not fit {name} ({len(own)} tensors, {len(state)} in the file):\n"
            + "\n".join(lines),
            fix="pass the MODEL that the checkpoint was trained as",
        )
    module.load_state_dict({**{k: own[k] for k in optional}, **state}, strict=True)


def load_in_order(module: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Load weights whose names differ but whose order is the module's; every shape is checked.

    Raises:
        UsageError: Another number of tensors, or a shape that differs.
    """
    own = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if len(own) != len(given):
        raise UsageError(f"{where} has {len(given)} tensors, the model {len(own)}")
    for (theirs, tensor), (ours, mine) in zip(given.items(), own.items(), strict=True):
        same_role = theirs.rpartition(".")[2] == ours.rpartition(".")[2]
        if tensor.shape != mine.shape or not same_role:
            raise UsageError(
                f"{where}: {theirs} {tuple(tensor.shape)} is not {ours} {tuple(mine.shape)}"
            )
    renamed = dict(zip(own, given.values(), strict=True))
    module.load_state_dict({**module.state_dict(), **renamed}, strict=True)


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of length, then a JSON object."""
    with path.open("rb") as f:
        head = f.read(9)
    return path.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as err:
        raise UsageError(f"{path} is not a whole safetensors file: {err}") from err


def _read_pickle(path: Path) -> Any:
    try:
        # timm's training checkpoints hold their arguments in a Namespace, which is plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about TorchScript, which is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGED) as err:
        script = "TorchScript" in str(err) or "torch.jit" in str(err)
        if script or isinstance(err, pickle.UnpicklingError):
            raise _refused(path, err) from err
        words = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise UsageError(
            f"{path} is neither a safetensors file nor one that torch {torch.__version__} saved: "
            f"{words}"
        ) from err


def _refused(path: Path, err: Exception) -> UsageError:
    wanted = re.search(
        r"(Unsupported (?:global|class|operand|op)[^\n]*?|Trying to [^\n]*?|Can only [^\n]*?|"
        r"Cannot use[^\n]*?TorchScript[^\n]*?)(?: was not an allowed|\.\s|\.?\n|$)",
        str(err),
    )
    reason = wanted.group(1).strip() if wanted else " ".join(str(err).split())[:300]
    return UsageError(
        f"{path} is a pickle that holds more than tensors; nothing of it was run. "
        f"torch {torch.__version__} (weights_only=True): {reason}",
        fix="where you trust it, save its state_dict with safetensors.torch.save_file and pass "
        "that file",
    )


def _unwrap(loaded: Any) -> dict[str, Tensor]:
    """The state dict in a checkpoint; empty when there is none."""
    if not isinstance(loaded, Mapping):
        return {}
    for key in _WRAPPERS:
        inner = loaded.get(key)
        if isinstance(inner, Mapping) and (state := _unwrap(inner)):
            return state
    state = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    if len(state) * 2 < len(loaded):
        return {}
    for prefix in _PREFIXES:
        if state and all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown}, ..."
