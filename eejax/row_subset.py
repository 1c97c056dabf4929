"""Some rows of a batch, gathered so that a computation runs on no more rows than it has to. All by index: no branch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True, slots=True)
class RowSubset:
    """`size` of B rows, those that are wanted first. Rows are the last axis of an array, unless it is a table.

    Attributes:
        order: all row numbers, the wanted ones in front; None when all rows are taken, as they are.
        place: the inverse: where in `order` each row stands.
    """

    size: int
    order: Int[Array, " B"] | None = None
    place: Int[Array, " B"] | None = None

    @classmethod
    def of(cls, wanted: Bool[Array, " B"], size: int) -> RowSubset:
        """The wanted rows, of which there are at most `size`, and others behind them."""
        if size == wanted.shape[0]:
            return cls(size)
        order = jnp.argsort(~wanted, stable=True).astype(jnp.int32)
        place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
        return cls(size, order, place)

    def take(self, values: Array) -> Array:
        """The subset's columns of `values [..., B]`."""
        return values if self.order is None else _columns(values, self.order[: self.size])

    def others(self, values: Array) -> Array:
        """The columns of the rows that are not in it: none when all rows are taken."""
        return values[..., :0] if self.order is None else _columns(values, self.order[self.size :])

    def take_table(self, table: Array) -> Array:
        """The subset's rows of `table [B, ...]`."""
        return table if self.order is None else table.at[self.order[: self.size]].get(mode="promise_in_bounds")

    def other_tables(self, table: Array) -> Array:
        """The rows of `table [B, ...]` that are not in it."""
        return table[:0] if self.order is None else table.at[self.order[self.size :]].get(mode="promise_in_bounds")

    def put(self, values: Array, new: Array, where: Bool[Array, " b"]) -> Array:
        """`values` of all rows, with the subset's columns `new` in their places, `where` it says so."""
        if self.place is None:
            return jnp.where(where, new, values)
        column = jnp.minimum(self.place, self.size - 1)
        mine = (self.place < self.size) & _columns(where, column)
        return jnp.where(mine, _columns(new, column), values)


def _columns(values: Array, index: Int[Array, " n"]) -> Array:
    return values.at[..., index].get(mode="promise_in_bounds")


def each_bucket(buckets: tuple[int, ...], count: Int[Array, ""]) -> Iterator[tuple[int, Bool[Array, ""]]]:
    """Every bucket, ascending, and whether it is the smallest that holds `count` rows; none is where there are none."""
    for below, size in zip((0, *buckets), buckets, strict=False):
        yield size, (below < count) & (count <= size)
