"""Weights from a file into a network: which of the file's, under which names, every one of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cswap_deploy.errors import UsageError
from cswap_deploy.models.checkpoint_files import read_file
from cswap_deploy.models.misfits import misfit
from cswap_deploy.settings import shown

State = dict[str, Tensor]
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net")
"""Where training scripts put the weights, the likeliest first."""
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged|polyak)([._]|$)", re.I)
_HARMLESS = (
    "num_batches_tracked", "n_averaged", "total_ops", "total_params", "position_ids", "attn_mask",
    "relative_position_index", "relative_coords_table",
)  # fmt: skip
"""What tools and other versions of a network add without computing anything else."""
_DEPTH = 3
_SHOWN = 5
_SMALL = 1 << 20
"""Bytes that a tensor may have whatever the file's size: views repeat what is stored once."""
_NUMBERS = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
     torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)  # fmt: skip
"""What stands for itself; narrower floats need scales, for which a network has no place."""


@dataclass(frozen=True, slots=True)
class Weights:
    """One set of weights of a checkpoint, under the names of the network that it is for."""

    path: Path
    key: str
    """Where it lies in the file, as ``--checkpoint-key`` takes it; empty for all of the file."""
    state: State
    prefix: str = ""
    """What was taken off the names."""
    beside: tuple[str, ...] = ()
    """Tensors of the same set that the network has no place for, by their names in the file."""
    others: tuple[str, ...] = ()
    """Keys of other sets that fit as well."""
    partial: tuple[str, ...] = ()
    """Averaged sets that lack some tensors, and how many."""

    @property
    def where(self) -> str:
        """For the record."""
        return f"{self.path} ({self.key})" if self.key else str(self.path)

    def notes(self) -> tuple[str, ...]:
        """What was chosen, and what was left out."""
        told = []
        if self.others or self.partial:
            ways = ", ".join(f"--checkpoint-key {other}" for other in self.others)
            text = f"{self.path.name} holds several sets of weights; taken was "
            text += f"{self.key or 'that at its top'}"
            text += " (averaged)" if _AVERAGED.search(self.key) else ""
            text += f"; for another: {ways}" if ways else ""
            told.append("; ".join([text, *self.partial]))
        if self.beside:
            count = f"{len(self.beside)} tensor{'s' if len(self.beside) > 1 else ''}"
            told.append(
                f"{self.path.name}: {count} left out, for which the network has no place: "
                f"{_gathered(self.beside)}"
            )
        return tuple(told)


def read_checkpoint(path: Path) -> State:
    """The tensors of a checkpoint whose network is not known yet.

    Training checkpoints are unwrapped (``state_dict``, ``model``, ...; the averaged weights
    first), and the prefixes of ``DataParallel`` and ``torch.compile`` taken off.

    Raises:
        UsageError: The file is absent, damaged, wants to run code, or holds no tensors.
    """
    found = _sets(read_file(path), path)
    state = found[min(found, key=_rank)]
    _check_readable(path, state)
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    _check_finite(path, state)
    return state


def choose_weights(path: Path, own: Mapping[str, Tensor], key: str | None = None) -> Weights:
    """The set of a checkpoint's weights that fits a network, under the network's names.

    Sets are the file's dictionaries of tensors, and within one those whose names share a prefix
    (``model.``, ``module._orig_mod.``, whatever ends with a dot). A set that has every tensor goes
    before one that does not, averaged weights before raw ones.

    Args:
        path: A file that :func:`checkpoint_files.read_file` reads.
        own: The network's state dict.
        key: Of the set, where the user names one: its path in the file, with or without prefix.

    Raises:
        UsageError: The file cannot be read, holds no tensors, or has no such set.
    """
    sets = _sets(read_file(path), path)
    for state in sets.values():
        _check_readable(path, state)
    wanted = {name for name in own if not name.endswith("num_batches_tracked")}
    found = [
        _Option(name, prefix, count, _alike(state, prefix, own))
        for name, state in sets.items()
        for prefix, count in _prefixes(state, wanted).items()
    ]
    whole = len(wanted)
    found = [o for o in found if 2 * o.count >= whole]  # fewer are alike by chance
    asked = found if key is None else [o for o in found if o.is_named(key)]
    best = min(asked, key=lambda o: (-o.count, -o.alike, _rank(o.key)), default=None)
    if best is None and key is not None:
        keys = ", ".join(o.key or "the file's top" for o in found) or "nothing that fits"
        raise UsageError(
            f"{path} holds no weights of this network under --checkpoint-key {key}; it has {keys}",
            fix="pass one of these" if any(o.key for o in found) else "leave --checkpoint-key out",
        )
    if best is None:  # names are told as they are in the file
        name = min(sets, key=_rank)
        return Weights(path, name, sets[name])
    state, prefix = sets[best.set], best.prefix
    fitting = {n: state[prefix + n] for n in own if prefix + n in state}
    taken = {prefix + n for n in fitting}
    rest = [o for o in found if o is not best and key is None]
    return Weights(
        path, best.key, fitting, prefix,
        beside=tuple(name for name in state if name not in taken),
        others=tuple(o.key for o in rest if (o.count, o.alike) == (best.count, best.alike)),
        partial=tuple(
            f"{o.key} has only {o.count} of {whole} tensors"
            for o in rest
            if _AVERAGED.search(o.key) and o.count < best.count
        ),
    )  # fmt: skip


def load_into(
    module: nn.Module, weights: Weights, *, name: str, input_size: tuple[int, int, int],
    by_flags: bool = False,
) -> None:  # fmt: skip
    """Load weights, every one of them.

    What lies beside them is left out only where the network is complete without it, and it is no
    further part of one of the network's own modules: that would be of a larger network.

    Args:
        module: The network.
        weights: For it.
        name: Of the network, for people.
        input_size: (C, H, W) that it takes.
        by_flags: Whether ``--input-size`` shapes the network.

    Raises:
        UsageError: Keys are missing, unexpected or of another shape; they are counted and named,
            and where channels, classes or the size of images are what differ, the message says so.
    """
    own, state = module.state_dict(), weights.state
    optional = {k for k in own if k.endswith("num_batches_tracked")}
    missing = [k for k in own if k not in state and k not in optional]
    unexpected = list(_unexpected(weights, own))
    if missing or not own:
        unexpected = [k for k in (*weights.beside, *state) if k not in own]
    reshaped = {
        k: (tuple(state[k].shape), tuple(own[k].shape))
        for k in own
        if k in state and state[k].shape != own[k].shape
    }
    wrong = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": [f"{k} {a}, wanted {b}" for k, (a, b) in reshaped.items()],
    }
    lines = [f"    {len(found)} {what}: {_some(found)}" for what, found in wrong.items() if found]
    if lines:
        count = len(state) + len(weights.beside)
        why = misfit(
            module, missing, unexpected, reshaped, name=name, input_size=input_size,
            by_flags=by_flags,
        )  # fmt: skip
        text = f"{weights.path} does not fit {name} ({len(own)} tensors, {count} in the file"
        text += f" under {weights.key})" if weights.key else ")"
        raise UsageError(
            "\n".join([f"{text}:", *lines, *(f"    {what}" for what in why.differs)]), fix=why.fix
        )
    _check_finite(weights.path, state)
    other = [k for k, v in own.items() if k not in optional and _other_kind(state[k], v)]
    if other:
        kinds = f"{state[other[0]].dtype} for {own[other[0]].dtype}".replace("torch.", "")
        raise UsageError(
            f"{weights.path} has other numbers than {name} computes with in {len(other)} of "
            f"{len(own)} tensors ({kinds}): {_some(other)}",
            fix="save the weights in float32, not as quantised or complex numbers",
        )
    module.load_state_dict({**{k: own[k] for k in optional}, **state}, strict=True)


def _other_kind(given: Tensor, own: Tensor) -> bool:
    """Whether a conversion would be silent and wrong."""
    narrow = given.dtype in (torch.int8, torch.uint8, torch.bool)
    return (given.is_complex() and not own.is_complex()) or (
        narrow and (own.is_floating_point() or own.is_complex())
    )


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold an infinity or a NaN."""
    return [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]


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


@dataclass(frozen=True, slots=True)
class _Option:
    """Tensors of one set whose names share a prefix."""

    set: str
    prefix: str
    count: int
    """The network's tensors that are there by name."""
    alike: int
    """Those of them that have the network's shape."""

    @property
    def key(self) -> str:
        return ".".join(filter(None, (self.set, self.prefix.rstrip("."))))

    def is_named(self, key: str) -> bool:
        dotted = f"{key.rstrip('.')}."
        return f"{self.key}.".startswith(dotted) or self.prefix.startswith(dotted)


def _sets(loaded: Any, path: Path) -> dict[str, State]:
    """Every dictionary of tensors in a checkpoint, by its path in it."""
    found = dict(_walk(loaded, (), frozenset()))
    if not found:
        what = type(loaded).__name__
        if isinstance(loaded, Mapping) and loaded:
            what += f" with {', '.join(shown(key) for key in list(loaded)[:_SHOWN])}"
        raise UsageError(f"{path} holds no weights: a {what}", fix="save model.state_dict()")
    return found


def _walk(
    loaded: Any, place: tuple[str, ...], around: frozenset[int]
) -> Iterator[tuple[str, State]]:
    """The sets in a dictionary that lies in those ``around`` it, itself not among them."""
    deep = len(place) > _DEPTH or id(loaded) in around
    if not isinstance(loaded, Mapping) or deep or any("optim" in key.lower() for key in place):
        return
    state = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    if state and len(state) * 2 >= len(loaded):
        yield ".".join(place), state
    for key, inner in loaded.items():
        if isinstance(key, str):
            yield from _walk(inner, (*place, key), around | {id(loaded)})


def _rank(key: str) -> tuple[int, list[int]]:
    """Averaged weights first, then by where training scripts put weights."""
    known = {name: place for place, name in enumerate(_WRAPPERS)}
    places = [known.get(part, len(known)) for part in key.split(".")]
    return (0 if _AVERAGED.search(key) else 1), places


def _prefixes(state: State, wanted: Collection[str]) -> Counter[str]:
    """Prefix -> how many of the network's names are there behind it."""
    found: Counter[str] = Counter()
    for name in state:
        at = 0
        while at >= 0:
            if name[at:] in wanted:
                found[name[:at]] += 1
            at = name.find(".", at) + 1 or -1
    return found


def _alike(state: State, prefix: str, own: Mapping[str, Tensor]) -> int:
    there = ((state.get(prefix + name), tensor) for name, tensor in own.items())
    return sum(found is not None and found.shape == tensor.shape for found, tensor in there)


def _unexpected(weights: Weights, own: Mapping[str, Tensor]) -> Iterator[str]:
    """What lies beside the weights and would be a part of a larger network of the same kind."""
    names, prefix = set(own), weights.prefix
    while len(shared := {_first(name) for name in names}) == 1 and all("." in n for n in names):
        prefix += f"{next(iter(shared))}."
        names = {name.partition(".")[2] for name in names}
    numbered = any(first.isdigit() for first in shared)
    for name in weights.beside:
        first = _first(name.removeprefix(prefix))
        inside = first in shared or (numbered and first.isdigit())
        if name.startswith(prefix) and inside and not name.endswith(_HARMLESS):
            yield name


def _check_readable(path: Path, state: State) -> None:
    """Refuse tensors that are no plain numbers in memory, and those that the file cannot hold."""
    most = path.stat().st_size + _SMALL
    for name, tensor in state.items():
        nested = tensor.is_nested  # has no shape
        what = ""
        if nested or tensor.layout != torch.strided or tensor.is_quantized:
            what = "nested" if nested else "quantised" if tensor.is_quantized else "sparse"
        elif tensor.device.type != "cpu":
            what = f"without values (on the device {tensor.device})"
        elif tensor.dtype not in _NUMBERS:
            what = f"of type {tensor.dtype}".replace("torch.", "")
        elif tensor.numel() * tensor.element_size() > most:
            what = f"of shape {tuple(tensor.shape)}, more than the file holds"
        if what:
            raise UsageError(
                f"{path}: the tensor {shown(name)} is {what}",
                fix="save the state_dict of the network in float32, on the CPU",
            )


def _check_finite(path: Path, state: State) -> None:
    if broken := not_finite(state):
        raise UsageError(
            f"{path} has values that are not finite in {len(broken)} of {len(state)} tensors: "
            f"{_some(broken)}"
        )


def _first(name: str) -> str:
    return name.partition(".")[0]


def _gathered(names: tuple[str, ...]) -> str:
    """All names; where there are many, by their first part."""
    if len(names) <= 2 * _SHOWN:
        return ", ".join(names)
    counts = Counter(f"{_first(name)}.*" if "." in name else name for name in names)
    return ", ".join(f"{name} ({n})" if n > 1 else name for name, n in counts.items())


def _some(items: list[str]) -> str:
    shown = ", ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown}, ..."
