"""Attention over the paged cache on a Hopper GPU: one query per row, as Pallas' Mosaic GPU backend compiles it.

A row's context is cut into pieces, and a piece's result does not depend on what else is in the batch. XLA lists the
pieces that exist, so an inactive row is no work at all. A fixed number of thread blocks (two on each multiprocessor, so
that one computes while the other waits for memory) share the list times the KV heads. For each entry a block

* fetches the queries of the head's group, which are some of the 64 rows of a tensor-core product (WGMMA); what the
  other rows hold never matters, since rows do not meet,
* has K and V of the piece brought into rings of shared memory by TMA, a tile of 64 slots each, several tiles ahead,
* attends to a tile at a time with an online softmax (Milakov and Gimelshein, arXiv 1805.02867) in float32 registers,
* writes the piece's result, and the logarithm of the sum of its weights.

XLA joins the pieces of a row by those sums (Flash-Decoding, Dao et al. 2023). The cache is never copied: the kernel is
given all of it.

Shapes use the alphabet of `pallas_kernels.api`, and G for the query heads of one KV head.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.implementation import Shaped
from pallas_kernels.pages import PagedKVCache
from pallas_kernels.reference import MASKED

TILE = 64
"""Slots of one step, and query rows of one product: WGMMA multiplies 64 rows at a time."""

PIECE_TILES = 8
"""Tiles of a piece at least. K and V of 512 slots are 512 / G times the bytes of the float32 result of the piece."""

MAX_PIECES = 16
"""Pieces of a row at most; those of a longer context are longer. XLA reads the room for all of them when it joins."""

MULTIPROCESSORS = 132
"""Of an H100 SXM or H200. With another number the work is the same, only shared out less evenly."""

SHARED_BYTES = 226 * 1024
"""Shared memory of a multiprocessor, less the 1 KB that CUDA keeps of it for each of two blocks."""

HEAD_DIMS = (64, 96, 128, 256)


def refusal(q: Float[Shaped, "B H C"], k_pages: Float[Shaped, "L P K S C"]) -> str | None:
    """Why this kernel does not take such arguments (anything with a shape and a dtype), or None if it does."""
    kv_heads, page_size, dim = k_pages.shape[2:]
    group = q.shape[1] // kv_heads
    if k_pages.dtype not in (jnp.bfloat16, jnp.float16):
        return f"pages must be bfloat16 or float16, which tensor cores multiply, got {k_pages.dtype}"
    if dim not in HEAD_DIMS:
        return f"the head dimension must be one of {', '.join(map(str, HEAD_DIMS))}, got {dim}"
    if page_size % TILE:
        return f"the page size must be a multiple of {TILE}, got {page_size}"
    if group > TILE:
        return f"at most {TILE} query heads may share a KV head, got {group}"
    return None


def paged_attention(
    q: Float[Array, "B H C"],
    cache: PagedKVCache,
    page_table: Int[Array, "B M"],
    lengths: Int[Array, " B"],
    *,
    layer: int,
    sliding_window: int | None = None,
) -> Float[Array, "B H C"]:
    """See `pallas_kernels.api.paged_attention`.

    How a row is cut into pieces depends on its length, M and the window, on no other row: a piece's result is the same
    to the bit in every batch. XLA joins them in float32.

    Raises:
        ValueError: `refusal` has a reason.
    """
    if reason := refusal(q, cache.k):
        raise ValueError(reason)
    rows, heads, dim = q.shape
    _, num_pages, kv_heads, page_size, _ = cache.k.shape
    room = page_table.shape[1] * page_size
    window = min(room, room if sliding_window is None else sliding_window)
    most_tiles = min(room // TILE, -(-(window - 1) // TILE) + 1)
    piece_tiles = max(PIECE_TILES, -(-most_tiles // MAX_PIECES))
    most_pieces = -(-most_tiles // piece_tiles)

    ends = jnp.minimum(lengths.astype(jnp.int32), room)  # after a row of the table comes another row's
    begins = jnp.maximum(ends - window, 0)
    tiles = _over(ends, TILE) - begins // TILE
    pieces = _over(tiles, piece_tiles)

    group = heads // kv_heads
    grouped = q.reshape(rows, kv_heads, group, dim).astype(cache.k.dtype)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, -group % 8), (0, 0)))  # 8 rows are a tile of shared memory
    heads_of_pages = (-1, page_size, dim)
    results, log_totals = _attend_to_pieces(
        *_work(pieces, most_pieces),
        begins,
        ends,
        page_table.astype(jnp.int32),
        grouped,
        cache.k.reshape(heads_of_pages),
        cache.v.reshape(heads_of_pages),
        jnp.full((1,), layer * num_pages * kv_heads, jnp.int32),
        group=group,
        most_pieces=most_pieces,
        piece_tiles=piece_tiles,
        log2_scale=dim**-0.5 * math.log2(math.e),
    )
    return _joined(results, log_totals, pieces, most_pieces).reshape(q.shape).astype(q.dtype)


def _over(numbers: Int[Array, " B"], divisor: int) -> Int[Array, " B"]:
    """Quotients, rounded up."""
    return (numbers + (divisor - 1)) // divisor


def _work(pieces: Int[Array, " B"], most_pieces: int) -> tuple[Int[Array, " W"], Int[Array, " 1"]]:
    """The pieces of all rows, each as `row * most_pieces + piece`, and how many there are; after them anything."""
    ends = jnp.cumsum(pieces)
    place = jnp.arange(len(pieces) * most_pieces)
    before = ends <= place[:, None]  # [W B]: rows all of whose pieces are listed before this place
    row = jnp.sum(before, axis=1, dtype=jnp.int32)
    first = jnp.max(jnp.where(before, ends, 0), axis=1)
    return row * most_pieces + place - first, ends[-1:]


def _joined(
    results: Float[Array, "W K G C"], log_totals: Float[Array, "W K 64"], pieces: Int[Array, " B"], most_pieces: int
) -> Float[Array, "B K G C"]:
    """The mean of each row's pieces by the sums of their weights (log2 of them); zeros where a row has no piece."""
    _, kv_heads, group, dim = results.shape
    results = results.reshape(-1, most_pieces, kv_heads, group, dim)
    log_totals = log_totals[..., :group].reshape(-1, most_pieces, kv_heads, group)
    written = (jnp.arange(most_pieces) < pieces[:, None])[:, :, None, None]  # nothing else was
    log_totals = jnp.where(written, log_totals, MASKED)
    shares = jnp.where(written, jnp.exp2(log_totals - jnp.max(log_totals, axis=1, keepdims=True)), 0.0)
    summed = jnp.sum(jnp.where(written[..., None], results, 0.0) * shares[..., None], axis=1)
    return summed / jnp.maximum(jnp.sum(shares, axis=1), jnp.finfo(jnp.float32).tiny)[..., None]


# A program holds one such kernel, however many blocks it has: which of them is data.
@functools.partial(jax.jit, static_argnames=("group", "most_pieces", "piece_tiles", "log2_scale"))
def _attend_to_pieces(
    work: Int[Array, " W"],
    count: Int[Array, " 1"],
    begins: Int[Array, " B"],
    ends: Int[Array, " B"],
    page_table: Int[Array, "B M"],
    q: Float[Array, "B K R C"],
    k_pages: Float[Array, "N S C"],
    v_pages: Float[Array, "N S C"],
    first_page: Int[Array, " 1"],
    *,
    group: int,
    most_pieces: int,
    piece_tiles: int,
    log2_scale: float,
) -> list[Array]:
    """Attention within each piece: its result [W, K, G, C], and log2 of the sum of its weights [W, K, 64].

    `begins` and `ends` bound the slots that a row sees. A page here is one KV head's: N is L times P times K.
    """
    _, kv_heads, query_rows, dim = q.shape
    dtype = k_pages.dtype
    page_tiles = k_pages.shape[1] // TILE
    # The widest swizzle that divides a row of K: 128 bytes, or 64 for heads of 96.
    swizzle = plgpu.find_swizzle(dim * dtype.itemsize * 8)
    columns = swizzle // dtype.itemsize
    part = min(dim, 128)  # columns of one product with V: sums and products of more do not fit into registers
    stages, per_multiprocessor = _occupancy(dim, dtype.itemsize, columns)
    blocks = min(per_multiprocessor * MULTIPROCESSORS, work.shape[0] * kv_heads)

    def body(
        work_ref,  # [W]
        count_ref,  # [1]
        begins_ref,  # [B]
        ends_ref,  # [B]
        table_ref,  # [B M]
        q_ref,  # [B K R C]
        k_ref,  # [N S C]
        v_ref,  # [N S C]
        first_page_ref,  # [1]
        results_ref,  # [W K G C]
        log_totals_ref,  # [W K 64]
        *,
        q_smem,  # [64 C]
        k_smem,  # [stages 64 C]
        v_smem,  # [stages 64 C]
        weights_smem,  # [64 64]
        result_smem,  # [64 columns]
        log_total_smem,  # [64]
        q_ready,
        k_ready,
        v_ready,
    ) -> None:
        block = lax.axis_index("block")

        def attend(turn: Array, carry: None) -> None:
            item = block + turn * blocks
            head = lax.rem(item, kv_heads)
            place = work_ref[lax.div(item, kv_heads)]
            row = lax.div(place, most_pieces)
            begin, end = begins_ref[row], ends_ref[row]
            first = lax.div(begin, TILE) + lax.rem(place, most_pieces) * piece_tiles
            tiles = jnp.minimum(piece_tiles, lax.div(end + (TILE - 1), TILE) - first)  # at least 1

            def page_of(tile: Array | int) -> Array:
                """Entries after those of the piece are not read."""
                entry = table_ref[row, lax.div(first + jnp.minimum(tile, tiles - 1), page_tiles)]
                return first_page_ref[0] + entry * kv_heads + head

            def fetch(pages_ref, smem, ready, tile: Array | int, page: Array) -> None:
                @pl.when(tile < tiles)
                def _() -> None:
                    slot = lax.rem(jnp.int32(tile), stages)
                    slots = pl.ds(lax.rem(first + tile, page_tiles) * TILE, TILE)
                    plgpu.copy_gmem_to_smem(pages_ref.at[page, slots], smem.at[slot], ready.at[slot])

            plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[pl.ds(0, query_rows)], q_ready)
            # A page's id is read a tile before the copy needs it, and is there by then.
            pages = [page_of(tile) for tile in range(stages + 1)]
            for tile, page in enumerate(pages[:stages]):
                fetch(k_ref, k_smem, k_ready, tile, page)
                fetch(v_ref, v_smem, v_ready, tile, page)
            plgpu.barrier_wait(q_ready)

            def step(
                tile: Array, carry: tuple[Array, Array, list[Array], Array]
            ) -> tuple[Array, Array, list[Array], Array]:
                top, total, sums, page = carry
                slot = lax.rem(tile, stages)
                start = (first + tile) * TILE

                plgpu.barrier_wait(k_ready.at[slot])
                scores = _product(q_smem, k_smem.at[slot].transpose((1, 0)))
                fetch(k_ref, k_smem, k_ready, tile + stages, page)
                scores = jnp.where(_within((TILE, TILE), 1, begin - start, end - start), scores * log2_scale, MASKED)
                new_top = jnp.maximum(top, jnp.max(scores, axis=1))
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
                weights_smem[...] = weights.astype(dtype)

                plgpu.barrier_wait(v_ready.at[slot])

                # Unseen slots can hold anything, even NaN, and 0 * NaN is NaN: zero the values as well.
                @pl.when((start < begin) | (start + TILE > end))
                def _() -> None:
                    values = plgpu.load(v_smem.at[slot], layout=plgpu.Layout.WGMMA)
                    seen = _within((TILE, dim), 0, begin - start, end - start)
                    v_smem[slot] = jnp.where(seen, values, jnp.zeros_like(values))

                plgpu.commit_smem()
                new_sums = []
                for index, old in enumerate(sums):
                    new = _product(weights_smem, v_smem.at[slot, :, pl.ds(index * part, part)])
                    new_sums.append(old * lax.broadcast_in_dim(shrink, old.shape, [0]) + new)
                fetch(v_ref, v_smem, v_ready, tile + stages, page)
                return new_top, total * shrink + jnp.sum(weights, axis=1), new_sums, page_of(tile + stages + 1)

            per_row = plgpu.Layout.WGMMA.reduce(1)
            start = (
                plgpu.layout_cast(jnp.full((TILE,), MASKED, jnp.float32), per_row),
                plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), per_row),
                [plgpu.layout_cast(jnp.zeros((TILE, part), jnp.float32), plgpu.Layout.WGMMA)] * (dim // part),
                pages[stages],
            )
            top, total, sums, _ = lax.fori_loop(0, tiles, step, start)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            log_total_smem[...] = top + jnp.log(total) * math.log2(math.e)
            for left in range(0, dim, columns):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                summed = sums[left // part][:, left % part : left % part + columns]
                result_smem[...] = summed / lax.broadcast_in_dim(total, summed.shape, [0])
                plgpu.commit_smem()
                into = results_ref.at[place, head, :, pl.ds(left, columns)]
                plgpu.copy_smem_to_gmem(result_smem.at[pl.ds(0, group)], into)
            plgpu.copy_smem_to_gmem(log_total_smem, log_totals_ref.at[place, head])

        lax.fori_loop(0, lax.div(count_ref[0] * kv_heads - block + (blocks - 1), blocks), attend, None)
        plgpu.wait_smem_to_gmem(0)

    # pyright takes both transforms for abstract classes, though jax makes them to be instantiated.
    tiled = (
        plgpu.TilingTransform((8, columns)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((work.shape[0], kv_heads, group, dim), jnp.float32),
            jax.ShapeDtypeStruct((work.shape[0], kv_heads, TILE), jnp.float32),
        ],
        scratch_types={
            "q_smem": plgpu.SMEM((TILE, dim), dtype, transforms=tiled),
            "k_smem": plgpu.SMEM((stages, TILE, dim), dtype, transforms=tiled),
            "v_smem": plgpu.SMEM((stages, TILE, dim), dtype, transforms=tiled),
            "weights_smem": plgpu.SMEM((TILE, TILE), dtype, transforms=tiled),
            "result_smem": plgpu.SMEM((TILE, columns), jnp.float32),
            "log_total_smem": plgpu.SMEM((TILE,), jnp.float32),
            "q_ready": plgpu.Barrier(),
            "k_ready": plgpu.Barrier(num_barriers=stages),
            "v_ready": plgpu.Barrier(num_barriers=stages),
        },
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(work, count, begins, ends, page_table, q, k_pages, v_pages, first_page)


def _product(a, b) -> Float[Array, "64 X"]:
    """The matrix product of two references to shared memory; both are free again when it returns."""

    def multiply(accumulator) -> Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TILE, b.shape[1]), jnp.float32))


def _within(shape: tuple[int, int], axis: int, begin: Array, end: Array) -> Array:
    """Whether the index along `axis` lies in `begin..end - 1`."""
    index = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    return (index >= begin) & (index < end)


def _occupancy(dim: int, itemsize: int, columns: int) -> tuple[int, int]:
    """Tiles of K and of V that a block holds, and blocks of a multiprocessor."""
    queries_and_weights, result = TILE * (dim + TILE) * itemsize, TILE * columns * 4
    others = queries_and_weights + result + 2048  # the sums' logarithms, barriers, alignment
    blocks = 2 if dim <= 128 else 1
    return (SHARED_BYTES // blocks - others) // (2 * TILE * dim * itemsize), blocks
