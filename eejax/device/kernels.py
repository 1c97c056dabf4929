"""Which kernels a model is served with, and why not others."""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from eejax.core import ConfigError, ModelConfig
from pallas_kernels import (
    KVProjection,
    branch_form,
    device_refusal,
    kv_fill_refusals,
    paged_attention_refusals,
    resolve,
)


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
