"""One pass of a batch through the network, segment by segment, with early exits.

A row stands at a segment. After the segment the exit's test is put to it; if it passes, it is resolved: its hidden
state stays as it is, and what the blocks above write for it is their own K and V of that frozen state (`kv_fill`). If
not, it stands at the next segment. A segment runs for the rows that stand at it, and for nobody if there are none:
every array has a place for each row, and kernels leave out the places of rows that do not run (compaction). Rows may
also be held where they stand until more have gathered, while resolved ones go on to their next token (rebatching); when
nobody is held, a pass is a decode step.

A block that an exit owns gets its K and V of every token as well, and runs where it is asked. `tests/reference.py` says
the same without cache or batch. Every function here is pure.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.core import LOGIT_MEASURES
from eejax.device import exits, kv_fill
from eejax.device.decode_state import DecodeState, Plan, Rows, Step
from eejax.device.kv_fill import Tokens
from eejax.model import Block, EarlyExitTransformer
from pallas_kernels import PagedKVCache, Rotation, paged_attention, run_if, write


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
        exit_at=jnp.where(begins, config.n_layers, step.exit_at),
        scored=step.scored & ~begins,
    ).placed(
        segment=jnp.where(begins, 0, jnp.where(state.live, step.segment, done)),
        filled=jnp.where(begins, 0, step.filled),
        held=jnp.where(begins, 0, step.held + 1),
    )
    hurry = last | ~jnp.any(begins)
    turn = model.rotation(state.positions)
    for index in range(done):
        here = step.segment == index
        goes = jnp.any(here)
        if index and plan.asks.exits != "none":
            goes &= hurry | (jnp.sum(here) >= hold) | jnp.any(here & (step.held >= hold))

        def run(step: Step, index: int = index, here: Array = here) -> Step:
            return _run_segment(model, plan, rows, state, step, index, here, turn)

        step = run(step) if plan.straight else run_if(goes, run, step)
    resolved = state.live & (step.segment == done)
    if plan.asks.exits != "none":
        step = _settle(model, rows, state, step, resolved)
    return score(model, plan, rows, step, resolved), resolved


def _run_segment(
    model: EarlyExitTransformer,
    plan: Plan,
    rows: Rows,
    state: DecodeState,
    step: Step,
    index: int,
    here: Bool[Array, " B"],
    turn: Rotation,
) -> Step:
    """One segment for the rows that stand at it, `here`, and the exit test behind it."""
    config, blocks = model.config, model.config.segments[index]
    waiting = step.waiting
    # Eager: K and V that are due of resolved rows are projected beside those of the rows that run.
    due = here if waiting is not None else state.live & (step.filled == index)
    written = Tokens(step.x, state.positions, rows.page_table, due)
    beside, all_turn = None, turn
    if waiting is not None and index:
        others = kv_fill.waiting_for(waiting, index, rows.page_table, here)
        written, beside = written.followed_by(others), others.x
        all_turn = model.rotation(written.positions)
        filled = jnp.where((waiting.filled == index) & here, index + 1, waiting.filled)
        waiting = replace(waiting, filled=filled)
    slots = written.slots(step.cache)
    active = (here, written.valid) if plan.compacts else None

    cache, before = step.cache, step.x
    middle = x = before
    for layer in blocks:

        def attend(q: Array, k: Array, v: Array, cache: PagedKVCache, layer: int = layer) -> tuple[Array, PagedKVCache]:
            cache = write(cache, layer, slots, k, v)
            return _attention(model, layer, q, cache, rows.page_table, state.positions, here), cache

        before = x
        x, middle, cache = model.blocks[layer](x, all_turn, attend, cache, beside, active)
        if not plan.compacts:
            # A frozen row's K and V came out of the projection above; the rest of what it computed is dropped.
            x = jnp.where(here, x, before)
    if own := model.exit_blocks(blocks.stop):
        states = x if beside is None else jnp.concatenate([x, beside], axis=1)
        with jax.named_scope("fill"):
            cache = kv_fill.fill(model, own, replace(written, x=states), cache)
    step = replace(
        step,
        cache=cache,
        x=x,
        waiting=waiting,
    ).placed(
        segment=jnp.where(here, index + 1, step.segment),
        filled=jnp.where(due, index + 1, step.filled),
        held=jnp.where(here, 0, step.held),
    )
    step = step.counting(blocks_run=len(blocks), row_blocks=len(blocks) * plan.count(here))
    if blocks.stop == config.n_layers:
        features = model.features(blocks.stop, x, middle)
        return replace(step, features=jnp.where(here, features, step.features))
    if plan.asks.exits == "none":
        return step
    return _test_exit(model, plan, rows, state, step, index, here, turn, before, middle)


def _test_exit(
    model: EarlyExitTransformer,
    plan: Plan,
    rows: Rows,
    state: DecodeState,
    step: Step,
    index: int,
    runs: Bool[Array, " B"],
    turn: Rotation,
    before: Float[Array, "D B"],
    middle: Float[Array, "D B"],
) -> Step:
    """Put exit `index`'s test to the rows that ran and ask for it, and resolve those that pass.

    Args:
        before, middle: what entered the exit's block, which put out `step.x`, and its residual between the two halves.
    """
    config, x = model.config, step.x
    layer, done = config.exits.layers[index], len(config.segments)
    asks = exits.may_leave(rows.exits, index) & runs

    def passes(seen: exits.Observation) -> Array:
        return exits.confidence(rows.exits, seen) >= exits.thresholds_at(rows.exits, index, state.generated)

    def features_of(asking: Array) -> Array:
        def run_block(block: Block, x: Array) -> Array:
            (own,) = model.exit_blocks(layer)

            def attend(q: Array, _k: Array, _v: Array, cache: PagedKVCache) -> tuple[Array, PagedKVCache]:
                # K and V have been written, for rows that do not ask as well: nobody is to write them again.
                return _attention(model, own, q, cache, rows.page_table, state.positions, asking), cache

            active = (asking, jnp.zeros_like(asking)) if plan.compacts else None
            return block(x, turn, attend, step.cache, active=active)[0]

        return model.features(layer, x, middle, run_block, plan.computed(asking))

    def leave(step: Step, features: Array, leaving: Array) -> Step:
        return replace(
            step,
            features=jnp.where(leaving, features, step.features),
            exit_at=jnp.where(leaving, layer, step.exit_at),
        ).placed(segment=jnp.where(leaving, done, step.segment))

    def with_head(step: Step, asking: Array) -> Step:
        features = features_of(asking)
        if config.exits.probes:
            asking &= jax.nn.sigmoid(model.probe_logit(layer, features)) >= rows.exits.gates

        def ask(step: Step) -> Step:
            with jax.named_scope("heads"):
                best, logits = model.best(
                    layer,
                    features,
                    active=plan.computed(asking),
                    logits=step.logits,
                    wanted=asking & rows.sampling.needs_logits,
                )
            leaving = asking & passes(exits.Observation(best=best))
            # Whoever leaves here is scored by these very logits: no second projection.
            best = jax.tree.map(lambda new, old: jnp.where(leaving, new, old), best, step.best)
            step = replace(leave(step, features, leaving), best=best, logits=logits, scored=step.scored | leaving)
            return step.counting(heads_run=1, row_heads=plan.count(asking))

        return run_if(jnp.any(asking), ask, step) if config.exits.probes else ask(step)

    def without_head(step: Step, asking: Array) -> Step:
        features = features_of(asking)
        seen = exits.Observation(
            similarity=exits.similarity(before, x),
            probe=model.probe_logit(layer, features) if config.exits.probes else None,
            uniform=exits.uniform_draw(rows.exits, state.generated),
        )
        return leave(step, features, asking & passes(seen))

    with jax.named_scope("confidence"):
        if plan.asks.exits == "heads":
            return run_if(jnp.any(asks), lambda step: with_head(step, asks), step)
        by_logits = asks & exits.uses(rows.exits, LOGIT_MEASURES)
        step = run_if(jnp.any(by_logits), lambda step: with_head(step, by_logits), step)
        others = asks & ~by_logits
        return run_if(jnp.any(others), lambda step: without_head(step, others), step)


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
    o = paged_attention(q, cache, page_table, positions + 1, layer=layer, active=active, sliding_window=window)
    return jnp.moveaxis(o, 0, -1)


def _settle(model: EarlyExitTransformer, rows: Rows, state: DecodeState, step: Step, resolved: Array) -> Step:
    """See to the K and V that resolved rows lack: eager, they are written; deferred, they wait."""
    done = len(model.config.segments)
    lacks = jnp.where(resolved, step.filled, done)
    if step.waiting is not None:
        # Of rows that have ended nothing is read any more.
        waiting = replace(step.waiting, filled=jnp.where(state.live, step.waiting.filled, done))
        waiting = kv_fill.enqueue(model, waiting, step.x, state.positions, lacks)
        step = replace(step, waiting=waiting).placed(filled=jnp.where(resolved, done, step.filled))
        full = jnp.any(jnp.all(waiting.filled < done, axis=0))
        return run_if(full, lambda step: _flush(model, rows, step), step)
    tokens = Tokens(step.x, state.positions, rows.page_table, resolved)
    with jax.named_scope("fill"):
        cache, fills = kv_fill.fill_segments(model, tokens, lacks, step.cache)
    return replace(step, cache=cache).placed(filled=jnp.where(resolved, done, step.filled)).counting(fills=fills)


def finish(model: EarlyExitTransformer, rows: Rows, state: DecodeState, step: Step) -> Step:
    """The end of a chunk: nothing of a row that goes on is left waiting."""
    if step.waiting is None:
        return step
    filled = jnp.where(state.live, step.waiting.filled, len(model.config.segments))
    return _flush(model, rows, replace(step, waiting=replace(step.waiting, filled=filled)))


def _flush(model: EarlyExitTransformer, rows: Rows, step: Step) -> Step:
    """Write all K and V that wait."""
    assert step.waiting is not None
    with jax.named_scope("fill"):
        waiting, cache, fills = kv_fill.flush(model, step.waiting, rows.page_table, step.cache)
    return replace(step, waiting=waiting, cache=cache).counting(fills=fills)


def score(model: EarlyExitTransformer, plan: Plan, rows: Rows, step: Step, resolved: Bool[Array, " B"]) -> Step:
    """See to the logits of resolved rows that no exit test has scored: by the head of the exit where each one left."""
    config = model.config
    # Rows that exit by a head's logits have been scored at that exit.
    one_head = config.exits.tie_output or plan.asks.exits != "any"
    for layer in (config.n_layers,) if one_head else config.exit_points:
        todo = resolved & ~step.scored
        todo = todo if one_head else todo & (step.exit_at == layer)

        def project(step: Step, layer: int = layer, todo: Array = todo) -> Step:
            best, logits = model.best(
                layer,
                step.features,
                active=plan.computed(todo),
                logits=step.logits,
                wanted=todo & rows.sampling.needs_logits,
                confidence=False,
            )
            best = jax.tree.map(lambda new, old: jnp.where(todo, new, old), best, step.best)
            step = replace(step, best=best, logits=logits, scored=step.scored | todo)
            return step.counting(heads_run=1, row_heads=plan.count(todo))

        with jax.named_scope("heads"):
            step = project(step) if plan.straight else run_if(jnp.any(todo), project, step)
    return step
