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

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax import exits, kv_fill
from eejax.control_flow import run_if
from eejax.exits import ExitRows
from eejax.kv_cache import PagedKVCache, slots_of, write
from eejax.kv_fill import Missing, Waiting
from eejax.model import Block, EarlyExitTransformer
from eejax.row_subset import RowSubset
from eejax.sampling import SamplingRows
from pallas_kernels import paged_attention

COUNTERS = ("steps", "blocks", "heads", "row_blocks", "row_heads", "fills")
"""What a chunk counts: passes; blocks run, and vocabulary projections; rows computed, summed over either; blocks whose
K and V projection ran for fill-in alone. Blocks that exits own do not count."""


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
    """Rows on their way through the network.

    Attributes:
        x: hidden states; of resolved rows, frozen.
        segment: that each row stands at; the number of segments for rows that are resolved, or take no part.
        filled: segments in which K and V of the row's token are written.
        held: passes that the row has been standing there.
        exit_at: blocks that each row ran.
        features: what the output matrix multiplies, of resolved rows.
        logits: valid for rows that are `scored`.
        scored: rows whose logits are known already.
        waiting: for deferred fill-in; None where it is eager.
        counts: `COUNTERS` so far in this chunk.
    """

    cache: PagedKVCache
    x: Float[Array, "D B"]
    segment: Int[Array, " B"]
    filled: Int[Array, " B"]
    held: Int[Array, " B"]
    exit_at: Int[Array, " B"]
    features: Float[Array, "D B"]
    logits: Float[Array, "V B"]
    scored: Bool[Array, " B"]
    waiting: Waiting | None
    counts: Int[Array, " 6"]

    def counting(self, **more: int | Array) -> Step:
        """With some counters advanced."""
        return replace(self, counts=self.counts + jnp.stack([jnp.int32(more.get(name, 0)) for name in COUNTERS]))


@dataclass(frozen=True, slots=True)
class Plan:
    """How segments are run; fixed when the program is compiled.

    Attributes:
        buckets: row counts that a segment may run with, ascending; the last one is B.
        deferred: fill-in is deferred.
    """

    buckets: tuple[int, ...]
    deferred: bool


def begin(model: EarlyExitTransformer, plan: Plan, cache: PagedKVCache, count: int) -> Step:
    """`count` rows, none of which has begun."""
    config, dtype = model.config, model.embedding[...].dtype
    zeros, none = jnp.zeros((count,), jnp.int32), jnp.zeros((count,), bool)
    last = jnp.full((count,), len(config.segments), jnp.int32)
    states = jnp.zeros((config.hidden_size, count), dtype)
    return Step(
        cache=cache,
        x=states,
        segment=last,
        filled=last,
        held=zeros,
        exit_at=zeros,
        features=states,
        logits=jnp.zeros((config.vocab_size, count), jnp.float32),
        scored=none,
        waiting=kv_fill.nobody_waits(model, count, dtype) if plan.deferred else None,
        counts=jnp.zeros((len(COUNTERS),), jnp.int32),
    )


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
        if index:
            goes &= hurry | (count >= hold) | jnp.any(here & (step.held >= hold))
        for below, size in zip((0, *plan.buckets), plan.buckets, strict=False):
            chosen = goes & (below < count) & (count <= size)
            step = _run_in_bucket(model, rows, state, step, index, size, chosen)
    resolved = state.live & (step.segment == done)
    step = _settle(model, rows, state, step, resolved)
    return score(model, plan, step, resolved), resolved


def _run_in_bucket(
    model: EarlyExitTransformer,
    rows: Rows,
    state: DecodeState,
    step: Step,
    index: int,
    size: int,
    chosen: Bool[Array, ""],
) -> Step:
    """One segment in one bucket, if `chosen`; with the states that wait for it, if there are any."""

    def run(step: Step, with_waiting: bool) -> Step:
        return _run_segment(model, rows, state, step, index, size, with_waiting)

    if step.waiting is None or index == 0:
        return run_if(chosen, lambda step: run(step, False), step)
    waits = jnp.any((step.waiting.filled == index) & (step.segment == index))
    step = run_if(chosen & waits, lambda step: run(step, True), step)
    return run_if(chosen & ~waits, lambda step: run(step, False), step)


def _run_segment(
    model: EarlyExitTransformer,
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
    lengths = jnp.where(runs, positions + 1, 0)

    # Eager: K and V that are due of resolved rows are projected beside those of the rows that run.
    due = here if step.waiting is not None else state.live & (step.filled == index)
    if step.waiting is None:
        beside = Missing(
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
        beside = Missing.nothing(model, rows.page_table)
    mine = slots_of(step.cache, page_table, positions, subset.take(due))
    theirs = kv_fill.slots_of_missing(step.cache, beside)
    slots = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), mine, theirs)
    all_positions = jnp.concatenate([positions, beside.positions])

    freq, cache = model.frequencies(), step.cache
    x = subset.take(step.x)
    before = middle = x
    for layer in blocks:

        def attend(q: Array, k: Array, v: Array, cache: PagedKVCache, layer: int = layer) -> tuple[Array, PagedKVCache]:
            cache = write(cache, layer, slots, k, v)
            return _attention(model, layer, q, cache, page_table, lengths), cache

        before = x
        out, middle, cache = model.blocks[layer](x, all_positions, freq, attend, cache, beside.x)
        # A frozen row's K and V came out of the projection above; the rest of what it computed is dropped.
        x = jnp.where(runs, out, x)
    behind = jnp.concatenate([x, beside.x], axis=1)
    cache = kv_fill.fill(model, model.exit_blocks(blocks.stop), behind, all_positions, cache, slots)
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
    return _test_exit(model, rows, state, step, index, subset, runs, before, x, middle)


def _test_exit(
    model: EarlyExitTransformer,
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
        lengths, page_table = jnp.where(asks, positions + 1, 0), subset.take_table(rows.page_table)

        def attend(q: Array, _k: Array, _v: Array, cache: PagedKVCache) -> tuple[Array, PagedKVCache]:
            # K and V have been written, for rows that do not ask as well; XLA leaves their second projection out.
            return _attention(model, own, q, cache, page_table, lengths), cache

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

    by_logits = exits.uses(some, exits.NEEDS_LOGITS)
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


def _settle(model: EarlyExitTransformer, rows: Rows, state: DecodeState, step: Step, resolved: Array) -> Step:
    """See to the K and V that resolved rows lack: eager, they are written, segment by segment; deferred, they wait."""
    done = len(model.config.segments)
    if step.waiting is not None:
        # Of rows that have ended nothing is read any more.
        waiting = replace(step.waiting, filled=jnp.where(state.live, step.waiting.filled, done))
        lacks = jnp.where(resolved, step.filled, done)
        waiting = kv_fill.enqueue(model, waiting, step.x, state.positions, lacks)
        step = replace(step, waiting=waiting, filled=jnp.where(resolved, done, step.filled))
        full = jnp.any(jnp.all(waiting.filled < done, axis=0))
        return run_if(full, lambda step: _flush(model, rows, step), step)
    for index in range(1, done):
        due = resolved & (step.filled == index)

        def write_missing(step: Step, index: int = index, due: Array = due) -> Step:
            missing = Missing(step.x, state.positions, rows.page_table, due)
            layers = kv_fill.cached_in(model, index)
            slots = kv_fill.slots_of_missing(step.cache, missing)
            return replace(
                step,
                cache=kv_fill.fill(model, layers, step.x, state.positions, step.cache, slots),
                filled=jnp.where(due, index + 1, step.filled),
            ).counting(fills=len(layers))

        step = run_if(jnp.any(due), write_missing, step)
    return step


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
    tied = config.exits.tie_output
    for layer in (config.n_layers,) if tied else config.exit_points:
        todo = resolved & ~step.scored
        todo = todo if tied else todo & (step.exit_at == layer)
        count = jnp.sum(todo)
        for below, size in zip((0, *plan.buckets), plan.buckets, strict=False):

            def project(step: Step, layer: int = layer, todo: Array = todo, size: int = size) -> Step:
                subset = RowSubset.of(todo, size)
                logits = model.logits(layer, subset.take(step.features))
                return replace(
                    step,
                    logits=subset.put(step.logits, logits, subset.take(todo)),
                    scored=step.scored | todo,
                ).counting(heads=1, row_heads=size)

            step = run_if((below < count) & (count <= size), project, step)
    return step
