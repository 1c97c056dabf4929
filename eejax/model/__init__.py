"""The network and its weights: Flax modules of an early-exit transformer, Orbax checkpoints, Hugging Face folders.

Parameters are a nested dict of arrays; `transformer.py` says how a block computes, not where keys and values are kept.
"""

from __future__ import annotations

from eejax.model.exit_heads import add_exits
from eejax.model.huggingface.config import read_config, read_json, to_huggingface, write_config
from eejax.model.huggingface.tensors import SINGLE_FILE, TensorFiles, nothing_in, write_folder
from eejax.model.huggingface.weight_map import write_leaves
from eejax.model.orbax_tree import load_tree, save_tree
from eejax.model.param_tree import LazyArray, compare, leaves, rebuild
from eejax.model.transformer import (
    INIT_SCALE,
    Block,
    EarlyExitTransformer,
    attend_causal,
    bind,
    count_params,
    init_params,
    param_shapes,
)
from eejax.model.weights import (
    check_target,
    load_checkpoint,
    load_config,
    load_lazily,
    replacing_folder,
    write_checkpoint,
)

__all__ = [
    "INIT_SCALE",
    "SINGLE_FILE",
    "Block",
    "EarlyExitTransformer",
    "LazyArray",
    "TensorFiles",
    "add_exits",
    "attend_causal",
    "bind",
    "check_target",
    "compare",
    "count_params",
    "init_params",
    "leaves",
    "load_checkpoint",
    "load_config",
    "load_lazily",
    "load_tree",
    "nothing_in",
    "param_shapes",
    "read_config",
    "read_json",
    "rebuild",
    "replacing_folder",
    "save_tree",
    "to_huggingface",
    "write_checkpoint",
    "write_config",
    "write_folder",
    "write_leaves",
]
