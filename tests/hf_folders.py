"""Hugging Face folders made without Transformers, from random parameters of `tests.cases`."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from eejax.core import ExitConfig, ModelConfig
from eejax.model.huggingface.config import to_huggingface
from eejax.model.huggingface.weight_map import write_leaves
from eejax.model.param_tree import LazyArray, leaves
from tests.cases import random_params, shape_config


def lazily(params: dict) -> dict:
    return jax.tree.map(lambda leaf: LazyArray(leaf.shape, leaf.dtype, lambda: np.asarray(leaf)), params)


def plain_config(shape: str = "gqa", **overrides) -> ModelConfig:
    """A named shape without exits."""
    return shape_config(shape, **{"exits": ExitConfig(), **overrides})


def tensors_of(config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """The tensors that Hugging Face's model of these parameters has."""
    return {name: leaf.read() for name, leaf in write_leaves(config, dict(leaves(lazily(params)))).items()}


def make_folder(
    folder: Path,
    config: ModelConfig | None = None,
    *,
    dtype: str = "float32",
    changes: dict | None = None,
    tensor_changes: dict | None = None,
    seed: int = 0,
) -> tuple[ModelConfig, dict]:
    """Write a folder with one safetensors file. A change to None takes an option or a tensor away."""
    config = plain_config() if config is None else config
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), random_params(config, seed))
    folder.mkdir(parents=True, exist_ok=True)
    values = {**to_huggingface(config), **(changes or {})}
    values = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {**tensors_of(config, params), **(tensor_changes or {})}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return config, params


def shard(folder: Path, count: int) -> dict[str, str]:
    """Turn the folder's single file into `count` files with an index; returns the index's map."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where
