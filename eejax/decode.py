"""The device loop: several decode steps of a batch in one call, block by block, with early exits.

A step takes every live row one token further. Blocks run segment by segment; after a segment the exit's test is put to
the rows that are still unresolved, and a row that passes is frozen: its hidden state stays as it is, and what the
blocks above write for it is their own K and V of that frozen state. Once every row is resolved the remaining segments
do only that (fill-in). `tests/reference.py` says the same without cache or batch. Every function here is pure.

XLA notes. A branch that may not run is a `while` of at most one trip (`run_if`): unlike `lax.cond` it keeps the cache
it carries in place. Blocks are unrolled, since a loop over stacked weights copies each block's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax import exits, sampling
from eejax.config import ModelConfig
from eejax.control_flow import run_if
from eejax.exits import ExitRows
from eejax.kv_cache import PagedKVCache, Slots, slots_of, write
from eejax.model import EarlyExitTransformer, bind
from eejax.params import MAX_LOGPROBS
from eejax.sampling import SamplingRows, TokenLogprobs
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
class ChunkOutput:
    """What X steps produced. `packed` is one array, so that the host fetches it in one copy; see `unpack`.

    Attributes:
        packed: tokens `[X, B]` (-1 where the row was not live), exit layers `[X, B]`, then steps, blocks and heads run.
        logprobs: leaves `[X, ...]`, meaningful only for rows that asked.
    """

    packed: Int[Array, " W"]
    logprobs: TokenLogprobs


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
        blocks, heads: blocks and vocabulary projections run so far in this chunk.
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


def decode_chunk(
    config: ModelConfig,
    max_steps: int,
    params: dict,
    cache: PagedKVCache,
    rows: Rows,
    state: DecodeState,
    n_steps: Int[Array, ""],
    yield_on_free: Bool[Array, ""],
) -> tuple[PagedKVCache, ChunkOutput]:
    """Run up to `n_steps` decode steps. Returns the cache and the tokens.

    A row stops at a stop token or at the end of its budget; the chunk ends early when no row is live, or when one
    stops and `yield_on_free`.

    Args:
        config: static; the model's shape and exits.
        max_steps: static; X, the height of the output. `n_steps` may be anything up to it.
        cache: donated. Every live row has pages for `n_steps` more tokens, or for its budget.
    """
    model = bind(config, params)
    count = state.tokens.shape[0]
    out_shape = (max_steps, count)
    zero = jnp.zeros((), jnp.int32)
    top_shape = (max_steps, MAX_LOGPROBS, count)
    no_logprobs = TokenLogprobs(
        jnp.zeros(out_shape),
        jnp.zeros(out_shape, jnp.int32),
        jnp.zeros(top_shape),
        jnp.zeros(top_shape, jnp.int32),
    )
    first = Step(
        cache=cache,
        x=jnp.zeros((config.hidden_size, count), model.embedding[...].dtype),
        resolved=~state.live,
        exit_at=jnp.zeros((count,), jnp.int32),
        features=jnp.zeros((config.hidden_size, count), model.embedding[...].dtype),
        logits=jnp.zeros((config.vocab_size, count), jnp.float32),
        scored=~state.live,
        blocks=zero,
        heads=zero,
    )

    def advance(carry: tuple) -> tuple:
        i, _, state, step, tokens_out, exits_out, logprobs_out = carry
        step = _run_blocks(model, rows, state, step)
        step = _score(model, state, step)
        tokens = _choose(rows, state, step.logits)

        wants = state.live & (rows.sampling.logprobs >= 0)

        def report(out: TokenLogprobs) -> TokenLogprobs:
            new = sampling.token_logprobs(step.logits, tokens)
            return jax.tree.map(lambda a, b: a.at[i].set(b), out, new)

        logprobs_out = run_if(jnp.any(wants), report, logprobs_out)
        tokens_out = tokens_out.at[i].set(jnp.where(state.live, tokens, -1))
        exits_out = exits_out.at[i].set(jnp.where(state.live, step.exit_at, 0))
        stopped = jnp.any(tokens[:, None] == rows.stop_ids, axis=1) | (state.budget <= 1)
        moved = state.live.astype(jnp.int32)
        freed = jnp.any(state.live & stopped)
        state = DecodeState(
            tokens=jnp.where(state.live, tokens, state.tokens),
            positions=state.positions + moved,
            generated=state.generated + moved,
            budget=state.budget - moved,
            live=state.live & ~stopped,
        )
        return i + 1, freed, state, step, tokens_out, exits_out, logprobs_out

    def goes_on(carry: tuple) -> Array:
        i, freed, state = carry[:3]
        return (i < n_steps) & jnp.any(state.live) & ~(freed & yield_on_free)

    start = (
        zero,
        jnp.zeros((), bool),
        state,
        first,
        jnp.full(out_shape, -1, jnp.int32),
        jnp.zeros(out_shape, jnp.int32),
        no_logprobs,
    )
    steps, _, _, step, tokens_out, exits_out, logprobs_out = jax.lax.while_loop(goes_on, advance, start)
    counters = jnp.stack([steps, step.blocks, step.heads])
    packed = jnp.concatenate([tokens_out.ravel(), exits_out.ravel(), counters])
    return step.cache, ChunkOutput(packed, logprobs_out)


def _run_blocks(model: EarlyExitTransformer, rows: Rows, state: DecodeState, step: Step) -> Step:
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

        def fill(step: Step, segment: range = segment) -> Step:
            return replace(step, cache=_fill(model, segment, step.x, state.positions, step.cache, slots))

        if index:
            step = run_if(done, fill, run_if(~done, run, step))
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
            o = paged_attention(jnp.moveaxis(q, -1, 0), cache.k, cache.v, rows.page_table, lengths, layer=layer)
            return jnp.moveaxis(o, 0, -1), cache

        out, middle, cache = model.blocks[layer](x, state.positions, freq, attend, cache)
        # A frozen row's K and V came out of the projection above; the rest of what it computed is dropped.
        x = jnp.where(step.resolved, x, out) if index else out
    step = replace(step, x=x, cache=cache, blocks=step.blocks + len(segment))
    depth = segment.stop
    if depth == model.config.n_layers:
        features = jnp.where(step.resolved, step.features, model.features(depth, x, middle))
        return replace(step, features=features, resolved=jnp.ones_like(step.resolved))

    asks = exits.may_leave(rows.exits, index) & ~step.resolved

    def test(step: Step) -> Step:
        return _test_exit(model, rows.exits, state, step, index, middle, asks)

    return run_if(jnp.any(asks), test, step)


def _test_exit(
    model: EarlyExitTransformer,
    rows: ExitRows,
    state: DecodeState,
    step: Step,
    index: int,
    middle: Float[Array, "D B"],
    asks: Bool[Array, " B"],
) -> Step:
    """Put exit `index`'s test to the rows that ask for it, and resolve those that pass."""
    layer = model.config.exits.layers[index]
    features = model.features(layer, step.x, middle)
    by_logits = exits.uses(rows, exits.NEEDS_LOGITS)
    limits = exits.thresholds_at(rows, index, state.generated)

    def leave(step: Step, seen: exits.Observation) -> tuple[Step, Array]:
        leaving = asks & (exits.confidence(rows, seen) >= limits)
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
        return leave(step, exits.Observation(uniform=exits.uniform_draw(rows, state.generated)))[0]

    step = run_if(jnp.any(asks & by_logits), with_head, step)
    return run_if(jnp.any(asks & ~by_logits), without_head, step)


def _fill(
    model: EarlyExitTransformer,
    layers: range,
    x: Float[Array, "D B"],
    positions: Int[Array, " B"],
    cache: PagedKVCache,
    slots: Slots,
) -> PagedKVCache:
    """Write the K and V that blocks which no row entered have for the frozen states."""
    freq = model.frequencies()
    for layer in layers:
        k, v = model.blocks[layer].keys_values(x, positions, freq)
        cache = write(cache, layer, slots, k, v)
    return cache


def _score(model: EarlyExitTransformer, state: DecodeState, step: Step) -> Step:
    """Logits of the rows that no exit test has scored, from the head of the exit where each one left."""
    config = model.config
    tied = config.exits.tie_output
    for layer in (config.n_layers,) if tied else config.exit_points:
        todo = state.live & ~step.scored
        todo = todo if tied else todo & (step.exit_at == layer)

        def score(step: Step, layer: int = layer, todo: Array = todo) -> Step:
            logits = model.logits(layer, step.features)
            return replace(
                step,
                logits=jnp.where(todo, logits, step.logits),
                scored=step.scored | todo,
                heads=step.heads + 1,
            )

        step = run_if(jnp.any(todo), score, step)
    return step


def _choose(rows: Rows, state: DecodeState, logits: Float[Array, "V B"]) -> Int[Array, " B"]:
    """The next token of each row; random numbers are drawn only when a row samples."""
    greedy = sampling.argmax(logits)

    def draw(_: Array) -> Array:
        return sampling.sample(logits, rows.sampling, exits.token_keys(rows.exits, state.generated))

    return run_if(jnp.any(state.live & (rows.sampling.temperature > 0)), draw, greedy)
