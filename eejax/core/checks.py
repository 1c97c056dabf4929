"""Checks of options and parameters, each of which raises `ConfigError` with the option's name. No jax here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, get_args

from eejax.core.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def is_number(value: object) -> bool:
    """Whether `value` is an int or float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    """Whether `value` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def require_integer(owner: str, low: int, high: int | None = None, **values: Any) -> None:
    """Raise `ConfigError` for any value that is not an int of at least `low` (and at most `high`)."""
    allowed = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
    for name, value in values.items():
        inside = is_integer(value) and low <= value and (high is None or value <= high)
        require(inside, f"{owner}.{name} must be {allowed}, got {value!r}")


def require_positive_int(owner: str, **values: Any) -> None:
    """Raise `ConfigError` for any value that is not an int of at least 1."""
    require_integer(owner, 1, **values)


def require_seed(owner: str, seed: object) -> None:
    """Raise `ConfigError` for a seed that does not fit into 32 bits."""
    valid = is_integer(seed) and 0 <= seed < 2**32  # pyright: ignore[reportOperatorIssue]
    require(valid, f"{owner}.seed must be an integer in 0..2**32-1, got {seed!r}")


def require_number(owner: str, name: str, value: object, low: float, high: float, allowed: str) -> None:
    """Raise `ConfigError` unless `value` is a number in `low..high`; `allowed` says so in words."""
    require(
        is_number(value) and low <= value <= high,  # pyright: ignore[reportOperatorIssue]
        f"{owner}.{name} must be {allowed}, got {value!r}",
    )


def require_choice(owner: str, kind: Any, **values: object) -> None:
    """Raise `ConfigError` for any value that is not one of the `Literal` type `kind`."""
    for name, value in values.items():
        require(value in get_args(kind), f"{owner}.{name} must be one of {', '.join(get_args(kind))}, got {value!r}")


def named_options[T](cls: type[T]) -> type[T]:
    """Class decorator: an option that the constructor does not know raises `ConfigError` listing those it does."""
    init = cls.__init__
    allowed = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: T, *args: Any, **options: Any) -> None:
        unknown = [name for name in options if name not in allowed]
        require(not unknown, f"{cls.__name__} has no option {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        init(self, *args, **options)

    cls.__init__ = checked
    return cls


def from_mapping[T](cls: type[T], values: dict[str, Any]) -> T:
    """Build a dataclass from a mapping; unknown or missing keys raise `ConfigError` naming them."""
    known = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    require(isinstance(values, dict), f"{cls.__name__} must be a mapping of options, got {values!r}")
    unknown = sorted(set(values) - set(known))
    require(not unknown, f"{cls.__name__} has no option {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
    missing = [
        name
        for name, field in known.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"{cls.__name__} needs {', '.join(missing)}")
    return cls(**values)


def option(default: Any, text: str) -> Any:
    """A dataclass field with this default, and a help text for `help_of` and `with_help`."""
    return dataclasses.field(default=default, metadata={"help": text})


def help_of(options: type) -> dict[str, str]:
    """Help texts of a dataclass's fields, those that were made by `option`."""
    fields = dataclasses.fields(options)  # pyright: ignore[reportArgumentType]
    return {field.name: field.metadata["help"] for field in fields if field.metadata}


def with_help(text: str | None, options: type) -> str:
    """A docstring, followed by a line with name, default and help for each of `help_of`."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}  # pyright: ignore[reportArgumentType]
    lines = [f"        {name} ({defaults[name]}): {line}\n" for name, line in help_of(options).items()]
    return f"{text}\n    Options:\n{''.join(lines)}"
