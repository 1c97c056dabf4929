"""Prompt tokens into the cache, many at a time, and the first answer tokens out.

Tokens of several rows lie one after another, so that every projection runs once for all of them; attention finds each
token's row through the page table. So it does not matter whether a row begins here or goes on, from a former chunk or
from pages that it shares.

The same function restores a preempted sequence: its answer tokens had exited, so each token comes with the number of
blocks it ran, and is frozen after them, exactly as in decoding. Prompt tokens run at full depth. No exit is tested
here, so blocks that exits own only get their K and V.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.core import ModelConfig
from eejax.device import sampling
from eejax.device.decode_state import Rows
from eejax.device.exits import token_keys
from eejax.device.kv_fill import Tokens, fill
from eejax.device.sampling import TokenLogprobs
from eejax.model import EarlyExitTransformer, bind
from pallas_kernels import PagedKVCache, ragged_paged_attention, run_if, write


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PrefillTokens:
    """T tokens of R rows, then padding.

    Attributes:
        ids: the tokens.
        rows: which row each belongs to.
        positions: theirs; -1 for padding. A row's ascend by one.
        depths: blocks that each token runs; after them, its hidden state is frozen.
        last: index of each row's last token.
        wants_token: rows whose first answer token is to be chosen after it.
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
    """What prefill found for R rows, besides their K and V.

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
        rows: R rows, those in use first, then padding.
    """
    model = bind(config, params)
    page_table = rows.page_table[tokens.rows]
    valid = tokens.positions >= 0
    # Padding has position 0 where a position must exist.
    positions = jnp.maximum(tokens.positions, 0)
    angles = model.rotation(positions)
    x = model.embed(tokens.ids)
    slots = Tokens(x, positions, page_table, valid).slots(cache)

    def attend(layer: int, q: Array, k: Array, v: Array, cache: PagedKVCache) -> tuple[Array, PagedKVCache]:
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

    middle = x
    for layer, block in enumerate(model.blocks):
        out, middle, cache = block(x, angles, partial(attend, layer), cache)
        x = jnp.where(tokens.depths > layer, out, x)
        cache = fill(model, model.exit_blocks(layer + 1), Tokens(x, positions, page_table, valid), cache)

    x, middle = x[:, tokens.last], middle[:, tokens.last]
    count = x.shape[1]
    found = Prefilled(jnp.zeros(count, jnp.int32), TokenLogprobs.zeros(count), x)
    features = model.features(config.n_layers, x, middle)
    wants = tokens.wants_token
    special = jnp.any(wants & rows.sampling.needs_logits)
    found = run_if(jnp.any(wants) & ~special, partial(_choose, model, wants, features), found)
    found = run_if(special, partial(_draw, model, rows, wants, features), found)
    return cache, found


def _choose(
    model: EarlyExitTransformer, wants: Bool[Array, " R"], features: Float[Array, "D R"], found: Prefilled
) -> Prefilled:
    """The likeliest tokens."""
    best, _ = model.best(model.config.n_layers, features, active=wants, confidence=False)
    return replace(found, tokens=best.token)


def _draw(
    model: EarlyExitTransformer,
    rows: Rows,
    wants: Bool[Array, " R"],
    features: Float[Array, "D R"],
    found: Prefilled,
) -> Prefilled:
    """Tokens where one of the rows samples or wants log-probabilities."""
    logits = model.logits(model.config.n_layers, features)
    keys = token_keys(rows.exits, jnp.zeros(wants.shape, jnp.int32))
    chosen = sampling.sample(logits, rows.sampling, keys)

    def report(_: TokenLogprobs) -> TokenLogprobs:
        return sampling.token_logprobs(logits, chosen)

    logprobs = run_if(jnp.any(wants & (rows.sampling.logprobs >= 0)), report, found.logprobs)
    return replace(found, tokens=chosen, logprobs=logprobs)
