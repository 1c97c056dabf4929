"""Exits for a model that has none, initialised so that at first each equals the `shared` head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from eejax.core import ExitConfig, ModelConfig, require
from eejax.model.param_tree import LazyArray, leaves, rebuild
from eejax.model.transformer import param_shapes


def add_exits(config: ModelConfig, params: dict, exits: ExitConfig) -> tuple[ModelConfig, dict]:
    """The model with `exits` in place of those it had.

    An exit's norm begins as the final norm, its MLP as the exit block's own, its output matrix as the LM head, its
    probe at zero (a confidence of one half).

    Args:
        params: nested dict of arrays or `LazyArray`; the new leaves are the same objects, not copies.
        exits: of kind `shared`, `norm` or `mlp`, with a norm.

    Raises:
        ConfigError: an exit layer does not exist in this model, or the kind of head cannot be initialised from it.
    """
    require(
        exits.head != "block" and exits.norm,
        f"exits of kind {exits.head!r}{'' if exits.norm else ' without a norm'} do not equal the shared head at first; "
        "only 'shared', 'norm' and 'mlp' with a norm can be added",
    )
    config = dataclasses.replace(config, exits=exits)
    have = dict(leaves({name: tree for name, tree in params.items() if name != "exits"}))
    head = "embedding" if config.tie_embeddings else "output"
    for layer, name in zip(exits.layers, config.exit_names, strict=True):
        new: dict[str, Any] = {"norm": have["norm"], "output": have[head]}
        new |= {f"mlp.{part}": have[f"blocks.{layer - 1}.mlp.{part}"] for part in ("gate_up", "down")}
        new |= {"probe_weight": _zeros(have["norm"], config.hidden_size), "probe_bias": _zeros(have["norm"], 1)}
        have |= {f"exits.{name}.{part}": leaf for part, leaf in new.items()}
    return config, rebuild(param_shapes(config), have)


def _zeros(like: Any, size: int) -> Any:
    if isinstance(like, LazyArray):
        return LazyArray((size,), like.dtype, lambda: np.zeros(size, like.dtype))
    return jax.numpy.zeros(size, like.dtype)
