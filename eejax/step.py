"""One decode step of a batch, block by block, with early exits.

Blocks run segment by segment; after a segment the exit's test is put to the rows that are still unresolved, and a row
that passes is frozen: its hidden state stays as it is, and what the blocks above write for it is their own K and V of
that frozen state. Once every row is resolved the remaining segments do only that (fill-in). A block that an exit owns
gets its K and V of every token as well, and runs where it is asked. `tests/reference.py` says the same without cache or
batch. Every function here is pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax import exits
from eejax.control_flow import run_if
from eejax.exits import ExitRows
from eejax.kv_cache import PagedKVCache, Slots, slots_of, write
from eejax.model import Block, EarlyExitTransformer
from eejax.sampling import SamplingRows
from pallas_kernels import paged_attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Rows:
    """What a batch of B rows brings along, fixed during a chunk. Padding rows have `live` false.

    Attributes:
        page_table: physical pages by position; entries behind the reserved ones may hold any valid id.
        stop_ids: tokens that end the row, padded with -1 (Z of them).
    """

    page_table: Int[Array, "B M"]
    stop_ids: Int[Array, "B Z"]
    exits: ExitRows
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DecodeState:
    """Where each row stands.

    Attributes:
        tokens: the next step's input.
        positions: that token's position.
        generated: answer tokens so far.
        budget: answer tokens that may still follow.
        live: whether the row takes part.
    """

    tokens: Int[Array, " B"]
    positions: Int[Array, " B"]
    generated: Int[Array, " B"]
    budget: Int[Array, " B"]
    live: Bool[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Step:
    """A step in progress.

    Attributes:
        x: hidden states; of resolved rows, frozen.
        resolved: rows that left in this step, or were not live when it began.
        exit_at: blocks that each row ran.
        features: what the output matrix multiplies, of resolved rows.
        logits: valid for rows that are `scored`.
        scored: rows whose logits are known already.
        blocks, heads: blocks and vocabulary projections run so far in this chunk; blocks that exits own do not count.
    """

    cache: PagedKVCache
    x: Float[Array, "D B"]
    resolved: Bool[Array, " B"]
    exit_at: Int[Array, " B"]
    features: Float[Array, "D B"]
    logits: Float[Array, "V B"]
    scored: Bool[Array, " B"]
    blocks: Int[Array, ""]
    heads: Int[Array, ""]


def run_blocks(model: EarlyExitTransformer, rows: Rows, state: DecodeState, step: Step) -> Step:
    """All segments of one step: run while a row is unresolved, filled in from then on."""
    config = model.config
    slots = slots_of(step.cache, rows.page_table, state.positions, state.live)
    lengths = jnp.where(state.live, state.positions + 1, 0)
    step = replace(
        step,
        x=model.embed(state.tokens),
        resolved=~state.live,
        scored=~state.live,
        exit_at=jnp.full_like(step.exit_at, config.n_layers),
    )
    for index, segment in enumerate(config.segments):
        # The first segment always runs: the loop over steps goes on only while a row is live.
        done = jnp.all(step.resolved)

        def run(step: Step, index: int = index, segment: range = segment) -> Step:
            return _run_segment(model, rows, state, step, index, segment, slots, lengths)

        def fill_in(step: Step, segment: range = segment) -> Step:
            layers = (*segment, *model.exit_blocks(segment.stop))
            return replace(step, cache=fill(model, layers, step.x, state.positions, step.cache, slots))

        if index:
            step = run_if(done, fill_in, run_if(~done, run, step))
        else:
            step = run(step)
    return step


def _run_segment(
    model: EarlyExitTransformer,
    rows: Rows,
    state: DecodeState,
    step: Step,
    index: int,
    segment: range,
    slots: Slots,
    lengths: Int[Array, " B"],
) -> Step:
    freq = model.frequencies()
    x, cache = step.x, step.cache
    middle = x
    for layer in segment:

        def attend(q: Array, k: Array, v: Array, cache: PagedKVCache, layer: int = layer) -> tuple[Array, PagedKVCache]:
            cache = write(cache, layer, slots, k, v)
            return _attention(model, layer, q, cache, rows.page_table, lengths), cache

        out, middle, cache = model.blocks[layer](x, state.positions, freq, attend, cache)
        # A frozen row's K and V came out of the projection above; the rest of what it computed is dropped.
        x = jnp.where(step.resolved, x, out) if index else out
    depth = segment.stop
    cache = fill(model, model.exit_blocks(depth), x, state.positions, cache, slots)
    step = replace(step, x=x, cache=cache, blocks=step.blocks + len(segment))
    if depth == model.config.n_layers:
        features = jnp.where(step.resolved, step.features, model.features(depth, x, middle))
        return replace(step, features=features, resolved=jnp.ones_like(step.resolved))

    asks = exits.may_leave(rows.exits, index) & ~step.resolved

    def test(step: Step) -> Step:
        return _test_exit(model, rows, state, step, index, middle, asks)

    return run_if(jnp.any(asks), test, step)


def _test_exit(
    model: EarlyExitTransformer,
    rows: Rows,
    state: DecodeState,
    step: Step,
    index: int,
    middle: Float[Array, "D B"],
    asks: Bool[Array, " B"],
) -> Step:
    """Put exit `index`'s test to the rows that ask for it, and resolve those that pass."""
    layer = model.config.exits.layers[index]

    def run_block(block: Block, x: Array) -> Array:
        (own,) = model.exit_blocks(layer)
        lengths = jnp.where(asks, state.positions + 1, 0)

        def attend(q: Array, _k: Array, _v: Array, cache: PagedKVCache) -> tuple[Array, PagedKVCache]:
            # K and V have been written, for rows that do not ask as well; XLA leaves their second projection out.
            return _attention(model, own, q, cache, rows.page_table, lengths), cache

        return block(x, state.positions, model.frequencies(), attend, step.cache)[0]

    features = model.features(layer, step.x, middle, run_block)
    by_logits = exits.uses(rows.exits, exits.NEEDS_LOGITS)
    limits = exits.thresholds_at(rows.exits, index, state.generated)

    def leave(step: Step, seen: exits.Observation) -> tuple[Step, Array]:
        leaving = asks & (exits.confidence(rows.exits, seen) >= limits)
        step = replace(
            step,
            features=jnp.where(leaving, features, step.features),
            exit_at=jnp.where(leaving, layer, step.exit_at),
            resolved=step.resolved | leaving,
        )
        return step, leaving

    def with_head(step: Step) -> Step:
        logits = model.logits(layer, features)
        step, leaving = leave(step, exits.Observation(logits=logits))
        # Whoever leaves here is scored by these very logits: no second projection.
        return replace(
            step,
            logits=jnp.where(leaving, logits, step.logits),
            scored=step.scored | leaving,
            heads=step.heads + 1,
        )

    def without_head(step: Step) -> Step:
        return leave(step, exits.Observation(uniform=exits.uniform_draw(rows.exits, state.generated)))[0]

    step = run_if(jnp.any(asks & by_logits), with_head, step)
    return run_if(jnp.any(asks & ~by_logits), without_head, step)


def _attention(
    model: EarlyExitTransformer,
    layer: int,
    q: Float[Array, "H C B"],
    cache: PagedKVCache,
    page_table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
) -> Float[Array, "H C B"]:
    """What one query per row finds in its first `lengths` tokens of cached block `layer`."""
    window = model.config.window_of(layer)
    q = jnp.moveaxis(q, -1, 0)
    o = paged_attention(q, cache.k, cache.v, page_table, lengths, layer=layer, sliding_window=window)
    return jnp.moveaxis(o, 0, -1)


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


def score(model: EarlyExitTransformer, state: DecodeState, step: Step) -> Step:
    """Logits of the rows that no exit test has scored, from the head of the exit where each one left."""
    config = model.config
    tied = config.exits.tie_output
    for layer in (config.n_layers,) if tied else config.exit_points:
        todo = state.live & ~step.scored
        todo = todo if tied else todo & (step.exit_at == layer)

        def project(step: Step, layer: int = layer, todo: Array = todo) -> Step:
            logits = model.logits(layer, step.features)
            return replace(
                step,
                logits=jnp.where(todo, logits, step.logits),
                scored=step.scored | todo,
                heads=step.heads + 1,
            )

        step = run_if(jnp.any(todo), project, step)
    return step
