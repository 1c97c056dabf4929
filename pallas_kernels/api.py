"""The door to attention over the paged cache and to KV fill-in: checks arguments and picks the implementation.

Shapes use the alphabet of `eejax.model`: B rows, T tokens of a row, N tokens of any rows, D hidden size, H query heads,
K key/value heads, C head dimension, L blocks, P pages, S slots of a page; M is the width of a page table.

`implementation` is `mosaic` (kernels for Hopper GPUs), `native` (kernels for CPUs), `xla` (every device) or `auto`, see
`pallas_kernels.implementation.resolve`. All compute the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import reference
from pallas_kernels.implementation import Implementation, Refusals, Shaped, resolve
from pallas_kernels.native import ops as native
from pallas_kernels.pages import PagedKVCache
from pallas_kernels.projection import ExitedTokens, KVProjection


def paged_attention(
    q: Float[Array, "B H C"],
    cache: PagedKVCache,
    page_table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    *,
    layer: int,
    active: Bool[Array, " B"] | None = None,
    sliding_window: int | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B H C"]:
    """Attention of one query per row over the first `lengths` tokens of the row's pages.

    A row of length 0 reads nothing and yields zeros. Slots that a row does not see may hold anything, and entries of
    `page_table` after its length any id.

    Args:
        layer: which block's pages to read.
        active: rows that take part, all when None; the others count as rows of length 0.
        sliding_window: see only this many of those tokens, the last ones (Mistral, arXiv 2310.06825); all when None.
            Pages that no row sees any more are not visited.

    Raises:
        ValueError: shapes or dtypes do not fit together, or `sliding_window` is below 1: the message names the
            argument. Or `implementation` is unknown, or refuses these arguments: the message says why.
    """
    _check(q, cache, page_table, lengths, layer, sliding_window)
    rows = q.shape[:1]
    if lengths.shape != rows:
        raise ValueError(f"lengths must be {list(rows)}, one per row of q, got {list(lengths.shape)}")
    if active is not None:
        if active.shape != rows or active.dtype != bool:
            raise ValueError(f"active must be bool{list(rows)}, got {active.dtype}{list(active.shape)}")
        lengths = jnp.where(active, lengths, jnp.zeros((), lengths.dtype))
    options = {"layer": layer, "sliding_window": sliding_window}
    chosen = resolve(implementation, paged_attention_refusals(q, cache.k))
    if chosen == "mosaic":
        from pallas_kernels.mosaic import paged_attention as mosaic

        return mosaic.paged_attention(q, cache, page_table, lengths, **options)
    if chosen == "native":
        return native.attention(q, cache.k, cache.v, page_table, None, lengths - 1, **options)
    return reference.paged_attention(q, cache, page_table, lengths, **options)


def paged_attention_refusals(q: Float[Shaped, "B H C"], k_pages: Float[Shaped, "L P K S C"]) -> Refusals:
    """Why kernels do not take a call of `paged_attention`. Shapes and dtypes are enough."""

    def by_mosaic() -> str | None:
        from pallas_kernels.mosaic import paged_attention as mosaic

        return mosaic.refusal(q, k_pages)

    return {"mosaic": by_mosaic, "native": lambda: native.attention_refusal(q, k_pages)}


def ragged_paged_attention(
    q: Float[Array, "N H C"],
    cache: PagedKVCache,
    page_table: Int[Array, "R M"],
    rows: Int[Array, " N"],
    positions: Int[Array, " N"],
    *,
    layer: int,
    sliding_window: int | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "N H C"]:
    """Causal attention of N tokens of R rows: each sees its row's tokens up to its own position.

    A token at position -1 (padding) reads nothing and yields zeros. On a GPU XLA computes it: quickly for one row, by
    gathering the pages of every token by itself for several.

    Args:
        rows: each token's row of the page table; fastest where tokens of a row are neighbours.
        sliding_window: as in `paged_attention`: a token at position p sees `p - sliding_window < s <= p`.

    Raises:
        ValueError: as `paged_attention`.
    """
    _check(q, cache, page_table, positions, layer, sliding_window, per_row=False)
    _check_integers(rows=rows)
    for name, array in (("rows", rows), ("positions", positions)):
        if array.shape != q.shape[:1]:
            raise ValueError(f"{name} must be {list(q.shape[:1])}, one per token of q, got {list(array.shape)}")
    options = {"layer": layer, "sliding_window": sliding_window}
    if resolve(implementation, {"native": lambda: native.attention_refusal(q, cache.k)}) == "native":
        return native.attention(q, cache.k, cache.v, page_table, rows, positions, **options)
    return reference.ragged_paged_attention(q, cache, page_table, rows, positions, **options)


def kv_fill(
    tokens: ExitedTokens,
    blocks: Sequence[KVProjection],
    cache: PagedKVCache,
    *,
    layers: Sequence[int],
    freq: Float[Array, " C2"],
    starts: Sequence[int] | None = None,
    implementation: Implementation = "auto",
) -> PagedKVCache:
    """Write the K and V that tokens have in blocks they did not run (CALM, arXiv 2207.07061, sec. 3.1).

    Token n's state `x[:, n]` goes through norm, projection and rotary embedding of every block from
    `blocks[from_block[n]]` on, and the result into slot `positions[n] % S` of page `page_table[n, positions[n] // S]`.
    Weights of a block that no token needs are not read. No two tokens that are written may share a slot.

    Args:
        cache: donate it: it is updated in place then.
        layers: the cached block that each of `blocks` writes.
        freq: angular frequencies of the rotary embedding, radians per position.
        starts: values that `from_block` may have besides `len(blocks)`, ascending from 0; any when None. Fewer make a
            smaller program.

    Returns:
        The cache; what is not written is as it was, to the bit.

    Raises:
        ValueError: shapes or dtypes do not fit together: the message names the argument. Or `implementation` is
            unknown, or refuses these arguments: the message says why.
    """
    _check_pages(cache)
    starts = range(len(blocks)) if starts is None else starts
    _check_fill(tokens, blocks, cache, layers, freq, starts)
    if not blocks:
        return cache
    if resolve(implementation, kv_fill_refusals(tokens.x, blocks, cache.k)) == "mosaic":
        from pallas_kernels.mosaic import kv_fill as mosaic

        return mosaic.kv_fill(tokens, blocks, cache, layers=layers, freq=freq)
    return reference.kv_fill(tokens, blocks, cache, layers=layers, freq=freq, starts=starts)


def kv_fill_refusals(
    x: Float[Shaped, "D N"], blocks: Sequence[KVProjection], k_pages: Float[Shaped, "L P K S C"]
) -> Refusals:
    """Why kernels do not take a call of `kv_fill`. Shapes and dtypes are enough.

    `native` is the specification over products that the native kernel computes.
    """

    def by_mosaic() -> str | None:
        from pallas_kernels.mosaic import kv_fill as mosaic

        return mosaic.refusal(x, blocks, k_pages)

    return {"mosaic": by_mosaic, "native": lambda: native.linear_refusal(blocks[0].wkv, x)}


def check_page_ids(page_table: np.ndarray, num_pages: int) -> None:
    """Refuse a page table with ids out of range, on the host, where tables are made: programs do not check.

    Raises:
        ValueError: names the first such entry.
    """
    wrong = np.argwhere((page_table < 0) | (page_table >= num_pages))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"page_table[{row}, {column}] is {page_table[row, column]}; the cache has pages 0..{num_pages - 1}"
        )


def _check(
    q: Array,
    cache: PagedKVCache,
    page_table: Array,
    visible: Array,
    layer: int,
    sliding_window: int | None,
    per_row: bool = True,
) -> None:
    if q.ndim != 3:
        raise ValueError(f"q must have 3 dimensions, got {list(q.shape)}")
    _check_integers(page_table=page_table, lengths_or_positions=visible)
    _check_pages(cache)
    layers, _, kv_heads, _, dim = cache.k.shape
    if q.shape[-1] != dim or q.shape[-2] % kv_heads:
        raise ValueError(
            f"q has {q.shape[-2]} heads of {q.shape[-1]}, the pages {kv_heads} of {dim}: the head dimension must be "
            "equal and the query heads a multiple"
        )
    if page_table.ndim != 2 or (per_row and page_table.shape[0] != q.shape[0]):
        rows = q.shape[0] if per_row else "R"
        raise ValueError(f"page_table must be [{rows}, M], one row per row of q, got {list(page_table.shape)}")
    if not 0 <= layer < layers:
        raise ValueError(f"layer must lie in 0..{layers - 1}, got {layer}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, or None for no window, got {sliding_window}")


def _check_integers(**arrays: Array) -> None:
    for name, ids in arrays.items():
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name.replace('_or_', ' or ')} must be integers, got {ids.dtype}")


def _check_pages(cache: PagedKVCache) -> None:
    k, v = cache.k, cache.v
    if k.ndim != 5 or k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(
            "cache.k and cache.v must be alike and [L, P, K, S, C], got "
            f"{k.dtype}{list(k.shape)} and {v.dtype}{list(v.shape)}"
        )


def _check_fill(
    tokens: ExitedTokens,
    blocks: Sequence[KVProjection],
    cache: PagedKVCache,
    layers: Sequence[int],
    freq: Array,
    starts: Sequence[int],
) -> None:
    if tokens.x.ndim != 2:
        raise ValueError(f"x must be [D, N], got {list(tokens.x.shape)}")
    positions, page_table, from_block = tokens.positions, tokens.page_table, tokens.from_block
    _check_integers(page_table=page_table, positions=positions, from_block=from_block)
    size, count = tokens.x.shape
    cached, _, kv_heads, _, dim = cache.k.shape
    if page_table.ndim != 2 or page_table.shape[0] != count:
        raise ValueError(f"page_table must be [{count}, M], one row per token of x, got {list(page_table.shape)}")
    for name, array, shape in (
        ("positions", positions, [count]),
        ("from_block", from_block, [count]),
        ("freq", freq, [dim // 2]),
    ):
        if list(array.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(array.shape)}")
    if len(layers) != len(blocks) or len(set(layers)) != len(layers):
        raise ValueError(f"layers must name a cached block of its own for each of {len(blocks)} blocks, got {layers}")
    for layer in layers:
        if not 0 <= layer < cached:
            raise ValueError(f"layers must lie in 0..{cached - 1}, got {layer}")
    if blocks and list(starts) != sorted({0, *starts} & set(range(len(blocks)))):
        raise ValueError(f"starts must ascend from 0 and lie below {len(blocks)}, got {list(starts)}")
    rows = 2 * kv_heads * dim
    expected = {"norm": [size], "wkv": [rows, size], "bkv": [rows], "k_norm": [dim]}
    for index, block in enumerate(blocks):
        for name, shape in expected.items():
            weight = getattr(block, name)
            if weight is not None and list(weight.shape) != shape:
                raise ValueError(f"blocks[{index}].{name} must be {shape}, got {list(weight.shape)}")
