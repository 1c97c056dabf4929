"""K and V of tokens in blocks that they did not run: each block's own projection of the hidden state at the exit.

Eager: whatever is missing at the end of a pass is written then. Deferred: the states wait, a few for each row, and the
next time a row enters a block its waiting states go through the block's K and V projection beside it, so that the
weights are read once for all of them. What still waits when a row has no free place, or when the chunk ends, is written
then: nothing waits while a row could be parked, preempted or regrouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.device.decode_state import WAITING_PER_ROW, Pass, Step, Waiting
from eejax.model import EarlyExitTransformer
from pallas_kernels import ExitedTokens, PagedKVCache, Slots, kv_fill, run_if, slots_of


@dataclass(frozen=True, slots=True)
class Tokens:
    """N tokens, of which the `valid` ones are to be written into the cache."""

    x: Float[Array, "D N"]
    positions: Int[Array, " N"]
    page_table: Int[Array, "N M"]
    valid: Bool[Array, " N"]

    def followed_by(self, others: Tokens) -> Tokens:
        """These tokens, then `others`."""
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
    """Write the K and V of tokens in all segments from `filled` on, which is at least 1.

    Returns:
        The cache, and the number of blocks whose projection that took.
    """
    # A segment writes its own blocks, and the one that the exit after it owns.
    by_segment = [(*blocks, *model.exit_blocks(blocks.stop)) for blocks in model.config.segments[1:]]
    layers = tuple(chain.from_iterable(by_segment))
    # Index of each segment's first block in `layers`; after the last segment nothing is missing.
    starts = [0, *accumulate(map(len, by_segment))]
    from_layer = jnp.where(tokens.valid, jnp.array([0, *starts], jnp.int32)[filled], len(layers))
    cache = fill(model, layers, tokens, cache, from_layer, starts[:-1])
    return cache, len(layers) - jnp.min(from_layer)


def settle(ctx: Pass, step: Step, resolved: Bool[Array, " B"]) -> Step:
    """Write the K and V that resolved rows lack (eager), or let them wait (deferred)."""
    done = len(ctx.model.config.segments)
    lacks = jnp.where(resolved, step.filled, done)
    if step.waiting is not None:
        # K and V of rows that have stopped are not read again.
        waiting = replace(step.waiting, filled=jnp.where(ctx.state.live, step.waiting.filled, done))
        waiting = _enqueue(waiting, step.x, ctx.state.positions, lacks, done)
        step = replace(step, waiting=waiting).placed(filled=jnp.where(resolved, done, step.filled))
        full = jnp.any(jnp.all(waiting.filled < done, axis=0))
        return run_if(full, partial(_flush, ctx), step)
    tokens = Tokens(step.x, ctx.state.positions, ctx.rows.page_table, resolved)
    with jax.named_scope("fill"):
        cache, fills = fill_segments(ctx.model, tokens, lacks, step.cache)
    return replace(step, cache=cache).placed(filled=jnp.where(resolved, done, step.filled)).counting(fills=fills)


def finish(ctx: Pass, step: Step) -> Step:
    """The end of a chunk: write what waits of rows that are still live."""
    if step.waiting is None:
        return step
    filled = jnp.where(ctx.state.live, step.waiting.filled, len(ctx.model.config.segments))
    return _flush(ctx, replace(step, waiting=replace(step.waiting, filled=filled)))


def waiting_for(waiting: Waiting, segment: int, page_table: Int[Array, "B M"], rows: Bool[Array, " B"]) -> Tokens:
    """What waits for a segment in some `rows`: all W times B places, valid or not."""
    return _all_places(waiting, page_table, (waiting.filled == segment) & rows)


def _all_places(waiting: Waiting, page_table: Int[Array, "B M"], valid: Bool[Array, "W B"]) -> Tokens:
    count = waiting.filled.size
    return Tokens(
        x=waiting.x.reshape(-1, count),
        positions=waiting.positions.reshape(count),
        page_table=jnp.broadcast_to(page_table, (WAITING_PER_ROW, *page_table.shape)).reshape(count, -1),
        valid=valid.reshape(count),
    )


def _enqueue(
    waiting: Waiting, x: Float[Array, "D B"], positions: Int[Array, " B"], filled: Int[Array, " B"], done: int
) -> Waiting:
    """With one more token of every row that is not `filled` in all segments; each such row has a free place."""
    free = waiting.filled == done
    place = free & (jnp.cumsum(free, axis=0) == 1) & (filled < done)
    return Waiting(
        x=jnp.where(place, x[:, None], waiting.x),
        positions=jnp.where(place, positions, waiting.positions),
        filled=jnp.where(place, filled, waiting.filled),
    )


def _flush(ctx: Pass, step: Step) -> Step:
    """Write all K and V that wait."""
    waiting, done = step.waiting, len(ctx.model.config.segments)
    assert waiting is not None
    with jax.named_scope("fill"):
        tokens = _all_places(waiting, ctx.rows.page_table, waiting.filled < done)
        cache, fills = fill_segments(ctx.model, tokens, waiting.filled.reshape(-1), step.cache)
    waiting = replace(waiting, filled=jnp.full_like(waiting.filled, done))
    return replace(step, waiting=waiting, cache=cache).counting(fills=fills)
