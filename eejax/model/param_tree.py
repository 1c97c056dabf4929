"""Parameter trees by dotted leaf names, and leaves that are read only when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from eejax.core import CheckpointError

MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class LazyArray:
    """An array that is read on demand, so that a model larger than memory can be converted piece by piece."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and leaves of a nested dict, in the order in which jax flattens it."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key in sorted(tree):
        yield from leaves(tree[key], f"{prefix}.{key}" if prefix else str(key))


def rebuild(like: dict, by_name: Mapping[str, Any]) -> dict:
    """A tree of the form of `like` whose leaves are looked up by dotted name."""
    return jax.tree.unflatten(jax.tree.structure(like), [by_name[name] for name, _ in leaves(like)])


def shapes(tree: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves by dotted name."""
    return {name: tuple(leaf.shape) for name, leaf in leaves(tree)}


def compare(
    where: str,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    files: Mapping[str, str] | None = None,
) -> None:
    """Refuse weights that are not exactly those wanted.

    Args:
        where: what holds them, for the message.
        wanted, found: shapes by name.
        files: the file that each found one lies in, where there are several.

    Raises:
        CheckpointError: some are missing, extra or misshaped; they are named, up to eight of each.
    """

    def listed(names: list[str]) -> str:
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        return ", ".join(names[:MAX_NAMED]) + more

    def place(name: str) -> str:
        return f" in {files[name]}" if files and name in files else ""

    missing = [f"{name} {wanted[name]}" for name in wanted if name not in found]
    extra = [f"{name} {found[name]}{place(name)}" for name in found if name not in wanted]
    bad = [
        f"{name}: expected {wanted[name]}, found {found[name]}{place(name)}"
        for name in wanted
        if name in found and wanted[name] != found[name]
    ]
    problems = [
        f"{kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("extra", extra), ("misshaped", bad))
        if names
    ]
    if problems:
        raise CheckpointError(f"the weights in {where} do not match the configuration; " + "; ".join(problems))
