"""The operations a model is made of, each by the fastest implementation that takes its arguments.

This is the door: products of weights and what decoding needs of logits (`products.py`), K and V of hidden states
(`projection.py`), writes into the paged cache (`pages.py`), attention over it and KV fill-in (`api.py`), branches
(`control_flow.py`). `implementation.py` chooses between kernels for Hopper GPUs (`mosaic/`), kernels in C for CPUs
(`native/`), and XLA, which runs the specification. Imports jax only.
"""

from pallas_kernels.api import (
    check_page_ids,
    kv_fill,
    kv_fill_refusals,
    paged_attention,
    paged_attention_refusals,
    ragged_paged_attention,
)
from pallas_kernels.control_flow import branch_form, run_if
from pallas_kernels.disk_cache import cache_folder, processor
from pallas_kernels.implementation import Implementation, cuda_version, device_refusal, resolve
from pallas_kernels.native.huge_pages import use_huge_pages
from pallas_kernels.pages import PagedKVCache, Slots, slots_of, write
from pallas_kernels.products import Best, Norm, head, linear, rms_norm
from pallas_kernels.projection import ExitedTokens, KVProjection, Rotation, finish_keys_values, rope, rotation

__all__ = [
    "Best",
    "ExitedTokens",
    "Implementation",
    "KVProjection",
    "Norm",
    "PagedKVCache",
    "Rotation",
    "Slots",
    "branch_form",
    "cache_folder",
    "check_page_ids",
    "cuda_version",
    "device_refusal",
    "finish_keys_values",
    "head",
    "kv_fill",
    "kv_fill_refusals",
    "linear",
    "paged_attention",
    "paged_attention_refusals",
    "processor",
    "ragged_paged_attention",
    "resolve",
    "rms_norm",
    "rope",
    "rotation",
    "run_if",
    "slots_of",
    "use_huge_pages",
    "write",
]
