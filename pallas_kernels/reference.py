"""The specification, in plain jnp: what every implementation must compute, and what runs where no kernel does.

Pages are visited one after another with an online softmax, as many as the row that sees most of them needs: neither
memory nor time depends on the size of the cache or the width of the page table, nor, with a sliding window, on how long
the rows are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.control_flow import run_if
from pallas_kernels.pages import PagedKVCache, slots_of, write
from pallas_kernels.projection import ExitedTokens, KVProjection, keys_values

MASKED = -1e30
"""Score of a slot that must not be seen. Finite, so that a row without any visible slot stays free of NaN."""


def paged_attention(
    q: Float[Array, "B H C"],
    cache: PagedKVCache,
    page_table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    *,
    layer: int,
    sliding_window: int | None = None,
) -> Float[Array, "B H C"]:
    """See `pallas_kernels.api.paged_attention`."""
    return paged_prefill_attention(
        q[:, None],
        cache,
        page_table,
        lengths[:, None] - 1,
        layer=layer,
        sliding_window=sliding_window,
    )[:, 0]


def paged_prefill_attention(
    q: Float[Array, "B T H C"],
    cache: PagedKVCache,
    page_table: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    *,
    layer: int,
    sliding_window: int | None = None,
) -> Float[Array, "B T H C"]:
    """Several queries a row: each sees its row's tokens up to its own position; one at position -1 reads nothing."""
    rows, length, heads, dim = q.shape
    kv_heads, page_size = cache.k.shape[2:4]
    grouped = q.reshape(rows, length, kv_heads, heads // kv_heads, dim)
    grouped = jnp.moveaxis(grouped, 1, 3).astype(jnp.float32) * dim**-0.5
    grouped = grouped.astype(cache.k.dtype)  # [B K G T C]
    longest = jnp.max(positions, axis=1)  # [B], last visible position of the row
    # Nothing has slid out of a window that holds all that a row has room for.
    if sliding_window is None or sliding_window >= page_table.shape[1] * page_size:
        windows = None
        trips = jnp.max(longest) // page_size + 1  # -1 // S + 1 == 0 when no row reads
    else:
        # Each row begins with the first page that one of its queries sees.
        earliest = jnp.min(jnp.where(positions < 0, longest[:, None], positions), axis=1)
        first = jnp.maximum(earliest - sliding_window + 1, 0) // page_size  # [B]
        windows = first, positions - sliding_window  # the last position that a query no longer sees
        trips = jnp.max(longest // page_size + 1 - first)

    def visit(page: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, summed = carry
        if windows is None:
            ids, slots = page_table[:, page], page * page_size + jnp.arange(page_size)  # [B], [S]
            visible = slots <= positions[:, :, None]  # [B T S]
            used = slots <= longest[:, None]  # [B S]
        else:
            first, before = windows
            place = (first + page)[:, None]  # [B 1]
            ids = jnp.take_along_axis(page_table, place, axis=1, mode="clip")[:, 0]
            slots = (place * page_size + jnp.arange(page_size))[:, None]  # [B 1 S]
            visible = (before[:, :, None] < slots) & (slots <= positions[:, :, None])
            used = jnp.any(visible, axis=1)
        k = cache.k.at[layer, ids].get(mode="promise_in_bounds")  # [B K S C]
        v = cache.v.at[layer, ids].get(mode="promise_in_bounds")
        # A slot that no query sees can hold anything, even NaN, and 0 * NaN is NaN: zero the values as well.
        v = jnp.where(used[:, None, :, None], v, jnp.zeros((), v.dtype))
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
    _, total, summed = jax.lax.fori_loop(0, trips, visit, start)
    out = summed / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(rows, length, heads, dim).astype(q.dtype)


def ragged_paged_attention(
    q: Float[Array, "N H C"],
    cache: PagedKVCache,
    page_table: Int[Array, "R M"],
    rows: Int[Array, " N"],
    positions: Int[Array, " N"],
    *,
    layer: int,
    sliding_window: int | None = None,
) -> Float[Array, "N H C"]:
    """See `pallas_kernels.api.ragged_paged_attention`."""
    options = {"layer": layer, "sliding_window": sliding_window}
    if page_table.shape[0] == 1:
        return paged_prefill_attention(q[None], cache, page_table, positions[None], **options)[0]
    return paged_attention(q, cache, page_table[rows], positions + 1, **options)


def kv_fill(
    tokens: ExitedTokens,
    blocks: Sequence[KVProjection],
    cache: PagedKVCache,
    *,
    layers: Sequence[int],
    freq: Float[Array, " C2"],
    starts: Sequence[int],
) -> PagedKVCache:
    """See `pallas_kernels.api.kv_fill`."""
    slots = slots_of(cache, tokens.page_table, tokens.positions)
    for start, end in itertools.pairwise((*starts, len(blocks))):
        lacks = tokens.from_block <= start

        def write_missing(cache: PagedKVCache, run: slice = slice(start, end), lacks: Array = lacks) -> PagedKVCache:
            where = slots.only(lacks, cache)
            for block, layer in zip(blocks[run], layers[run], strict=True):
                k, v = keys_values(block, tokens.x, tokens.positions, freq, lacks)
                cache = write(cache, layer, where, k, v)
            return cache

        cache = run_if(jnp.any(lacks), write_missing, cache)
    return cache
