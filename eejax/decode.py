"""The device loop: several decode steps of a batch in one call. A step takes every live row one token further.

XLA notes. A branch that may not run is a `while` of at most one trip (`run_if`): unlike `lax.cond` it keeps the cache
it carries in place. Blocks are unrolled, since a loop over stacked weights copies each block's weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax import exits, sampling
from eejax.config import ModelConfig
from eejax.control_flow import run_if
from eejax.kv_cache import PagedKVCache
from eejax.model import bind
from eejax.params import MAX_LOGPROBS
from eejax.sampling import TokenLogprobs
from eejax.step import DecodeState, Rows, Step, run_blocks, score


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class ChunkOutput:
    """What X steps produced. `packed` is one array, so that the host fetches it in one copy.

    Attributes:
        packed: tokens `[X, B]` (-1 where the row was not live), exit layers `[X, B]`, then steps, blocks and heads run.
        logprobs: leaves `[X, ...]`, meaningful only for rows that asked.
    """

    packed: Int[Array, " W"]
    logprobs: TokenLogprobs


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
        step = run_blocks(model, rows, state, step)
        step = score(model, state, step)
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


def _choose(rows: Rows, state: DecodeState, logits: Float[Array, "V B"]) -> Int[Array, " B"]:
    """The next token of each row; random numbers are drawn only when a row samples."""
    greedy = sampling.argmax(logits)

    def draw(_: Array) -> Array:
        return sampling.sample(logits, rows.sampling, exits.token_keys(rows.exits, state.generated))

    return run_if(jnp.any(state.live & (rows.sampling.temperature > 0)), draw, greedy)
