"""Decoding: several passes of a batch in one call of the device.

A pass (`run_pass`) takes each row that is not held one token further, in this order:

1. *Enter*: rows whose last token is resolved embed their next one.
2. *Run segments*: the blocks between two exits, for the rows that have come to them; skipped where there are none.
3. *Test the exit* after each segment: rows whose confidence reaches their threshold exit. Their hidden state is frozen
   and they are resolved, as are rows that have run the last segment.
4. *Settle K and V*: blocks that an exited row did not run still need its K and V, their own projection of the frozen
   state.
5. *Score*: logits of resolved rows that no exit's test has scored.
6. *Sample* their next tokens (`decode_chunk`).

Every array has a place for each row, and kernels leave out the places of rows that do not run (compaction). Rows may be
held before a segment until more have gathered, while resolved ones go on to their next token (rebatching); when none is
held, a pass is a decode step. A block that an exit owns gets K and V of every token as well, and runs where the exit is
asked. `tests/reference.py` says the same without cache or batch. Every function here is pure.

XLA notes. Of more than eight operations that are ready at once, XLA on a CPU gives half to another thread, and one that
sleeps takes a tenth of a millisecond to wake. So the loop carries few arrays for each row, each made by one operation,
and what does not change within a pass is computed before its segments. A branch is `run_if`, which keeps the cache it
carries in place. Blocks are unrolled, since a loop over stacked weights copies each block's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.core import ModelConfig
from eejax.device import kv_fill, sampling
from eejax.device.decode_state import ChunkLimits, DecodeState, Pass, Plan, Rows, Step
from eejax.device.exits import ExitTest, token_keys
from eejax.device.kv_fill import Tokens
from eejax.device.sampling import TokenLogprobs
from eejax.model import bind
from pallas_kernels import PagedKVCache, Rotation, run_if


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class ChunkOutput:
    """What X steps produced. `packed` is one array, so that the host fetches it in one copy.

    Attributes:
        packed: tokens `[X, B]` (-1 where the pass gave the row none), exit layers `[X, B]` (0 there), then the counts.
        logprobs: leaves `[X, ...]`, meaningful only for rows that asked; None where the program is for greedy rows.
    """

    packed: Int[Array, " W"]
    logprobs: TokenLogprobs | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk after some passes; `freed`: a row stopped in the last one."""

    passes: Int[Array, ""]
    freed: Bool[Array, ""]
    state: DecodeState
    step: Step
    tokens: Int[Array, "X B"]
    exit_layers: Int[Array, "X B"]
    logprobs: TokenLogprobs | None


def decode_chunk(
    config: ModelConfig,
    max_steps: int,
    plan: Plan,
    params: dict,
    cache: PagedKVCache,
    rows: Rows,
    state: DecodeState,
    limits: ChunkLimits,
) -> tuple[PagedKVCache, ChunkOutput]:
    """Run up to `limits.n_steps` passes. Returns the cache and the tokens, at most one of each row and pass.

    A row stops at a stop token or at the end of its budget; the chunk ends early when no row is live, or when one
    stops and `yield_on_free`. Rows that are held then begin their token anew in the next chunk.

    Args:
        config: static; the model's shape and exits.
        max_steps: static; X, the height of the output, at least `n_steps`.
        plan: static; how segments are run.
        cache: donated. Every live row has pages for `n_steps` more tokens, or for its budget.
    """
    model = bind(config, params)
    shape = max_steps, state.tokens.shape[0]
    put = jax.lax.dynamic_update_index_in_dim

    def advance(chunk: _Chunk) -> _Chunk:
        ctx, i = Pass(model, plan, rows, chunk.state), chunk.passes
        step, resolved = run_pass(ctx, chunk.step, limits.hold, i + 1 >= limits.n_steps)
        chosen = _sample(ctx, step, resolved)
        logprobs = chunk.logprobs
        if logprobs is not None and step.logits is not None:
            wants = resolved & (rows.sampling.logprobs >= 0)
            logprobs = run_if(jnp.any(wants), partial(_report, i, step.logits, chosen), logprobs)
        tokens = put(chunk.tokens, jnp.where(resolved, chosen, -1), i, 0)
        exit_layers = put(chunk.exit_layers, jnp.where(resolved, step.exit_at, 0), i, 0)
        stopped = resolved & (jnp.any(chosen[:, None] == rows.stop_ids, axis=1) | (chunk.state.budget <= 1))
        state = chunk.state.after(chosen, resolved, stopped)
        step = step.counting(steps=1, row_steps=shape[1])
        return _Chunk(i + 1, jnp.any(stopped), state, step, tokens, exit_layers, logprobs)

    def goes_on(chunk: _Chunk) -> Bool[Array, ""]:
        return (chunk.passes < limits.n_steps) & jnp.any(chunk.state.live) & ~(chunk.freed & limits.yield_on_free)

    logprobs = TokenLogprobs.zeros(*shape) if plan.asks.choice == "any" else None
    start = _Chunk(
        passes=jnp.zeros((), jnp.int32),
        freed=jnp.zeros((), bool),
        state=state,
        step=Step.start(Pass(model, plan, rows, state), cache),
        tokens=jnp.full(shape, -1, jnp.int32),
        exit_layers=jnp.zeros(shape, jnp.int32),
        logprobs=logprobs,
    )
    end = jax.lax.while_loop(goes_on, advance, start)
    step = kv_fill.finish(Pass(model, plan, rows, end.state), end.step)
    packed = jnp.concatenate([end.tokens.ravel(), end.exit_layers.ravel(), step.counts])
    return step.cache, ChunkOutput(packed, end.logprobs)


def run_pass(ctx: Pass, step: Step, hold: Int[Array, ""], last: Bool[Array, ""]) -> tuple[Step, Bool[Array, " B"]]:
    """Take every live row one token further, or as far as it is not held.

    Args:
        hold: rows wait before a segment, except the first, until so many have come to it, or one has waited for so
            many passes. 1 holds none.
        last: hold no row in this pass.

    Returns:
        The rows, and which of them are resolved, scored, and have their K and V written or waiting.
    """
    model, plan, state = ctx.model, ctx.plan, ctx.state
    done = len(model.config.segments)
    begins = state.live & (step.segment == done)
    step = _enter(ctx, step, begins)
    hurry = last | ~jnp.any(begins)
    rotation = model.rotation(state.positions)
    for index in range(done):
        here = step.segment == index
        runs = jnp.any(here)
        if index and not plan.straight:
            runs &= hurry | (jnp.sum(here) >= hold) | jnp.any(here & (step.held >= hold))
        segment = partial(_run_segment, ctx, index, here, rotation)
        step = segment(step) if plan.straight else run_if(runs, segment, step)
    resolved = state.live & (step.segment == done)
    if not plan.straight:
        step = kv_fill.settle(ctx, step, resolved)
    return _score(ctx, step, resolved), resolved


def _enter(ctx: Pass, step: Step, begins: Bool[Array, " B"]) -> Step:
    """Embed the next token of the rows that begin one."""
    config, state = ctx.model.config, ctx.state
    return replace(
        step,
        x=jnp.where(begins, ctx.model.embed(state.tokens), step.x),
        exit_at=jnp.where(begins, config.n_layers, step.exit_at),
        scored=step.scored & ~begins,
    ).placed(
        segment=jnp.where(begins, 0, jnp.where(state.live, step.segment, len(config.segments))),
        filled=jnp.where(begins, 0, step.filled),
        held=jnp.where(begins, 0, step.held + 1),
    )


def _run_segment(ctx: Pass, index: int, here: Bool[Array, " B"], rotation: Rotation, step: Step) -> Step:
    """Run segment `index` for the rows that have come to it, `here`, and the exit test after it."""
    model, plan, state, waiting = ctx.model, ctx.plan, ctx.state, step.waiting
    config, blocks = model.config, model.config.segments[index]
    # Eager: K and V that resolved rows lack are projected beside those of the rows that run.
    due = here if waiting is not None else state.live & (step.filled == index)
    written = Tokens(step.x, state.positions, ctx.rows.page_table, due)
    beside, angles = None, rotation
    if waiting is not None and index:
        others = kv_fill.waiting_for(waiting, index, ctx.rows.page_table, here)
        written, beside = written.followed_by(others), others.x
        angles = model.rotation(written.positions)
        waiting = replace(waiting, filled=jnp.where((waiting.filled == index) & here, index + 1, waiting.filled))
    slots = written.slots(step.cache)
    active = (here, written.valid) if plan.compacts else None

    cache = step.cache
    middle = before = x = step.x
    for layer in blocks:
        before, attend = x, partial(ctx.attend, layer, here, slots)
        x, middle, cache = model.blocks[layer](x, angles, attend, cache, beside, active)
        if not plan.compacts:
            # A frozen row's K and V came out of the projection above; the rest of what it computed is dropped.
            x = jnp.where(here, x, before)
    if own := model.exit_blocks(blocks.stop):
        states = x if beside is None else jnp.concatenate([x, beside], axis=1)
        with jax.named_scope("fill"):
            cache = kv_fill.fill(model, own, replace(written, x=states), cache)
    step = replace(step, cache=cache, x=x, waiting=waiting).placed(
        segment=jnp.where(here, index + 1, step.segment),
        filled=jnp.where(due, index + 1, step.filled),
        held=jnp.where(here, 0, step.held),
    )
    step = step.counting(blocks_run=len(blocks), row_blocks=len(blocks) * plan.count(here))
    if blocks.stop == config.n_layers:
        features = model.features(blocks.stop, x, middle)
        return replace(step, features=jnp.where(here, features, step.features))
    return step if plan.straight else ExitTest(ctx, index, here, rotation, before, middle, x, cache).apply(step)


def _score(ctx: Pass, step: Step, resolved: Bool[Array, " B"]) -> Step:
    """Logits of the resolved rows that no exit's test has scored, by the head of the exit point each one came to."""
    plan, config = ctx.plan, ctx.model.config
    # Rows that exit by a head's logits have been scored at that exit.
    one_head = config.exits.tie_output or plan.asks.exits != "any"
    for layer in (config.n_layers,) if one_head else config.exit_points:
        todo = resolved & ~step.scored
        todo = todo if one_head else todo & (step.exit_at == layer)
        project = partial(_project, ctx, layer, todo)
        with jax.named_scope("heads"):
            step = project(step) if plan.straight else run_if(jnp.any(todo), project, step)
    return step


def _project(ctx: Pass, layer: int, todo: Bool[Array, " B"], step: Step) -> Step:
    """Score some rows by the output matrix of exit point `layer`."""
    best, logits = ctx.model.best(
        layer,
        step.features,
        active=ctx.plan.computed(todo),
        logits=step.logits,
        wanted=todo & ctx.rows.sampling.needs_logits,
        confidence=False,
    )
    best = jax.tree.map(partial(jnp.where, todo), best, step.best)
    step = replace(step, best=best, logits=logits, scored=step.scored | todo)
    return step.counting(heads_run=1, row_heads=ctx.plan.count(todo))


def _sample(ctx: Pass, step: Step, resolved: Bool[Array, " B"]) -> Int[Array, " B"]:
    """The next token of each resolved row; random numbers are drawn only when one of them samples."""
    if step.logits is None:
        return step.best.token
    with jax.named_scope("sampling"):
        return run_if(jnp.any(resolved & ctx.rows.sampling.samples), partial(_draw, ctx, step.logits), step.best.token)


def _draw(ctx: Pass, logits: Float[Array, "V B"], greedy: Int[Array, " B"]) -> Int[Array, " B"]:
    drawn = sampling.sample(logits, ctx.rows.sampling, token_keys(ctx.rows.exits, ctx.state.generated))
    return jnp.where(ctx.rows.sampling.samples, drawn, greedy)


def _report(
    i: Int[Array, ""], logits: Float[Array, "V B"], tokens: Int[Array, " B"], out: TokenLogprobs
) -> TokenLogprobs:
    """`out` with the log-probabilities of pass `i`."""
    new = sampling.token_logprobs(logits, tokens)
    return jax.tree.map(lambda old, one: old.at[i].set(one), out, new)
