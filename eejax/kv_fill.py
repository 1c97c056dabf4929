"""K and V of tokens in blocks that they did not run: the block's own projection of the state a token left with.

Eager: whatever is missing at the end of a step is written then. Deferred: the states wait, a few for each row, and the
next time a row enters a block its waiting states go through the block's K and V projection beside it, so that the
weights are read once for all of them. What still waits when a row's places are taken, or when the chunk ends, is
written then: nothing waits while a row could be parked, preempted or regrouped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.control_flow import run_if
from eejax.kv_cache import PagedKVCache, Slots, slots_of, write
from eejax.model import EarlyExitTransformer

WAITING_PER_ROW = 4
"""Tokens of a row whose K and V may wait at a time."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Waiting:
    """Tokens of B rows that left early, W for each row, and are not written everywhere yet.

    Attributes:
        x: states they left with.
        positions: theirs.
        filled: segments in which their K and V are written; all of the model's where the place is free.
    """

    x: Float[Array, "D W B"]
    positions: Int[Array, "W B"]
    filled: Int[Array, "W B"]


def nobody_waits(model: EarlyExitTransformer, rows: int, dtype: jnp.dtype) -> Waiting:
    """All places free."""
    shape = (WAITING_PER_ROW, rows)
    return Waiting(
        x=jnp.zeros((model.config.hidden_size, *shape), dtype),
        positions=jnp.zeros(shape, jnp.int32),
        filled=jnp.full(shape, len(model.config.segments), jnp.int32),
    )


def cached_in(model: EarlyExitTransformer, segment: int) -> tuple[int, ...]:
    """Cached blocks that a segment writes: its own, and the one that an exit behind it owns."""
    blocks = model.config.segments[segment]
    return (*blocks, *model.exit_blocks(blocks.stop))


def fill(
    model: EarlyExitTransformer,
    layers: Iterable[int],
    x: Float[Array, "D N"],
    positions: Int[Array, " N"],
    cache: PagedKVCache,
    slots: Slots,
) -> PagedKVCache:
    """Write the K and V that cached blocks `layers` have for hidden states which do not go through them."""
    freq = model.frequencies()
    for layer in layers:
        k, v = model.cached_blocks[layer].keys_values(x, positions, freq)
        cache = write(cache, layer, slots, k, v)
    return cache


@dataclass(frozen=True, slots=True)
class Missing:
    """N tokens, of which the `valid` ones lack their K and V in a segment."""

    x: Float[Array, "D N"]
    positions: Int[Array, " N"]
    page_table: Int[Array, "N M"]
    valid: Bool[Array, " N"]

    @classmethod
    def nothing(cls, model: EarlyExitTransformer, page_table: Int[Array, "B M"]) -> Missing:
        """No token."""
        empty = jnp.zeros(0, jnp.int32)
        x = jnp.zeros((model.config.hidden_size, 0), model.embedding[...].dtype)
        return cls(x, empty, page_table[:0], empty.astype(bool))


def waiting_for(waiting: Waiting, segment: int, page_table: Int[Array, "B M"], rows: Bool[Array, " B"]) -> Missing:
    """What waits for a segment, of some rows: W times B tokens, valid or not."""
    count = waiting.filled.size
    return Missing(
        x=waiting.x.reshape(-1, count),
        positions=waiting.positions.reshape(count),
        page_table=jnp.broadcast_to(page_table, (WAITING_PER_ROW, *page_table.shape)).reshape(count, -1),
        valid=((waiting.filled == segment) & rows).reshape(count),
    )


def enqueue(
    model: EarlyExitTransformer,
    waiting: Waiting,
    x: Float[Array, "D B"],
    positions: Int[Array, " B"],
    filled: Int[Array, " B"],
) -> Waiting:
    """With one more token of every row that is not `filled` in all segments; each such row has a free place."""
    segments = len(model.config.segments)
    free = waiting.filled == segments
    place = free & (jnp.cumsum(free, axis=0) == 1) & (filled < segments)
    return Waiting(
        x=jnp.where(place, x[:, None], waiting.x),
        positions=jnp.where(place, positions, waiting.positions),
        filled=jnp.where(place, filled, waiting.filled),
    )


def flush(
    model: EarlyExitTransformer, waiting: Waiting, page_table: Int[Array, "B M"], cache: PagedKVCache
) -> tuple[Waiting, PagedKVCache, Int[Array, ""]]:
    """Write all that waits. Returns the number of blocks whose projection that took, too."""
    everybody = jnp.ones(page_table.shape[:1], bool)
    carry = (waiting, cache, jnp.zeros((), jnp.int32))
    for segment in range(1, len(model.config.segments)):

        def write_one(carry: tuple, segment: int = segment) -> tuple:
            waiting, cache, fills = carry
            due = waiting_for(waiting, segment, page_table, everybody)
            layers = cached_in(model, segment)
            cache = fill(model, layers, due.x, due.positions, cache, slots_of_missing(cache, due))
            filled = jnp.where(waiting.filled == segment, segment + 1, waiting.filled)
            return replace(waiting, filled=filled), cache, fills + len(layers)

        carry = run_if(jnp.any(carry[0].filled == segment), write_one, carry)
    return carry


def slots_of_missing(cache: PagedKVCache, missing: Missing) -> Slots:
    """Where they go."""
    return slots_of(cache, missing.page_table, missing.positions, missing.valid)
