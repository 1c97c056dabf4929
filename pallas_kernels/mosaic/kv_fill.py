"""KV fill-in on a Hopper GPU: K and V of tokens in all blocks that they did not run (Pallas, Mosaic GPU).

What bounds it is reading the weights, so everything is arranged around them. The work is cut into items: the rows of
one block's `wkv` that make the K or the V of one head, times up to 64 or 128 tokens. They are counted from the first
block that some token needs, since a token needs all blocks above its exit: blocks that nobody needs are no work. One
thread block runs on every multiprocessor, and the items are dealt out to them. In each, one warpgroup brings weights
and normalised states into a ring of shared memory by TMA, ahead of the product and across the ends of items; the
others, one for 64 tokens each, multiply (WGMMA, float32 sums) and write what comes out, biased, normed and rotated,
straight into the pages, token by token. XLA prepares what is small: normalised states, the rotary embedding's cosines
and sines, pages and slots.

Shapes use the alphabet of `pallas_kernels.api`, and I for the blocks of a launch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.implementation import Shaped
from pallas_kernels.pages import PagedKVCache, Slots, slots_of
from pallas_kernels.products import rms_norm
from pallas_kernels.projection import ExitedTokens, KVProjection

HEAD_DIMS = (64, 96, 128, 256)
TILE = 64
"""Tokens of a warpgroup: WGMMA multiplies 64 rows at a time."""

DEPTH = 64
"""Columns of the weights that a step multiplies: 128 bytes of a row, the widest swizzle of shared memory."""

BLOCKS = 28
"""Blocks of a launch at most. Each array that TMA moves has a descriptor of 128 bytes among the kernel's parameters,
and 4,096 bytes of those are what every driver takes."""

MULTIPROCESSORS = 132
"""Of an H100 SXM or H200. With another number the work is the same, only shared out less evenly."""

SHARED_BYTES = 222 * 1024
"""Shared memory for tiles: a thread block has 227 KiB, and barriers and alignment want some of it."""

MAX_STAGES = 12
"""Steps in flight at most: more bytes than it takes to keep the memory busy do not help."""


def refusal(x: Float[Shaped, "D N"], blocks: Sequence[KVProjection], k_pages: Float[Shaped, "L P K S C"]) -> str | None:
    """Why this kernel does not take such arguments (anything with shapes and dtypes), or None if it does."""
    dim, dtype = k_pages.shape[-1], k_pages.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"pages must be bfloat16 or float16, which tensor cores multiply, got {dtype}"
    for name, other in (("x", x.dtype), *((f"blocks[{i}].wkv", block.wkv.dtype) for i, block in enumerate(blocks))):
        if other != dtype:
            return f"{name} must have the pages' dtype, {dtype}, got {other}"
    if dim not in HEAD_DIMS:
        return f"the head dimension must be one of {', '.join(map(str, HEAD_DIMS))}, got {dim}"
    if x.shape[0] % DEPTH:
        return f"the hidden size must be a multiple of {DEPTH}, got {x.shape[0]}"
    kinds = {(block.bkv is None, block.k_norm is None, block.eps) for block in blocks}
    if len(kinds) > 1:
        return "all blocks must have a bias or none, a norm of the keys or none, and the same eps"
    return None


def kv_fill(
    tokens: ExitedTokens,
    blocks: Sequence[KVProjection],
    cache: PagedKVCache,
    *,
    layers: Sequence[int],
    freq: Float[Array, " C2"],
) -> PagedKVCache:
    """See `pallas_kernels.api.kv_fill`. In place wherever XLA may overwrite the pages.

    Raises:
        ValueError: `refusal` has a reason.
    """
    if reason := refusal(tokens.x, blocks, cache.k):
        raise ValueError(reason)
    count = tokens.x.shape[1]
    if not blocks or not count:
        return cache
    kv_heads, dim = cache.k.shape[2], cache.k.shape[4]
    # With heads of 256 the sums alone are 128 registers of a thread: too many beside a third warpgroup.
    tiling = _Tiling(count, kv_heads, dim, warpgroups=2 if count > TILE and dim <= 128 else 1)
    slots = slots_of(cache, tokens.page_table, tokens.positions)
    angle = _padded(tokens.positions.astype(jnp.float32), tiling.tiles * tiling.tile)[:, None] * freq
    refs = jax.new_ref(cache.k), jax.new_ref(cache.v)
    for start in range(0, len(blocks), BLOCKS):
        _launch(
            tiling,
            _padded(tokens.x.T, tiling.tiles * tiling.rows),
            blocks[start : start + BLOCKS],
            refs,
            jnp.stack([jnp.cos(angle), jnp.sin(angle)]),
            slots,
            tokens.from_block.astype(jnp.int32) - start,
            layers[start : start + BLOCKS],
        )
    return PagedKVCache(jax.freeze(refs[0]), jax.freeze(refs[1]))


def _padded(x: Array, size: int) -> Array:
    """With zeros at the end of the first axis, which becomes `size` long."""
    return jnp.pad(x, ((0, size - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


@dataclass(frozen=True, slots=True)
class _Tiling:
    """How the work on `count` tokens is cut: into `tiles` of `tile` tokens, `warpgroups` times 64."""

    count: int
    kv_heads: int
    dim: int
    warpgroups: int

    @property
    def tile(self) -> int:
        return self.warpgroups * TILE

    @property
    def tiles(self) -> int:
        return -(-self.count // self.tile)

    @property
    def items(self) -> int:
        """Items of work of a block."""
        return 2 * self.kv_heads * self.tiles

    @property
    def rows(self) -> int:
        """Rows of states fetched for a tile. Other rows of the product may be anything, and are not written."""
        return self.tile if self.tiles > 1 else -(-self.count // 8) * 8

    @property
    def out_columns(self) -> int:
        """Columns of the rows that the pages are written from, which TMA wants aligned to 128 bytes."""
        return -(-self.dim // 64) * 64

    @property
    def stages(self) -> int:
        tiles = SHARED_BYTES - 2 * self.tile * self.out_columns
        return min(tiles // (2 * DEPTH * (self.dim + self.tile)), MAX_STAGES)


def _launch(
    tiling: _Tiling,
    states: Float[Array, "R D"],
    blocks: Sequence[KVProjection],
    pages: tuple[jax.Ref, jax.Ref],
    rotation: Float[Array, "2 Q C2"],
    slots: Slots,
    from_block: Int[Array, " N"],
    layers: Sequence[int],
) -> None:
    """Fill in at most `BLOCKS` blocks."""
    dtype, eps = states.dtype, blocks[0].eps
    norms = jnp.stack([block.norm.astype(dtype) for block in blocks])
    normed = jax.vmap(lambda norm: rms_norm(norm, states, eps, axis=1))(norms)  # [I R D]
    biases = [block.bkv.astype(dtype) for block in blocks if block.bkv is not None]
    k_norms = [block.k_norm.astype(dtype) for block in blocks if block.k_norm is not None]
    # pyright takes both for abstract classes.
    tiled = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    thread_blocks = min(MULTIPROCESSORS, len(blocks) * tiling.items)
    plgpu.kernel(
        functools.partial(_kernel, tiling, thread_blocks, eps),
        scratch_types={
            "weights_smem": plgpu.SMEM((tiling.stages, tiling.dim, DEPTH), dtype, transforms=tiled),
            "normed_smem": plgpu.SMEM((tiling.stages, tiling.tile, DEPTH), dtype, transforms=tiled),
            "out_smem": plgpu.SMEM((tiling.warpgroups, TILE, tiling.out_columns), dtype),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
            "free": plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=tiling.stages),
        },
        grid=(thread_blocks,),
        grid_names=("thread_block",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="kv_fill",
    )(
        jnp.min(from_block, keepdims=True),
        from_block,
        # Together, since XLA runs a kernel for each array that it makes.
        jnp.concatenate(
            [jnp.asarray(layers, jnp.int32), *(ids.astype(jnp.int32) for ids in (slots.pages, slots.offsets))]
        ),
        normed,
        tuple(block.wkv for block in blocks),
        jnp.stack(biases) if biases else None,
        jnp.stack(k_norms) if k_norms else None,
        rotation,
        *pages,
    )


def _kernel(
    tiling: _Tiling,
    thread_blocks: int,
    eps: float,
    first_ref,  # [1]
    from_block_ref,  # [N]
    places_ref,  # [I+N+N]: cached blocks; tokens' pages; their slots within them
    normed_ref,  # [I R D]
    weights_refs,  # I of [2*K*C D]
    biases_ref,  # [I 2*K*C]
    k_norms_ref,  # [I C]
    rotation_ref,  # [2 Q C/2]
    k_pages_ref,  # [L P K S C]
    v_pages_ref,  # [L P K S C]
    *,
    weights_smem,  # [stages C DEPTH]
    normed_smem,  # [stages tile DEPTH]
    out_smem,  # [warpgroups TILE C or more]
    ready,  # [stages]
    free,  # [stages]
) -> None:
    dim, kv_heads, stages = tiling.dim, tiling.kv_heads, tiling.stages
    steps = normed_ref.shape[2] // DEPTH
    dtype = normed_ref.dtype
    warpgroup = lax.axis_index("warpgroup")
    blocks, count = len(weights_refs), tiling.count
    begin = jnp.clip(first_ref[0], 0, blocks) * tiling.items + lax.axis_index("thread_block")
    turns = lax.div(jnp.maximum(blocks * tiling.items - begin + thread_blocks - 1, 0), thread_blocks)

    def item(turn: Array) -> tuple[Array, Array, Array, Array]:
        """Block, K (0) or V (1), head and tile of tokens. Tiles are neighbours: weights come from memory for one."""
        index = begin + turn * thread_blocks
        index, tile = lax.div(index, tiling.tiles), lax.rem(index, tiling.tiles)
        index, head = lax.div(index, kv_heads), lax.rem(index, kv_heads)
        return lax.div(index, 2), lax.rem(index, 2), head, tile

    @pl.when(warpgroup == tiling.warpgroups)
    def _load() -> None:
        @pl.loop(0, turns)
        def _item(turn: Array) -> None:
            block, values, head, tile = item(turn)

            def fetch(weights_ref) -> None:
                @pl.loop(0, steps)
                def _step(step: Array) -> None:
                    done = turn * steps + step
                    slot = lax.rem(done, stages)
                    pl.when(done >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    columns = pl.ds(step * DEPTH, DEPTH)
                    rows = pl.ds((values * kv_heads + head) * dim, dim)
                    plgpu.copy_gmem_to_smem(weights_ref.at[rows, columns], weights_smem.at[slot], ready.at[slot])
                    tokens = pl.ds(tile * tiling.rows, tiling.rows)
                    normed = normed_smem.at[slot, pl.ds(0, tiling.rows)]
                    plgpu.copy_gmem_to_smem(normed_ref.at[block, tokens, columns], normed, ready.at[slot])

            lax.switch(block, [functools.partial(fetch, weights_ref) for weights_ref in weights_refs])

        # GPUs do not need this, but jax 0.11's interpreter wants every arrival awaited.
        @pl.loop(jnp.maximum(turns * steps - stages, 0), turns * steps)
        def _rest(done: Array) -> None:
            plgpu.barrier_wait(free.at[lax.rem(done, stages)])

    @pl.when(warpgroup < tiling.warpgroups)
    def _compute() -> None:
        out = out_smem.at[warpgroup]

        @pl.loop(0, turns)
        def _item(turn: Array) -> None:
            block, values, head, tile = item(turn)
            token = (tile * tiling.warpgroups + warpgroup) * TILE

            def product(sums) -> Array:
                @pl.loop(0, steps)
                def _step(step: Array) -> None:
                    slot = lax.rem(turn * steps + step, stages)
                    plgpu.barrier_wait(ready.at[slot])
                    mine = normed_smem.at[slot, pl.ds(warpgroup * TILE, TILE)]
                    plgpu.wgmma(sums, mine, weights_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[slot])

                return sums[...]

            def rounded(x: Array) -> Array:
                """As the specification keeps intermediate results."""
                return x.astype(dtype).astype(jnp.float32)

            def per_column(ref) -> Array:
                row = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                return lax.broadcast_in_dim(row.astype(jnp.float32), (TILE, dim), (1,))

            def write(pages_ref) -> None:
                plgpu.commit_smem()
                layer = places_ref[block]

                @pl.loop(0, jnp.clip(count - token, 0, TILE))
                def _token(row: Array) -> None:
                    @pl.when(from_block_ref[token + row] <= block)
                    def _() -> None:
                        page, slot = (places_ref[blocks + i * count + token + row] for i in range(2))
                        place = layer, page, head, slot
                        plgpu.copy_smem_to_gmem(out.at[row, pl.ds(0, dim)], pages_ref.at[place])

            y = rounded(pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TILE, dim), jnp.float32)))
            if biases_ref is not None:
                y = rounded(y + per_column(biases_ref.at[block, pl.ds((values * kv_heads + head) * dim, dim)]))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(values == 0)
            def _keys() -> None:
                k = y
                if k_norms_ref is not None:
                    scale = lax.rsqrt(jnp.sum(k * k, axis=1) / dim + eps)
                    k = rounded(k * lax.broadcast_in_dim(scale, k.shape, (0,)))
                    k = rounded(k * per_column(k_norms_ref.at[block]))
                cos, sin = (
                    plgpu.load(rotation_ref.at[i, pl.ds(token, TILE)], layout=plgpu.Layout.WGMMA, optimized=False)
                    for i in range(2)
                )
                first, second = k[:, : dim // 2], k[:, dim // 2 :]
                _store(out.at[:, pl.ds(0, dim // 2)], (first * cos - second * sin).astype(dtype))
                _store(out.at[:, pl.ds(dim // 2, dim // 2)], (second * cos + first * sin).astype(dtype))
                write(k_pages_ref)

            @pl.when(values == 1)
            def _values() -> None:
                _store(out.at[:, pl.ds(0, dim)], y.astype(dtype))
                write(v_pages_ref)

        plgpu.wait_smem_to_gmem(0)


def _store(ref, x: Array) -> None:
    """Into plain rows of shared memory, which conflict in its banks: once an item, which is too seldom to matter."""
    if hasattr(plgpu, "store"):  # jax 0.12, which refuses to do so unless told
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x
