"""Flags from the fields of dataclasses, which hold name, type, default and help of each option. No jax here."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from eejax.core import ConfigError, help_of

METAVARS = {"threshold": "T[,T]", "exit_layers": "E[,E]", "stop_token_ids": "ID[,ID]"}
SHORT = {"n": ("-n",)}


def flags_of(
    options: type,
    panel: str,
    *,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> list[inspect.Parameter]:
    """A parameter of a command for each field of `options` that has a help text. Flags not given are None.

    Args:
        panel: heading of these flags in `--help`.
        only, without: names of fields to take or to leave out.
        defaults: values that the command has instead of the dataclass's own.
    """
    defaults, texts = defaults or {}, help_of(options)
    names = [name for name in texts if name not in without and (not only or name in only)]
    own = {**{field.name: field.default for field in dataclasses.fields(options)}, **defaults}
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(name),
            annotation=_annotation(name, _kind(options, name), panel, texts[name], own[name]),
        )
        for name in names
    ]


def _annotation(name: str, kind: Any, panel: str, text: str, default: Any) -> Any:
    text += " May be repeated." if kind == list[str] else ""
    if default not in (None, ()) and default is not False:
        text += f" \\[default: {default}]"
    option = typer.Option(
        *flag_names(name),
        help=text,
        metavar=METAVARS.get(name, "NAME") if kind is str else None,
        rich_help_panel=panel,
        show_default=False,  # the command does not see it: flags that are not given are left to the dataclass
    )
    return Annotated[kind | None, option]


def flag_names(name: str) -> list[str]:
    """How the flag of a field is spelled."""
    return [f"--{name.replace('_', '-')}", *SHORT.get(name, ())]


def takes[**P, R](*groups: list[inspect.Parameter]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: a command takes these flags in the place of its `**flags`."""

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        named = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*named, *chain(*groups)])  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return decorate


def given(flags: Mapping[str, Any], options: type) -> dict[str, Any]:
    """Those of the flags that were given and are fields of `options`, as its constructor takes them.

    Raises:
        ConfigError: a list of integers is something else.
    """
    found = {name: flags[name] for name in help_of(options) if flags.get(name) is not None}
    for name in found.keys() & {"exit_layers", "stop_token_ids"}:
        found[name] = integers(flag_names(name)[0], found[name])
    return found


def _kind(options: type, name: str) -> Any:
    """The type of a flag: bool, int, float or a list of texts; otherwise a text, which is parsed later."""
    hint = get_type_hints(options)[name]
    kinds = set(get_args(hint) if get_origin(hint) is Union or isinstance(hint, UnionType) else [hint]) - {type(None)}
    if kinds == {str, Sequence[str]}:
        return list[str]
    return next((kind for kind in (bool, int, float) if kinds == {kind}), str)


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """`0.8,0.9` as numbers. Raises `ConfigError` where it is something else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} must be numbers with commas between them, got {text!r}") from None


def integers(flag: str, text: str | None) -> tuple[int, ...] | None:
    """`4,8` as integers; None stays None. Raises `ConfigError` where it is something else."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} must be integers with commas between them, got {text!r}") from None
