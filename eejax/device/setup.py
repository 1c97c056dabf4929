"""What a model is served with on JAX's default device: kernels, dtype, and the size of the paged KV cache.

Which pages a sequence owns is decided on the host (`eejax.schedule.page_allocator`).
"""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from eejax.core import CacheConfig, ConfigError, EngineOptions, ModelConfig
from pallas_kernels import (
    KVProjection,
    PagedKVCache,
    branch_form,
    device_refusal,
    kv_fill_refusals,
    paged_attention_refusals,
    resolve,
)

CPU_CACHE_BYTES = 2**30
"""Default limit of the KV cache on CPU, where the free memory is not known."""
GPU_CACHE_SHARE = 0.8
"""Default limit of the KV cache on a GPU, as a share of the memory that is free after the weights are loaded."""


class KernelChoice(NamedTuple):
    """The implementation of one operation, and why this device's kernel does not take it; None if it does."""

    implementation: str
    refusal: str | None


def choose_kernels(model: ModelConfig, page_size: int, dtype: jnp.dtype) -> dict[str, KernelChoice]:
    """The implementations that `pallas_kernels` chooses for this model on JAX's default device, by operation.

    Raises:
        ConfigError: `EEJAX_KERNELS` or `EEJAX_BRANCHES` has an unknown value, or a kernel is demanded that does not
            take this model.
    """
    heads, size, dim = model.n_kv_heads, model.hidden_size, model.head_dim

    def shaped(*shape: int) -> jax.Array:
        return cast("jax.Array", jax.ShapeDtypeStruct(shape, dtype))

    pages = shaped(model.n_cached_blocks, 1, heads, page_size, dim)
    bias = shaped(2 * heads * dim) if model.attention_bias else None
    k_norm = shaped(dim) if model.qk_norm else None
    block = KVProjection(shaped(size), shaped(2 * heads * dim, size), bias, k_norm, model.norm_eps)
    refusals = {
        "paged_attention": paged_attention_refusals(shaped(1, model.n_heads, dim), pages),
        "kv_fill": kv_fill_refusals(shaped(size, 1), [block], pages),
    }
    # The kind of kernels that this device has; Mosaic's, for its refusal, where it has none.
    mine = "mosaic" if device_refusal("native") else "native"
    try:
        branch_form()
        return {
            name: KernelChoice(resolve("auto", found), device_refusal(mine) or found[mine]())
            for name, found in refusals.items()
        }
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
