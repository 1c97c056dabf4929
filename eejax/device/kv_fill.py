"""K and V of tokens in blocks that they did not run: the block's own projection of the state a token left with.

Eager: whatever is missing at the end of a step is written then. Deferred: the states wait, a few for each row, and the
next time a row enters a block its waiting states go through the block's K and V projection beside it, so that the
weights are read once for all of them. What still waits when a row's places are taken, or when the chunk ends, is
written then: nothing waits while a row could be parked, preempted or regrouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.model import EarlyExitTransformer
from pallas_kernels import ExitedTokens, PagedKVCache, Slots, kv_fill, slots_of

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


@dataclass(frozen=True, slots=True)
class Tokens:
    """N tokens, of which the `valid` ones are to be written into the cache."""

    x: Float[Array, "D N"]
    positions: Int[Array, " N"]
    page_table: Int[Array, "N M"]
    valid: Bool[Array, " N"]

    def followed_by(self, others: Tokens) -> Tokens:
        """These and then the others."""
        return Tokens(
            jnp.concatenate([self.x, others.x], axis=1),
            jnp.concatenate([self.positions, others.positions]),
            jnp.concatenate([self.page_table, others.page_table]),
            jnp.concatenate([self.valid, others.valid]),
        )

    def slots(self, cache: PagedKVCache) -> Slots:
        """Where they go."""
        return slots_of(cache, self.page_table, self.positions, self.valid)


def fill(
    model: EarlyExitTransformer,
    layers: Sequence[int],
    tokens: Tokens,
    cache: PagedKVCache,
    from_layer: Int[Array, " N"] | int = 0,
    starts: Sequence[int] | None = None,
) -> PagedKVCache:
    """Write the K and V that cached blocks `layers` have for hidden states which do not go through them.

    Args:
        from_layer: index into `layers` from which on a token lacks them; `len(layers)` where it lacks none.
        starts: values that it may have beside this; any when None.
    """
    blocks = [model.cached_blocks[layer].kv_projection for layer in layers]
    from_block = jnp.where(tokens.valid, from_layer, len(layers)).astype(jnp.int32)
    exited = ExitedTokens(tokens.x, tokens.positions, tokens.page_table, from_block)
    return kv_fill(exited, blocks, cache, layers=layers, freq=model.frequencies(), starts=starts)


def fill_segments(
    model: EarlyExitTransformer, tokens: Tokens, filled: Int[Array, " N"], cache: PagedKVCache
) -> tuple[PagedKVCache, Int[Array, ""]]:
    """Write the K and V of tokens in all segments from `filled` on, which is 1 or above.

    Returns:
        The cache, and the number of blocks whose projection that took.
    """
    by_segment = [cached_in(model, segment) for segment in range(1, len(model.config.segments))]
    layers = tuple(chain.from_iterable(by_segment))
    # Where each segment's blocks begin among all of them; nothing is missing behind the last.
    starts = [0, *accumulate(map(len, by_segment))]
    from_layer = jnp.where(tokens.valid, jnp.array([0, *starts], jnp.int32)[filled], len(layers))
    cache = fill(model, layers, tokens, cache, from_layer, starts[:-1])
    return cache, len(layers) - jnp.min(from_layer)


def waiting_for(waiting: Waiting, segment: int, page_table: Int[Array, "B M"], rows: Bool[Array, " B"]) -> Tokens:
    """What waits for a segment, of some rows: W times B tokens, valid or not."""
    return _all_places(waiting, page_table, (waiting.filled == segment) & rows)


def _all_places(waiting: Waiting, page_table: Int[Array, "B M"], valid: Bool[Array, "W B"]) -> Tokens:
    count = waiting.filled.size
    return Tokens(
        x=waiting.x.reshape(-1, count),
        positions=waiting.positions.reshape(count),
        page_table=jnp.broadcast_to(page_table, (WAITING_PER_ROW, *page_table.shape)).reshape(count, -1),
        valid=valid.reshape(count),
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
    """Write all that waits, in one go. Returns the number of blocks whose projection that took, too."""
    done = len(model.config.segments)
    tokens = _all_places(waiting, page_table, waiting.filled < done)
    cache, fills = fill_segments(model, tokens, waiting.filled.reshape(-1), cache)
    return replace(waiting, filled=jnp.full_like(waiting.filled, done)), cache, fills
