"""The device loop: several passes of a batch in one call. A pass takes live rows that are not held one token further.

XLA notes. Of more than eight operations that are ready at once, XLA on a CPU gives half to another thread, and one that
sleeps takes a tenth of a millisecond to wake. So what the loop carries of each row is in few arrays, each made anew by
one operation, and what does not change within a pass is computed ahead of its segments. A branch that may not run is
`run_if`, which keeps the cache it carries in place. Blocks are unrolled, since a loop over stacked weights copies each
block's weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from eejax.core import MAX_LOGPROBS, ModelConfig
from eejax.device import exits, sampling
from eejax.device.decode_state import DecodeState, Plan, Rows, Step, begin
from eejax.device.sampling import TokenLogprobs
from eejax.device.step import finish, run_pass
from eejax.model import bind
from pallas_kernels import PagedKVCache, run_if


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


def decode_chunk(
    config: ModelConfig,
    max_steps: int,
    plan: Plan,
    params: dict,
    cache: PagedKVCache,
    rows: Rows,
    state: DecodeState,
    n_steps: Int[Array, ""],
    hold: Int[Array, ""],
    yield_on_free: Bool[Array, ""],
) -> tuple[PagedKVCache, ChunkOutput]:
    """Run up to `n_steps` passes. Returns the cache and the tokens, at most one of each row and pass.

    A row stops at a stop token or at the end of its budget; the chunk ends early when no row is live, or when one
    stops and `yield_on_free`. What was held then begins its token anew in the next chunk.

    Args:
        config: static; the model's shape and exits.
        max_steps: static; X, the height of the output. `n_steps` may be anything up to it.
        plan: static; how segments are run.
        cache: donated. Every live row has pages for `n_steps` more tokens, or for its budget.
        hold: see `run_pass`; 1 gives every row a token in every pass.
    """
    model = bind(config, params)
    count = state.tokens.shape[0]
    out_shape = (max_steps, count)
    no_logprobs = _no_logprobs(max_steps, count) if plan.asks.choice == "any" else None
    put = jax.lax.dynamic_update_index_in_dim

    def advance(carry: tuple) -> tuple:
        i, _, state, step, tokens_out, exits_out, logprobs_out = carry
        step, resolved = run_pass(model, plan, rows, state, step, hold, i + 1 >= n_steps)
        tokens = _choose(rows, state, step, resolved)
        if logprobs_out is not None and step.logits is not None:
            wants, logits = resolved & (rows.sampling.logprobs >= 0), step.logits

            def report(out: TokenLogprobs) -> TokenLogprobs:
                new = sampling.token_logprobs(logits, tokens)
                return jax.tree.map(lambda a, b: a.at[i].set(b), out, new)

            logprobs_out = run_if(jnp.any(wants), report, logprobs_out)
        tokens_out = put(tokens_out, jnp.where(resolved, tokens, -1), i, 0)
        exits_out = put(exits_out, jnp.where(resolved, step.exit_at, 0), i, 0)
        stopped = resolved & (jnp.any(tokens[:, None] == rows.stop_ids, axis=1) | (state.budget <= 1))
        state = state.after(tokens, resolved, stopped)
        step = step.counting(steps=1, row_steps=count)
        return i + 1, jnp.any(stopped), state, step, tokens_out, exits_out, logprobs_out

    def goes_on(carry: tuple) -> Array:
        i, freed, state = carry[:3]
        return (i < n_steps) & jnp.any(state.live) & ~(freed & yield_on_free)

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((), bool),
        state,
        begin(model, plan, cache, count),
        jnp.full(out_shape, -1, jnp.int32),
        jnp.zeros(out_shape, jnp.int32),
        no_logprobs,
    )
    _, _, state, step, tokens_out, exits_out, logprobs_out = jax.lax.while_loop(goes_on, advance, start)
    step = finish(model, rows, state, step)
    packed = jnp.concatenate([tokens_out.ravel(), exits_out.ravel(), step.counts])
    return step.cache, ChunkOutput(packed, logprobs_out)


def _no_logprobs(max_steps: int, count: int) -> TokenLogprobs:
    steps, top = (max_steps, count), (max_steps, MAX_LOGPROBS, count)
    return TokenLogprobs(jnp.zeros(steps), jnp.zeros(steps, jnp.int32), jnp.zeros(top), jnp.zeros(top, jnp.int32))


def _choose(rows: Rows, state: DecodeState, step: Step, resolved: Bool[Array, " B"]) -> Int[Array, " B"]:
    """The next token of each resolved row; random numbers are drawn only when one of them samples."""
    if (logits := step.logits) is None:
        return step.best.token

    def draw(greedy: Array) -> Array:
        drawn = sampling.sample(logits, rows.sampling, exits.token_keys(rows.exits, state.generated))
        return jnp.where(rows.sampling.samples, drawn, greedy)

    with jax.named_scope("sampling"):
        return run_if(jnp.any(resolved & rows.sampling.samples), draw, step.best.token)
