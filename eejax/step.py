"""One pass of a batch through the network, segment by segment, with early exits.

A row stands at a segment. After the segment the exit's test is put to it; if it passes, it is resolved: its hidden
state stays as it is, and what the blocks above write for it is their own K and V of that frozen state (`kv_fill`). If
not, it stands at the next segment. A segment runs for the rows that stand at it, gathered into the smallest bucket that
holds them (compaction), and for nobody if there are none. Rows may also be held where they stand until more have
gathered, while resolved ones go on to their next token (rebatching); when nobody is held, a pass is a decode step.

A block that an exit owns gets its K and V of every token as well, and runs where it is asked. `tests/reference.py` says
the same without cache or batch. Every function here is pure.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax import exits, kv_fill
from eejax.decode_state import DecodeState, Plan, Rows, Step
from eejax.kv_cache import PagedKVCache, write
from eejax.kv_fill import Tokens
from eejax.model import Block, EarlyExitTransformer
from eejax.row_subset import RowSubset, each_bucket
from pallas_kernels import paged_attention
from pallas_kernels.control_flow import run_if


def run_pass(
    model: EarlyExitTransformer,
    plan: Plan,
    rows: Rows,
    state: DecodeState,
    step: Step,
    hold: Int[Array, ""],
    last: Bool[Array, ""],
) -> tuple[Step, Bool[Array, " B"]]:
    """Take every live row one token further, or as far as it is not held.

    Args:
        hold: a segment behind an exit waits until so many rows stand at it, or one has stood there for so many passes.
            1 holds nobody.
        last: hold nobody in this pass.

    Returns:
        The rows, and which of them are resolved, scored, and have their K and V written or waiting.
    """
    config = model.config
    done = len(config.segments)
    begins = state.live & (step.segment == done)
    step = replace(
        step,
        x=jnp.where(begins, model.embed(state.tokens), step.x),
        segment=jnp.where(begins, 0, jnp.where(state.live, step.segment, done)),
        filled=jnp.where(begins, 0, step.filled),
        held=jnp.where(begins, 0, step.held + 1),
        exit_at=jnp.where(begins, config.n_layers, step.exit_at),
        scored=step.scored & ~begins,
    )
    hurry = last | ~jnp.any(begins)
    for index in range(done):
        here = step.segment == index
        count = jnp.sum(here)
        goes = count > 0
        if index and plan.asks.exits != "none":
            goes &= hurry | (count >= hold) | jnp.any(here & (step.held >= hold))
        for size, fits in each_bucket(plan.buckets, count):
            step = _run_in_bucket(model, plan, rows, state, step, index, size, goes & fits)
    resolved = state.live & (step.segment == done)
    if plan.asks.exits != "none":
        step = _settle(model, rows, state, step, resolved)
    return score(model, plan, step, resolved), resolved


def _run_in_bucket(
    model: EarlyExitTransformer,
    plan: Plan,
    rows: Rows,
    state: DecodeState,
    step: Step,
    index: int,
    size: int,
    chosen: Bool[Array, ""],
) -> Step:
    """One segment in one bucket, if `chosen`; with the states that wait for it, if there are any."""

    def run(step: Step, with_waiting: bool) -> Step:
        return _run_segment(model, plan, rows, state, step, index, size, with_waiting)

    if plan.straight:
        return run(step, False)
    if step.waiting is None or index == 0:
        return run_if(chosen, lambda step: run(step, False), step)
    waits = jnp.any((step.waiting.filled == index) & (step.segment == index))
    step = run_if(chosen & waits, lambda step: run(step, True), step)
    return run_if(chosen & ~waits, lambda step: run(step, False), step)


def _run_segment(
    model: EarlyExitTransformer,
    plan: Plan,
    rows: Rows,
    state: DecodeState,
    step: Step,
    index: int,
    size: int,
    with_waiting: bool,
) -> Step:
    """One segment for the rows that stand at it, at most `size` of them, and the exit test behind it."""
    config, blocks = model.config, model.config.segments[index]
    here = step.segment == index
    subset = RowSubset.of(here, size)
    page_table, positions = subset.take_table(rows.page_table), subset.take(state.positions)
    runs = subset.take(here)

    # Eager: K and V that are due of resolved rows are projected beside those of the rows that run.
    due = here if step.waiting is not None else state.live & (step.filled == index)
    if step.waiting is None:
        beside = Tokens(
            x=subset.others(step.x),
            positions=subset.others(state.positions),
            page_table=subset.other_tables(rows.page_table),
            valid=subset.others(due),
        )
    elif with_waiting:
        beside = kv_fill.waiting_for(jax.tree.map(subset.take, step.waiting), index, page_table, runs)
        filled = jnp.where((step.waiting.filled == index) & here, index + 1, step.waiting.filled)
        step = replace(step, waiting=replace(step.waiting, filled=filled))
    else:
        beside = Tokens.none(model, rows.page_table)
    x = subset.take(step.x)
    written = Tokens(x, positions, page_table, subset.take(due)).followed_by(beside)
    slots = written.slots(step.cache)

    freq, cache = model.frequencies(), step.cache
    before = middle = x
    for layer in blocks:

        def attend(q: Array, k: Array, v: Array, cache: PagedKVCache, layer: int = layer) -> tuple[Array, PagedKVCache]:
            cache = write(cache, layer, slots, k, v)
            return _attention(model, layer, q, cache, page_table, positions, runs), cache

        before = x
        out, middle, cache = model.blocks[layer](x, written.positions, freq, attend, cache, beside.x)
        # A frozen row's K and V came out of the projection above; the rest of what it computed is dropped.
        x = jnp.where(runs, out, x)
    behind = replace(written, x=jnp.concatenate([x, beside.x], axis=1))
    cache = kv_fill.fill(model, model.exit_blocks(blocks.stop), behind, cache)
    step = replace(
        step,
        cache=cache,
        x=subset.put(step.x, x, runs),
        segment=jnp.where(here, index + 1, step.segment),
        filled=jnp.where(due, index + 1, step.filled),
        held=jnp.where(here, 0, step.held),
    ).counting(blocks=len(blocks), row_blocks=len(blocks) * size)
    if blocks.stop == config.n_layers:
        features = model.features(blocks.stop, x, middle)
        return replace(step, features=subset.put(step.features, features, runs))
    if plan.asks.exits == "none":
        return step
    return _test_exit(model, plan, rows, state, step, index, subset, runs, before, x, middle)


def _test_exit(
    model: EarlyExitTransformer,
    plan: Plan,
    rows: Rows,
    state: DecodeState,
    step: Step,
    index: int,
    subset: RowSubset,
    runs: Bool[Array, " b"],
    before: Float[Array, "D b"],
    x: Float[Array, "D b"],
    middle: Float[Array, "D b"],
) -> Step:
    """Put exit `index`'s test to the rows that ran and ask for it, and resolve those that pass.

    Args:
        before, x, middle: the exit's block: what entered it, what it put out, and its residual between the two halves.
    """
    config = model.config
    layer, done = config.exits.layers[index], len(config.segments)
    some, positions = rows.exits.take(subset), subset.take(state.positions)
    asks = exits.may_leave(some, index) & runs
    limits = exits.thresholds_at(some, index, subset.take(state.generated))

    def run_block(block: Block, x: Array) -> Array:
        (own,) = model.exit_blocks(layer)
        page_table = subset.take_table(rows.page_table)

        def attend(q: Array, _k: Array, _v: Array, cache: PagedKVCache) -> tuple[Array, PagedKVCache]:
            # K and V have been written, for rows that do not ask as well; XLA leaves their second projection out.
            return _attention(model, own, q, cache, page_table, positions, asks), cache

        return block(x, positions, model.frequencies(), attend, step.cache)[0]

    def leave(step: Step, features: Array, seen: exits.Observation) -> tuple[Step, Array]:
        leaving = asks & (exits.confidence(some, seen) >= limits)
        return replace(
            step,
            features=subset.put(step.features, features, leaving),
            exit_at=subset.put(step.exit_at, jnp.full_like(positions, layer), leaving),
            segment=subset.put(step.segment, jnp.full_like(positions, done), leaving),
        ), leaving

    def with_head(step: Step) -> Step:
        features = model.features(layer, x, middle, run_block)
        logits = model.logits(layer, features)
        step, leaving = leave(step, features, exits.Observation(logits=logits))
        # Whoever leaves here is scored by these very logits: no second projection.
        return replace(
            step,
            logits=subset.put(step.logits, logits, leaving),
            scored=subset.put(step.scored, leaving, leaving),
        ).counting(heads=1, row_heads=subset.size)

    def without_head(step: Step) -> Step:
        features = model.features(layer, x, middle, run_block)
        seen = exits.Observation(
            similarity=exits.similarity(before, x),
            probe=model.probe_logit(layer, features) if config.exits.probes else None,
            uniform=exits.uniform_draw(some, subset.take(state.generated)),
        )
        return leave(step, features, seen)[0]

    if plan.asks.exits == "heads":
        return run_if(jnp.any(asks), with_head, step)
    by_logits = exits.uses(some, exits.NEEDS_LOGITS)
    step = run_if(jnp.any(asks & by_logits), with_head, step)
    return run_if(jnp.any(asks & ~by_logits), without_head, step)


def _attention(
    model: EarlyExitTransformer,
    layer: int,
    q: Float[Array, "H C B"],
    cache: PagedKVCache,
    page_table: Int[Array, "B M"],
    positions: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> Float[Array, "H C B"]:
    """What one query per active row finds in cached block `layer`, up to its own position."""
    window = model.config.window_of(layer)
    q = jnp.moveaxis(q, -1, 0)
    o = paged_attention(
        q, cache.k, cache.v, page_table, positions + 1, layer=layer, active=active, sliding_window=window
    )
    return jnp.moveaxis(o, 0, -1)


def _settle(model: EarlyExitTransformer, rows: Rows, state: DecodeState, step: Step, resolved: Array) -> Step:
    """See to the K and V that resolved rows lack: eager, they are written; deferred, they wait."""
    done = len(model.config.segments)
    lacks = jnp.where(resolved, step.filled, done)
    if step.waiting is not None:
        # Of rows that have ended nothing is read any more.
        waiting = replace(step.waiting, filled=jnp.where(state.live, step.waiting.filled, done))
        waiting = kv_fill.enqueue(model, waiting, step.x, state.positions, lacks)
        step = replace(step, waiting=waiting, filled=jnp.where(resolved, done, step.filled))
        full = jnp.any(jnp.all(waiting.filled < done, axis=0))
        return run_if(full, lambda step: _flush(model, rows, step), step)
    tokens = Tokens(step.x, state.positions, rows.page_table, resolved)
    cache, fills = kv_fill.fill_segments(model, tokens, lacks, step.cache)
    return replace(step, cache=cache, filled=jnp.where(resolved, done, step.filled)).counting(fills=fills)


def finish(model: EarlyExitTransformer, rows: Rows, state: DecodeState, step: Step) -> Step:
    """The end of a chunk: nothing of a row that goes on is left waiting."""
    if step.waiting is None:
        return step
    filled = jnp.where(state.live, step.waiting.filled, len(model.config.segments))
    return _flush(model, rows, replace(step, waiting=replace(step.waiting, filled=filled)))


def _flush(model: EarlyExitTransformer, rows: Rows, step: Step) -> Step:
    """Write all K and V that wait."""
    assert step.waiting is not None
    waiting, cache, fills = kv_fill.flush(model, step.waiting, rows.page_table, step.cache)
    return replace(step, waiting=waiting, cache=cache).counting(fills=fills)


def score(model: EarlyExitTransformer, plan: Plan, step: Step, resolved: Bool[Array, " B"]) -> Step:
    """Logits of resolved rows that no exit test has scored, from the head of the exit where each one left."""
    config = model.config
    # Rows that exit by a head's logits have been scored at that exit.
    one_head = config.exits.tie_output or plan.asks.exits != "any"
    for layer in (config.n_layers,) if one_head else config.exit_points:
        todo = resolved & ~step.scored
        todo = todo if one_head else todo & (step.exit_at == layer)
        for size, fits in each_bucket(plan.buckets, jnp.sum(todo)):

            def project(step: Step, layer: int = layer, todo: Array = todo, size: int = size) -> Step:
                subset = RowSubset.of(todo, size)
                features = subset.take(step.features)
                if size == len(todo):  # all rows: no logits but these are written
                    logits = model.logits_into(step.logits, todo, layer, features)
                else:
                    logits = subset.put(step.logits, model.logits(layer, features), subset.take(todo))
                return replace(step, logits=logits, scored=step.scored | todo).counting(heads=1, row_heads=size)

            step = project(step) if plan.straight else run_if(fits, project, step)
    return step
