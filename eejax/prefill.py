"""Prompt tokens into the cache, many at a time, and the first answer token out.

The same function restores a preempted sequence: its answer tokens went only so deep, so each token brings the number
of blocks it ran, and is frozen above, exactly as decoding had done. Prompt tokens run at full depth. No exit is asked
here, so blocks that exits own only get their K and V.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax import sampling
from eejax.config import ModelConfig
from eejax.decode_state import Rows
from eejax.exits import token_keys
from eejax.kv_cache import PagedKVCache, slots_of, write
from eejax.kv_fill import Tokens, fill
from eejax.model import bind
from eejax.sampling import TokenLogprobs
from pallas_kernels import paged_prefill_attention
from pallas_kernels.control_flow import run_if


def prefill(
    config: ModelConfig,
    params: dict,
    cache: PagedKVCache,
    rows: Rows,
    tokens: Int[Array, " T"],
    depths: Int[Array, " T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
    wants_token: Bool[Array, ""],
) -> tuple[PagedKVCache, Int[Array, " 1"], TokenLogprobs, Float[Array, " D"]]:
    """Write K and V of one row's tokens `start .. start + length - 1`, whose predecessors are in the cache already.

    Args:
        config: static; the model's shape.
        cache: donated.
        rows: one row (B = 1).
        tokens: padded behind `length`.
        depths: blocks each token runs; above, its hidden state is frozen.
        wants_token: choose the row's first answer token from the last one's logits.

    Returns:
        The cache; the token (0 unless wanted); its log-probabilities (zeros unless the row asks for them); what the
        last block put out for the last token, before the final norm.
    """
    model = bind(config, params)
    count = tokens.shape[0]
    valid = jnp.arange(count) < length
    positions = start + jnp.arange(count)
    seen = jnp.where(valid, positions, -1)
    tables = jnp.broadcast_to(rows.page_table, (count, rows.page_table.shape[1]))
    slots = slots_of(cache, tables, positions, valid)
    freq = model.frequencies()
    x = model.embed(tokens)
    middle = x
    for layer, block in enumerate(model.blocks):

        def attend(q: Array, k: Array, v: Array, cache: PagedKVCache, layer: int = layer) -> tuple[Array, PagedKVCache]:
            cache = write(cache, layer, slots, k, v)
            q, window = jnp.moveaxis(q, -1, 0)[None], config.window_of(layer)
            o = paged_prefill_attention(
                q, cache.k, cache.v, rows.page_table, seen[None], layer=layer, sliding_window=window
            )
            return jnp.moveaxis(o[0], 0, -1), cache

        out, middle, cache = block(x, positions, freq, attend, cache)
        x = jnp.where(depths > layer, out, x)
        cache = fill(model, model.exit_blocks(layer + 1), Tokens(x, positions, tables, valid), cache)

    last = length - 1
    x, middle = (jax.lax.dynamic_slice_in_dim(a, last, 1, axis=1) for a in (x, middle))
    top = jnp.zeros((sampling.MAX_LOGPROBS, 1))
    no_logprobs = TokenLogprobs(jnp.zeros(1), jnp.zeros(1, jnp.int32), top, top.astype(jnp.int32))

    def choose(_: tuple[Array, TokenLogprobs]) -> tuple[Array, TokenLogprobs]:
        logits = model.logits(config.n_layers, model.features(config.n_layers, x, middle))

        def draw(_: Array) -> Array:
            return sampling.sample(logits, rows.sampling, token_keys(rows.exits, jnp.zeros(1, jnp.int32)))

        token = run_if(jnp.any(rows.sampling.temperature > 0), draw, sampling.argmax(logits))
        report = run_if(
            jnp.any(rows.sampling.logprobs >= 0), lambda _: sampling.token_logprobs(logits, token), no_logprobs
        )
        return token, report

    token, report = run_if(wants_token, choose, (jnp.zeros(1, jnp.int32), no_logprobs))
    return cache, token, report, x[:, 0]
