"""The one door to attention over the paged cache: checks arguments, then runs the XLA implementation.

Shapes use the alphabet of `eejax.model`: B rows, T tokens, H query heads, K key/value heads, C head dimension,
L blocks, P pages, S slots of a page; M is the width of a page table.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import reference


def paged_attention(
    q: Float[Array, "B H C"],
    k_pages: Float[Array, "L P K S C"],
    v_pages: Float[Array, "L P K S C"],
    page_table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    *,
    layer: int,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Float[Array, "B H C"]:
    """Attention of one query per row over the first `lengths` tokens of the row's pages.

    A row of length 0 reads nothing and yields zeros. Slots that a row does not see may hold anything, and entries of
    `page_table` behind its length any id.

    Args:
        layer: which block's pages to read.
        scale: factor of the scores, `C ** -0.5` when not given.
        sliding_window: see only this many of those tokens, the last ones (Mistral, arXiv 2310.06825); all when None.
            Pages that no row sees any more are not visited.

    Raises:
        ValueError: shapes or dtypes do not fit together, or `sliding_window` is below 1; the message names the
            argument.
    """
    _check(q, 3, k_pages, v_pages, page_table, lengths, layer, sliding_window)
    if lengths.shape != (q.shape[0],):
        raise ValueError(f"lengths must be [{q.shape[0]}], one per row of q, got {list(lengths.shape)}")
    return reference.paged_attention(
        q, k_pages, v_pages, page_table, lengths, layer=layer, scale=scale, sliding_window=sliding_window
    )


def paged_prefill_attention(
    q: Float[Array, "B T H C"],
    k_pages: Float[Array, "L P K S C"],
    v_pages: Float[Array, "L P K S C"],
    page_table: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    *,
    layer: int,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Float[Array, "B T H C"]:
    """Causal attention of several queries per row: each sees the row's tokens up to its own position.

    With a `sliding_window` it sees the last so many of them: a query at position p sees `p - sliding_window < s <= p`.
    A query at position -1 (padding) reads nothing and yields zeros.

    Raises:
        ValueError: shapes or dtypes do not fit together, or `sliding_window` is below 1; the message names the
            argument.
    """
    _check(q, 4, k_pages, v_pages, page_table, positions, layer, sliding_window)
    if positions.shape != q.shape[:2]:
        raise ValueError(f"positions must be {list(q.shape[:2])}, one per query, got {list(positions.shape)}")
    return reference.paged_prefill_attention(
        q, k_pages, v_pages, page_table, positions, layer=layer, scale=scale, sliding_window=sliding_window
    )


def _check(
    q: Array,
    rank: int,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    visible: Array,
    layer: int,
    sliding_window: int | None,
) -> None:
    if q.ndim != rank:
        raise ValueError(f"q must have {rank} dimensions, got {list(q.shape)}")
    for name, ids in (("page_table", page_table), ("lengths or positions", visible)):
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {ids.dtype}")
    if k_pages.ndim != 5 or k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            "k_pages and v_pages must be alike and [L, P, K, S, C], got "
            f"{k_pages.dtype}{list(k_pages.shape)} and {v_pages.dtype}{list(v_pages.shape)}"
        )
    layers, _, kv_heads, _, dim = k_pages.shape
    if q.shape[-1] != dim or q.shape[-2] % kv_heads:
        raise ValueError(
            f"q has {q.shape[-2]} heads of {q.shape[-1]}, the pages {kv_heads} of {dim}: the head dimension must be "
            "equal and the query heads a multiple"
        )
    if page_table.ndim != 2 or page_table.shape[0] != q.shape[0]:
        raise ValueError(f"page_table must be [{q.shape[0]}, M], one row per row of q, got {list(page_table.shape)}")
    if not 0 <= layer < layers:
        raise ValueError(f"layer must lie in 0..{layers - 1}, got {layer}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, or None for no window, got {sliding_window}")
