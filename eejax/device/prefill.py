"""Prompt tokens into the cache, many at a time, and the first answer tokens out.

Tokens of several rows stand one behind another, so that every projection runs once for all of them; attention finds
each token's row through the page table. So it does not matter whether a row begins here or goes on, from a former chunk
or from pages that it shares.

The same function restores a preempted sequence: its answer tokens went only so deep, so each token brings the number
of blocks it ran, and is frozen above, exactly as decoding had done. Prompt tokens run at full depth. No exit is asked
here, so blocks that exits own only get their K and V.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.core import ModelConfig
from eejax.device import sampling
from eejax.device.decode_state import Rows
from eejax.device.exits import token_keys
from eejax.device.kv_fill import Tokens, fill
from eejax.device.sampling import TokenLogprobs
from eejax.model import bind
from pallas_kernels import PagedKVCache, ragged_paged_attention, run_if, write


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PrefillTokens:
    """T tokens of R rows, padding behind them.

    Attributes:
        ids: the tokens.
        rows: which row each belongs to.
        positions: theirs; -1 for padding. A row's ascend by one.
        depths: blocks each token runs; above, its hidden state is frozen.
        last: where each row's last token stands.
        wants_token: rows whose first answer token is to be chosen behind it.
    """

    ids: Int[Array, " T"]
    rows: Int[Array, " T"]
    positions: Int[Array, " T"]
    depths: Int[Array, " T"]
    last: Int[Array, " R"]
    wants_token: Bool[Array, " R"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Prefilled:
    """What prefill found out about R rows, beside their K and V.

    Attributes:
        tokens: the first answer tokens of rows that want one, anything for others.
        logprobs: of these, for rows that ask; zeros otherwise.
        hidden: what the last block put out for each row's last token, before the final norm.
    """

    tokens: Int[Array, " R"]
    logprobs: TokenLogprobs
    hidden: Float[Array, "D R"]


def prefill(
    config: ModelConfig, params: dict, cache: PagedKVCache, rows: Rows, tokens: PrefillTokens
) -> tuple[PagedKVCache, Prefilled]:
    """Write K and V of the tokens, whose predecessors are among them or in the cache already.

    Args:
        config: static; the model's shape.
        cache: donated.
        rows: R rows; those behind the ones in use are padding.
    """
    model = bind(config, params)
    page_table = rows.page_table[tokens.rows]
    valid = tokens.positions >= 0
    # Padding stands at position 0 where a position must exist.
    positions = jnp.maximum(tokens.positions, 0)
    turn = model.rotation(positions)
    x = model.embed(tokens.ids)
    slots = Tokens(x, positions, page_table, valid).slots(cache)
    middle = x
    for layer, block in enumerate(model.blocks):

        def attend(q: Array, k: Array, v: Array, cache: PagedKVCache, layer: int = layer) -> tuple[Array, PagedKVCache]:
            cache = write(cache, layer, slots, k, v)
            o = ragged_paged_attention(
                jnp.moveaxis(q, -1, 0),
                cache,
                rows.page_table,
                tokens.rows,
                tokens.positions,
                layer=layer,
                sliding_window=config.window_of(layer),
            )
            return jnp.moveaxis(o, 0, -1), cache

        out, middle, cache = block(x, turn, attend, cache)
        x = jnp.where(tokens.depths > layer, out, x)
        cache = fill(model, model.exit_blocks(layer + 1), Tokens(x, positions, page_table, valid), cache)

    x, middle = x[:, tokens.last], middle[:, tokens.last]
    count = x.shape[1]
    top = jnp.zeros((sampling.MAX_LOGPROBS, count))
    nothing = TokenLogprobs(jnp.zeros(count), jnp.zeros(count, jnp.int32), top, top.astype(jnp.int32))
    found = Prefilled(jnp.zeros(count, jnp.int32), nothing, x)
    features = model.features(config.n_layers, x, middle)
    wants, some = tokens.wants_token, rows.sampling

    def choose(found: Prefilled) -> Prefilled:
        best, _ = model.best(config.n_layers, features, active=wants, confidence=False)
        return replace(found, tokens=best.token)

    def draw(found: Prefilled) -> Prefilled:
        logits = model.logits(config.n_layers, features)
        keys = token_keys(rows.exits, jnp.zeros(count, jnp.int32))
        chosen = sampling.sample(logits, some, keys)

        def report(_: TokenLogprobs) -> TokenLogprobs:
            return sampling.token_logprobs(logits, chosen)

        logprobs = run_if(jnp.any(wants & (some.logprobs >= 0)), report, found.logprobs)
        return replace(found, tokens=chosen, logprobs=logprobs)

    special = jnp.any(wants & some.needs_logits)
    found = run_if(jnp.any(wants) & ~special, choose, found)
    found = run_if(special, draw, found)
    return cache, found
