"""The size of the paged KV cache (`pallas_kernels.PagedKVCache`) and its dtype.

Which pages a sequence owns is decided on the host (`eejax.schedule.page_allocator`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from eejax.core import CacheConfig, EngineOptions, ModelConfig
from pallas_kernels import PagedKVCache

CPU_CACHE_BYTES = 2**30
"""Default limit of the KV cache on CPU, where the free memory is not known."""
GPU_CACHE_SHARE = 0.8
"""Default limit of the KV cache on a GPU, as a share of the memory that is free after the weights are loaded."""


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
