"""Annotations of what is traced, shapes included, checked at each call: beartype, through jaxtyping's import hook."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jaxtyping
import numpy as np
from beartype import beartype

PACKAGES = ("eejax.device", "eejax.model.transformer", "pallas_kernels")


def install() -> None:
    """To be called before these packages are imported."""
    jaxtyping.install_import_hook(PACKAGES, "tests.shapes.check")


def check(function: Callable) -> Callable:
    """What the import hook makes of each function, and of the constructor of each dataclass."""
    if "<locals>" in function.__qualname__:  # made anew in every trace; to check it costs as much as to trace it
        return function
    checked = beartype(function)

    @functools.wraps(function)
    def call(*args, **kwargs) -> object:
        given = [*args, *kwargs.values()]
        if function.__name__ == "__init__":
            # JAX rebuilds dataclasses with anything in the place of arrays: shapes, layouts, flags.
            import jax

            trusted = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(given[1:]))
        else:
            trusted = not any(isinstance(one, np.ndarray) for one in given)  # which JAX takes as well
        return checked(*args, **kwargs) if trusted else function(*args, **kwargs)

    return call
