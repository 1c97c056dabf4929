"""Logits to tokens, with a random key per request and token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.core import MAX_LOGPROBS
from pallas_kernels import Best


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Per-row sampling parameters; see `SamplingParams`. A temperature of 0 is greedy, `top_k` of 0 keeps all."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    logprobs: Int[Array, " B"]

    @property
    def samples(self) -> Bool[Array, " B"]:
        """Rows that draw their tokens."""
        return self.temperature > 0

    @property
    def needs_logits(self) -> Bool[Array, " B"]:
        """Rows that need more than the largest logit."""
        return self.samples | (self.logprobs >= 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability and rank of the chosen token, and the likeliest `R = MAX_LOGPROBS` tokens in order.

    Places that a smaller vocabulary leaves empty hold id -1. Those of a chunk have an axis for its steps in front.
    """

    chosen: Float[Array, "... B"]
    rank: Int[Array, "... B"]
    top: Float[Array, "... R B"]
    top_ids: Int[Array, "... R B"]

    @classmethod
    def zeros(cls, *shape: int) -> TokenLogprobs:
        """Of rows that did not ask, `shape` being that of `chosen`."""
        top = (*shape[:-1], MAX_LOGPROBS, shape[-1])
        return cls(jnp.zeros(shape), jnp.zeros(shape, jnp.int32), jnp.zeros(top), jnp.zeros(top, jnp.int32))

    def at(self, step: int) -> TokenLogprobs:
        """Those of one step of a chunk."""
        return jax.tree.map(lambda leaf: leaf[step], self)


def _largest_with(accept: Callable[[Array], Array], rows: int) -> Float[Array, " B"]:
    """The largest float32 `c >= 0` in each row with `accept(c)`, which must hold for 0 and be monotone.

    Bisects over bit patterns, which order like the non-negative floats they encode: 31 passes give the exact value, so
    that no vocabulary is ever sorted.
    """

    def as_float(bits: Array) -> Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def narrow(i: Array, low: Array) -> Array:
        trial = low | (jnp.int32(1) << (30 - i))
        # Patterns above that of 1.0 exceed every probability.
        good = (trial <= jnp.int32(0x3F800000)) & accept(as_float(trial))
        return jnp.where(good, trial, low)

    return as_float(jax.lax.fori_loop(0, 31, narrow, jnp.zeros((rows,), jnp.int32)))


def keep_mask(probs: Float[Array, "V B"], rows: SamplingRows) -> Array:
    """Which tokens top-k, then top-p, then min-p leave to choose from. Tokens tied at a border all stay."""
    count = probs.shape[1]
    limit = jnp.where(rows.top_k > 0, rows.top_k, probs.shape[0])
    at_k = _largest_with(lambda c: jnp.sum(probs >= c, axis=0) >= limit, count)
    probs = jnp.where(probs >= at_k, probs, 0.0)
    mass = rows.top_p * jnp.sum(probs, axis=0)
    at_p = _largest_with(lambda c: jnp.sum(jnp.where(probs >= c, probs, 0.0), axis=0) >= mass, count)
    at_p = jnp.where(rows.top_p < 1, at_p, 0.0)
    top = jnp.max(probs, axis=0)
    return (probs >= jnp.maximum(at_p, rows.min_p * top)) & (probs > 0)


def sample(logits: Float[Array, "V B"], rows: SamplingRows, keys: Array) -> Int[Array, " B"]:
    """Draw one token per row by the Gumbel-max rule from the kept tokens; greedy rows take the likeliest."""
    greedy = rows.temperature <= 0
    scaled = (logits - jnp.max(logits, axis=0)) / jnp.where(greedy, 1.0, rows.temperature)
    kept = keep_mask(jax.nn.softmax(scaled, axis=0), rows)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[:1]), out_axes=1)(keys)
    noisy = jnp.where(kept, scaled + noise, -jnp.inf)
    return Best.of(jnp.where(greedy, logits, noisy)).token


def token_logprobs(logits: Float[Array, "V B"], tokens: Int[Array, " B"]) -> TokenLogprobs:
    """Natural log-probabilities under the untempered distribution."""
    logp = jax.nn.log_softmax(logits, axis=0)
    chosen = jnp.take_along_axis(logp, tokens[None], axis=0)[0]
    rank = jnp.sum(logp > chosen, axis=0, dtype=jnp.int32) + 1
    top, ids = jax.lax.top_k(logp.T, min(MAX_LOGPROBS, logits.shape[0]))
    pad = MAX_LOGPROBS - top.shape[1]
    top = jnp.pad(top, ((0, 0), (0, pad)), constant_values=-jnp.inf)
    return TokenLogprobs(chosen, rank, top.T, jnp.pad(ids, ((0, 0), (0, pad)), constant_values=-1).T)
