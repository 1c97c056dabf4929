"""Hugging Face folders: Llama, Mistral, Qwen2 and Qwen3 models, converted tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from eejax.core import ModelConfig
from eejax.model.huggingface.config import read_config, read_json, to_huggingface, write_config
from eejax.model.huggingface.tensors import SINGLE_FILE, TensorFiles, nothing_in, open_folder, write_folder
from eejax.model.huggingface.weight_map import read_leaves, write_leaves
from eejax.model.param_tree import LazyArray, rebuild
from eejax.model.transformer import param_shapes

__all__ = [
    "SINGLE_FILE",
    "TensorFiles",
    "load_lazily",
    "load_model",
    "nothing_in",
    "read_config",
    "read_json",
    "to_huggingface",
    "write_config",
    "write_folder",
    "write_leaves",
]


def load_lazily(path: str | Path) -> tuple[ModelConfig, dict]:
    """The model of a Hugging Face folder; its parameters are a tree of `LazyArray` in the dtypes stored.

    Raises:
        CheckpointError: the model is not supported, or files or tensors are not as they must be; they are named.
    """
    folder = Path(path)
    config = read_config(folder)
    leaves = read_leaves(config, open_folder(folder), str(folder))
    return config, rebuild(param_shapes(config), leaves)


def load_model(path: str | Path, dtype: Any = jnp.float32) -> tuple[ModelConfig, dict]:
    """The same with parameters of `dtype` on the default device, as `eejax.model.init_params` returns them."""
    config, lazy = load_lazily(path)

    def on_device(leaf: LazyArray) -> jax.Array:
        return jax.device_put(leaf.read()).astype(dtype)

    return config, jax.tree.map(on_device, lazy)
