"""The paged KV cache: a pytree of two arrays and pure functions over it.

Which page belongs to whom is the host's business (`eejax.schedule.page_allocator`); here a page is only an index.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eejax.core import CacheConfig, EngineOptions, ModelConfig
from pallas_kernels import pages
from pallas_kernels.pages import Slots

CPU_CACHE_BYTES = 2**30
"""Default limit of the KV cache on CPU, where the free memory is not known."""
GPU_CACHE_SHARE = 0.8
"""Default limit of the KV cache on a GPU, as a share of the memory that is free after the weights are loaded."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PagedKVCache:
    """Keys and values of all blocks that keep them (L of them, `ModelConfig.n_cached_blocks`), in pages.

    Donate it to the function that returns its successor.
    """

    k: Float[Array, "L P K S C"]
    v: Float[Array, "L P K S C"]


def init_cache(model: ModelConfig, cache: CacheConfig, dtype: jnp.dtype) -> PagedKVCache:
    """An empty cache (zeros)."""
    shape = (model.n_cached_blocks, cache.num_pages, model.n_kv_heads, cache.page_size, model.head_dim)
    return PagedKVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def page_bytes(model: ModelConfig, page_size: int, itemsize: int) -> int:
    """Bytes that one page takes over all blocks, K and V together."""
    return 2 * model.n_cached_blocks * model.n_kv_heads * page_size * model.head_dim * itemsize


def default_num_pages(model: ModelConfig, length: int, max_num_seqs: int, page_size: int, itemsize: int) -> int:
    """Pages for `max_num_seqs` sequences of `length` tokens, as far as memory allows, but at least for one sequence."""
    per_seq = -(-length // page_size)
    stats = jax.devices()[0].memory_stats() or {}
    free = GPU_CACHE_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]) if "bytes_limit" in stats else None
    affordable = int((CPU_CACHE_BYTES if free is None else free) // page_bytes(model, page_size, itemsize))
    return max(per_seq, min(per_seq * max_num_seqs, affordable))


def resolve_dtype(name: str | None) -> jnp.dtype:
    """The dtype called `name`; for None bfloat16 where it is fast, and float32 on CPU.

    XLA:CPU converts bfloat16 weights anew at every step.

    Raises:
        ConfigError: weights cannot be served in this dtype.
    """
    checked = EngineOptions(dtype=name).dtype
    return jnp.dtype(checked or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))


def slots_of(cache: PagedKVCache, page_table: Int[Array, "N M"], positions: Int[Array, " N"], valid: Array) -> Slots:
    """Slots of the tokens at `positions`, one row of the page table each; where not `valid`, writes are dropped."""
    num_pages, page_size = cache.k.shape[1], cache.k.shape[3]
    return pages.slots_of(page_table, positions, page_size).only(valid, num_pages)


def write(
    cache: PagedKVCache, layer: int, slots: Slots, k: Float[Array, "K C N"], v: Float[Array, "K C N"]
) -> PagedKVCache:
    """The cache with `k` and `v` of N tokens written into block `layer`'s pages; in place when donated."""
    return PagedKVCache(pages.write(cache.k, layer, slots, k), pages.write(cache.v, layer, slots, v))
