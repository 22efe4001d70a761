"""Flags of the command, made from the fields of :mod:`cswap_deploy.config`."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from cswap_deploy.config import sections
from cswap_deploy.settings import Section, flag_of

COMMON = "Options"
"""Panel of the flags that most people use, and of a command's own."""


def with_settings(
    command: Callable[..., None],
    wanted: Iterable[str],
    *,
    argument: str | None = None,
    but: Collection[str] = (),
) -> Callable[..., None]:
    """Give a command the flags of some sections beside its own parameters.

    Args:
        command: Takes the settings as ``**settings``; a setting that was not given is ``None``.
        wanted: Names of sections.
        argument: The setting that is a positional argument.
        but: Settings that are left out.

    Returns:
        The command; typer reads its flags from its signature.
    """
    own = [
        p for p in signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD
    ]
    made = [
        (name, section, field)
        for name, section in sections().items()
        if name in wanted
        for field in section.model_fields
        if field not in but and not flag_of(section, field).expert
    ]
    made.sort(key=lambda m: (m[2] != argument, not flag_of(m[1], m[2]).common))
    parameters = [
        Parameter(
            field,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_argument(section, field) if field == argument else _option(section, field),
        )
        for _, section, field in made
    ]
    first = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in own if p.name in _FIRST]
    last = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in own if p.name not in _FIRST]
    shown = signature(command).replace(parameters=[*first, *parameters, *last])

    def run(**given: Any) -> None:
        command(**given)

    setattr(run, "__signature__", shown)  # noqa: B010 - functions are not typed as having one
    return run


_FIRST = ("folder",)
"""Positional arguments of a command's own."""


def _argument(section: type[Section], field: str) -> Any:
    flag = flag_of(section, field)
    return Annotated[str | None, typer.Argument(help=flag.help, show_default=False)]


def _option(section: type[Section], field: str) -> Any:
    flag = flag_of(section, field)
    info = section.model_fields[field]
    kind = _without_none(info.annotation)
    shown: dict[str, Any] = {
        "help": _help(flag.help, None if info.is_required() else info.default, kind),
        "rich_help_panel": COMMON if flag.common else section.title,
        "show_default": False,
    }
    name = f"--{field.replace('_', '-')}"
    names = [name] + ([flag.short] if flag.short else [])
    if kind is bool:
        off = flag.off or f"--no-{field.replace('_', '-')}"
        names = [f"{name}/{off}"] if info.default else names
        return Annotated[bool | None, typer.Option(*names, **shown)]
    if kind is Path:
        return Annotated[Path | None, typer.Option(*names, metavar=flag.metavar, **shown)]
    metavar = flag.metavar or _metavar(kind)
    if get_origin(kind) is tuple and kind == tuple[str, ...]:
        return Annotated[list[str] | None, typer.Option(*names, metavar=metavar, **shown)]
    return Annotated[str | None, typer.Option(*names, metavar=metavar, **shown)]


def _help(text: str, default: Any, kind: Any) -> str:
    """The help text with choices and default, unless the text has a default in brackets already."""
    text = text.rstrip(".")
    if get_origin(kind) is Literal:
        text += f": {', '.join(get_args(kind))}"
    if default in (None, ()) or kind is bool or text.endswith(")"):
        return f"{text}."
    shown = ", ".join(map(str, default)) if isinstance(default, tuple) else f"{default}"
    return f"{text} ({shown})."


def _metavar(kind: Any) -> str:
    if kind is int:
        return "N"
    if kind is float:
        return "X"
    if get_origin(kind) in (Union, types.UnionType):
        return "|".join(
            "auto" if get_origin(part) is Literal else _metavar(part) for part in get_args(kind)
        )
    return "NAME"


def _without_none(kind: Any) -> Any:
    """``X`` of ``X | None``."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    optional = get_origin(kind) in (Union, types.UnionType) and len(parts) < len(get_args(kind))
    return parts[0] if optional and len(parts) == 1 else kind
