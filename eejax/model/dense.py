"""The network over whole rows, without a cache: causal attention within each row."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from eejax.model.transformer import Block, EarlyExitTransformer


def exit_features(
    model: EarlyExitTransformer, tokens: Int[Array, "B T"], dtype: jnp.dtype | None = None, remat: bool = False
) -> dict[int, Float[Array, "D B T"]]:
    """Full-depth causal forward over whole rows, without a cache: features at every exit point, for training.

    Args:
        tokens: rows that start at position 0; padding comes after the text.
        dtype: dtype of the residual stream; the embedding's own when not given.
        remat: recompute each block in the backward pass instead of keeping its activations.
    """
    x = model.embed(tokens)
    x = x if dtype is None else x.astype(dtype)
    turn = model.rotation(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    found: dict[int, Array] = {}

    def run(block: Block, x: Array, window: int | None) -> tuple[Array, Array]:
        attend = functools.partial(attend_causal, window=window)
        out, middle, _ = block(x, turn, attend, None)
        return out, middle

    step = nnx.remat(run, static_argnums=2) if remat else run
    for number, block in enumerate(model.blocks, start=1):
        x, middle = step(block, x, model.config.window_of(number - 1))
        if number in model.config.exit_points:
            found[number] = model.features(number, x, middle, lambda block, x: step(block, x, None)[0])
    return found


def attend_causal(q: Array, k: Array, v: Array, cache: None, *, window: int | None) -> tuple[Array, None]:
    """Causal attention within each row and window: `q [H, C, B, T]`, `k, v [K, C, B, T]`; softmax in float32."""
    heads, dim, rows, length = q.shape
    q = q.reshape(k.shape[0], heads // k.shape[0], dim, rows, length)
    scores = jnp.einsum("kgcbt,kcbs->bkgts", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    seen = jnp.tril(jnp.ones((length, length), bool))
    if window is not None:
        seen = jnp.triu(seen, 1 - window)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
    o = jnp.einsum("bkgts,kcbs->kgcbt", weights, v, preferred_element_type=jnp.float32)
    return o.reshape(heads, dim, rows, length).astype(q.dtype), cache
