"""Weights that are read only when they are needed, so that a model larger than memory can be converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from eejax.core import ModelConfig
from eejax.model.param_tree import LazyArray, leaves, rebuild
from eejax.model.transformer import param_shapes
from eejax.model.weights import WEIGHTS_DIR, is_huggingface, load_config


def load_lazily(path: str | Path) -> tuple[ModelConfig, dict]:
    """`load_checkpoint` with a tree of `LazyArray` in the dtypes stored: only metadata is read, and checked.

    Raises:
        CheckpointError: as `load_checkpoint`; for a corrupt file when the leaf is read.
    """
    if is_huggingface(path):
        from eejax.model import huggingface

        return huggingface.load_lazily(path)
    config = load_config(path)
    return config, _lazy_orbax_tree(Path(path) / WEIGHTS_DIR, param_shapes(config))


def _lazy_orbax_tree(path: Path, like: dict) -> dict:
    import orbax.checkpoint as ocp

    from eejax.model.orbax_tree import restore, stored_leaves

    path = path.absolute()

    def lazy(name: str, stored: Any) -> LazyArray:
        def read() -> np.ndarray:
            item: Any = jax.ShapeDtypeStruct(stored.shape, stored.dtype)
            wish: Any = ocp.RestoreArgs(restore_type=np.ndarray)
            for key in reversed(name.split(".")):
                item, wish = {key: item}, {key: wish}
            args = ocp.args.PyTreeRestore(item=item, restore_args=wish, partial_restore=True)
            return dict(leaves(restore(path, args)))[name]

        return LazyArray(tuple(stored.shape), np.dtype(stored.dtype), read)

    return rebuild(like, {name: lazy(name, stored) for name, stored in stored_leaves(path, like).items()})
