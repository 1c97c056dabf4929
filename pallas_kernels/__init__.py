"""Paged attention and KV fill-in. Imports jax only; `pallas_kernels.api` is the way in."""

from pallas_kernels.api import kv_fill, paged_attention, ragged_paged_attention
from pallas_kernels.projection import KVProjection

__all__ = ["KVProjection", "kv_fill", "paged_attention", "ragged_paged_attention"]
