"""TensorRT's Python packages as far as their names go: stand-ins made from ``binding_names.json``.

NVIDIA's libraries are absent here. What the tests run instead is a module whose classes have the
members of one version's official bindings and no others: a name that this version does not have
raises AttributeError, as does setting a property that is absent or read-only. What members do, a
test's own classes say (``behaviour``); a member without behaviour raises NotImplementedError.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

NAMES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("binding_names.json").read_text()
)
"""Package and version, for example ``tensorrt 10.3.0`` -> what it is made of."""


def packages(name: str = "") -> tuple[str, ...]:
    """The recorded packages, of one name or of all."""
    return tuple(package for package in NAMES if package.startswith(name))


def strict_module(package: str, behaviour: Mapping[str, type]) -> Any:
    """A stand-in for one version.

    Args:
        package: A key of ``NAMES``.
        behaviour: Name of a class -> a class with what its members do. Members that this version
            lacks are left out; a method must not take other numbers of arguments than the
            binding's. Its ``self._trt`` is the module.

    Returns:
        The module; ``journal`` lists every call of a method as (class, method, arguments).
    """
    told = NAMES[package]
    name, _, version = package.partition(" ")
    module: Any = ModuleType(name)
    module.__version__ = version
    module.journal = []
    made: dict[str, type] = {}
    ordered = told["ordered"].split()
    for title, members in told["enums"].items():
        made[title] = _enum(title, members, ordered=title in ordered)
    for title, members in _bases_first(told["classes"]):
        plain, _, bases = title.rstrip(")").partition("(")
        parents = tuple(made[base] for base in bases.split(", ") if base) or (_Native,)
        made[plain] = _class(module, plain, parents, members.split(), behaviour.get(plain, object))
    for title, kind in made.items():
        outer, _, inner = title.rpartition(".")
        setattr(made[outer] if outer else module, inner, kind)
    for function in told["functions"].split():
        setattr(module, function, _absent(function))
    return module


def _bases_first(classes: dict[str, str]) -> list[tuple[str, str]]:
    rows = list(classes.items())
    known: set[str] = set()
    told = []
    while rows:
        for row in rows:
            plain, _, bases = row[0].rstrip(")").partition("(")
            if known.issuperset(base for base in bases.split(", ") if base):
                known.add(plain)
                told.append(row)
        rows = [row for row in rows if row not in told]
    return told


# --- enums ---------------------------------------------------------------------------------------


class _Member:
    """A member of an enum as pybind11 makes them."""

    def __init__(self, name: str, value: int) -> None:
        self.name, self.value = name, value

    def __int__(self) -> int:
        return self.value

    __index__ = __int__

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self.name}: {self.value}>"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.value == self.value

    def __hash__(self) -> int:
        return self.value


class _Ordered(_Member):
    def __lt__(self, other: _Member) -> bool:
        return self.value < int(other)

    def __le__(self, other: _Member) -> bool:
        return self.value <= int(other)

    def __gt__(self, other: _Member) -> bool:
        return self.value > int(other)

    def __ge__(self, other: _Member) -> bool:
        return self.value >= int(other)


def _enum(title: str, members: str, *, ordered: bool) -> type:
    kind = type(title.rpartition(".")[2], (_Ordered if ordered else _Member,), {})
    values = {name: int(value) for name, _, value in (m.partition("=") for m in members.split())}
    for name, value in values.items():
        setattr(kind, name, kind(name, value))
    kind.__members__ = {name: getattr(kind, name) for name in values}  # type: ignore[attr-defined]
    return kind


# --- classes -------------------------------------------------------------------------------------


class _Meta(type):
    def __call__(cls, *args: Any, **keywords: Any) -> Any:
        made = super().__call__(*args, **keywords)
        if "_made" not in vars(made):
            raise TypeError(f"{cls.__name__}.__init__() must be called when overriding __init__")
        return made


class _Native(metaclass=_Meta):
    """Base of all: takes no other attributes than its members, unless a Python class derives."""

    _native = True

    def __init__(self) -> None:
        self._made = True

    def __setattr__(self, name: str, value: Any) -> None:
        found = inspect.getattr_static(type(self), name, None)
        if name.startswith("_") or isinstance(found, property):
            object.__setattr__(self, name, value)  # a property without a setter refuses
        elif "_native" not in vars(type(self)):
            object.__setattr__(self, name, value)
        elif found is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        else:
            raise AttributeError(f"attribute {name!r} of {type(self).__name__!r} is read-only")


def _class(
    module: Any, title: str, parents: tuple[type, ...], members: list[str], does: type
) -> type:
    space: dict[str, Any] = {"_native": True, "_trt": module, "__module__": module.__name__}
    for name, value in vars(does).items():
        if name.startswith("_") and name not in ("__dict__", "__weakref__", "__module__"):
            space[name] = value
    if "__init__" in space:
        space["__init__"] = _with_base(does.__init__)
    for member in members:
        parts = re.fullmatch(r"(\w+)(?:\((.+)\)|(=))?", member)
        assert parts is not None, member
        name, arity, writable = parts.groups()
        behaves = vars(does).get(name)
        if arity is not None:
            space[name] = _method(module, title, name, arity, behaves)
        elif name in ("ERROR", "WARNING", "INFO", "VERBOSE", "INTERNAL_ERROR", "MAX_DIMS"):
            continue  # constants, nothing reads them here
        else:
            space[name] = _property(title, name, writable is not None, behaves)
    return _Meta(title.rpartition(".")[2], parents, space)


def _with_base(own: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(own)
    def init(self: Any, *args: Any, **keywords: Any) -> None:
        self._made = True
        own(self, *args, **keywords)

    return init


def _method(module: Any, title: str, name: str, arity: str, does: Any) -> Any:
    if does is None:
        return _absent(f"{title}.{name}")
    low, _, high = arity.partition("-")
    own = list(inspect.signature(does).parameters.values())[1:]
    least = sum(p.default is inspect.Parameter.empty for p in own)
    if not int(low) <= least <= len(own) <= int(high or low):
        raise TypeError(f"{title}.{name} of the binding takes {arity} arguments, not {own}")

    @functools.wraps(does)
    def call(self: Any, *args: Any) -> Any:
        module.journal.append((title, name, args))
        return does(self, *args)

    return call


def _property(title: str, name: str, writable: bool, does: Any) -> property:
    if isinstance(does, property):
        return property(does.fget, does.fset if writable else None)

    def get(self: Any) -> Any:
        if not writable:
            raise NotImplementedError(f"the stand-in's {title}.{name} does nothing")
        return vars(self).get(f"_value_of_{name}")

    def put(self: Any, value: Any) -> None:
        object.__setattr__(self, f"_value_of_{name}", value)

    return property(get, put if writable else None)


def _absent(what: str) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise NotImplementedError(f"the stand-in's {what} does nothing")

    return call
