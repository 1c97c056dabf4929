"""The network and its weights: Flax modules of an early-exit transformer, Orbax checkpoints, Hugging Face folders.

Parameters are a nested dict of arrays; `transformer.py` says how a block computes, not where keys and values are kept.
`weights.py` opens a checkpoint; what other formats and writing need is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from eejax.model.dense import attend_causal, exit_features
from eejax.model.lazy import load_lazily
from eejax.model.param_tree import LazyArray, compare, leaves, rebuild
from eejax.model.transformer import (
    INIT_SCALE,
    Block,
    EarlyExitTransformer,
    bind,
    count_params,
    init_params,
    param_shapes,
)
from eejax.model.weights import is_huggingface, load_checkpoint, load_config

if TYPE_CHECKING:
    from eejax.model.exit_heads import add_exits
    from eejax.model.orbax_tree import load_tree
    from eejax.model.weights_writer import check_target, save_checkpoint, save_tree, write_checkpoint

__all__ = [
    "INIT_SCALE",
    "Block",
    "EarlyExitTransformer",
    "LazyArray",
    "add_exits",
    "attend_causal",
    "bind",
    "check_target",
    "compare",
    "count_params",
    "exit_features",
    "init_params",
    "is_huggingface",
    "leaves",
    "load_checkpoint",
    "load_config",
    "load_lazily",
    "load_tree",
    "param_shapes",
    "rebuild",
    "save_checkpoint",
    "save_tree",
    "write_checkpoint",
]

_MODULES = {
    "add_exits": "exit_heads",
    "load_tree": "orbax_tree",
    "check_target": "weights_writer",
    "save_checkpoint": "weights_writer",
    "save_tree": "weights_writer",
    "write_checkpoint": "weights_writer",
}
"""Where names are defined that opening a model does not need."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
