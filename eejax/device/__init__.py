"""What runs on the device: prefill, the decode loop with its exits, sampling, the paged KV cache, compiled programs.

`Runner` is the way in: it owns parameters and cache and runs micro-batches. Everything that it compiles is a pure
function of explicit state.
"""

from __future__ import annotations

from eejax.device.programs import use_compilation_cache
from eejax.device.runner import Runner
from eejax.device.setup import choose_kernels, default_num_pages, init_cache, page_bytes, resolve_dtype

__all__ = [
    "Runner",
    "choose_kernels",
    "default_num_pages",
    "init_cache",
    "page_bytes",
    "resolve_dtype",
    "use_compilation_cache",
]
