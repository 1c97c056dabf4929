"""eejax: early-exit language models in JAX, with a paged KV cache and continuous batching."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from eejax.core import (
    CapacityError,
    CheckpointError,
    CompletionOutput,
    ConfigError,
    DecayingThreshold,
    EarlyExitParams,
    EejaxError,
    ExitCostWarning,
    InvalidRequestError,
    RequestOutput,
    SamplingParams,
    TokenizerError,
    set_xla_flags,
)

if TYPE_CHECKING:
    from eejax.serve import LLM, StreamDelta

__all__ = [
    "LLM",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "DecayingThreshold",
    "EarlyExitParams",
    "EejaxError",
    "ExitCostWarning",
    "InvalidRequestError",
    "RequestOutput",
    "SamplingParams",
    "StreamDelta",
    "TokenizerError",
]

set_xla_flags(os.environ)


def __getattr__(name: str) -> object:
    """Import what needs jax only when it is used, so that parameters and `--help` stay quick."""
    if name in ("LLM", "StreamDelta"):
        from eejax import serve

        return getattr(serve, name)
    raise AttributeError(f"module 'eejax' has no attribute {name!r}")
