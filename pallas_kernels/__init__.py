"""Paged attention and KV fill-in. Imports jax only; `pallas_kernels.api` is the way in."""

from pallas_kernels.api import paged_attention, paged_prefill_attention

__all__ = ["paged_attention", "paged_prefill_attention"]
