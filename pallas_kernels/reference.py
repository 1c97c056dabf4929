"""The specification, in plain jnp: what every implementation must compute, and what runs where no kernel does.

Pages are visited one after another with an online softmax, and only as many as the longest row has: neither memory
nor time depends on the size of the cache or the width of the page table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30
"""Score of a slot that must not be seen. Finite, so that a row without any visible slot stays free of NaN."""


def paged_attention(
    q: Float[Array, "B H C"],
    k_pages: Float[Array, "L P K S C"],
    v_pages: Float[Array, "L P K S C"],
    page_table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    *,
    layer: int,
    scale: float | None = None,
) -> Float[Array, "B H C"]:
    """See `pallas_kernels.api.paged_attention`."""
    return paged_prefill_attention(
        q[:, None], k_pages, v_pages, page_table, lengths[:, None] - 1, layer=layer, scale=scale
    )[:, 0]


def paged_prefill_attention(
    q: Float[Array, "B T H C"],
    k_pages: Float[Array, "L P K S C"],
    v_pages: Float[Array, "L P K S C"],
    page_table: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    *,
    layer: int,
    scale: float | None = None,
) -> Float[Array, "B T H C"]:
    """See `pallas_kernels.api.paged_prefill_attention`."""
    rows, length, heads, dim = q.shape
    kv_heads, page_size = k_pages.shape[2:4]
    grouped = q.reshape(rows, length, kv_heads, heads // kv_heads, dim)
    grouped = (jnp.moveaxis(grouped, 1, 3).astype(jnp.float32) * (dim**-0.5 if scale is None else scale)).astype(
        k_pages.dtype
    )  # [B K G T C]
    longest = jnp.max(positions, axis=1)  # [B], last visible position of the row

    def visit(page: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, summed = carry
        ids = page_table[:, page]
        k = k_pages.at[layer, ids].get(mode="promise_in_bounds")  # [B K S C]
        v = v_pages.at[layer, ids].get(mode="promise_in_bounds")
        slots = page * page_size + jnp.arange(page_size)
        # A slot nobody may see can hold anything, even NaN, and 0 * NaN is NaN: zero the values as well.
        v = jnp.where((slots <= longest[:, None])[:, None, :, None], v, jnp.zeros((), v.dtype))
        visible = slots <= positions[:, :, None]  # [B T S]
        scores = jnp.einsum("bkgtc,bksc->bkgts", grouped, k, preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, None, None], scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.where(visible[:, None, None], jnp.exp(scores - new_top[..., None]), 0.0)
        total = total * shrink + jnp.sum(weights, axis=-1)
        update = jnp.einsum("bkgts,bksc->bkgtc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new_top, total, summed * shrink[..., None] + update

    shape = (rows, kv_heads, heads // kv_heads, length)
    start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, dim)))
    used = jnp.max(longest) // page_size + 1  # -1 // S + 1 == 0 when nobody reads
    _, total, summed = jax.lax.fori_loop(0, used, visit, start)
    out = summed / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(rows, length, heads, dim).astype(q.dtype)
