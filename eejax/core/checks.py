"""What configurations and parameters are checked with. No jax here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from eejax.core.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def is_number(value: object) -> bool:
    """Whether `value` is an int or float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_positive_int(owner: str, **values: object) -> None:
    """Raise `ConfigError` for any value that is not an int of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{owner}.{name} must be an integer of at least 1, got {value!r}")


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
