"""Reading parameter trees that Orbax stores; `eejax.model.weights_writer` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from eejax.core import CheckpointError
from eejax.model.param_tree import compare, leaves, rebuild, shapes


def load_tree(path: str | Path, like: dict, dtype: Any = None) -> dict:
    """Read what `eejax.model.save_tree` wrote, onto the default device.

    Args:
        path: the folder.
        like: nested dict of arrays or `jax.ShapeDtypeStruct`: names and shapes that must be there, and no others.
        dtype: floating leaves are read as this dtype; as `like` says when not given.

    Raises:
        CheckpointError: a leaf is missing, extra or misshaped, or a file is missing or corrupt.
    """
    path = Path(path).absolute()
    stored_leaves(path, like)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def wish(leaf: Any) -> ocp.ArrayRestoreArgs:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype if dtype and floating else leaf.dtype)

    args = ocp.args.PyTreeRestore(restore_args=jax.tree.map(wish, string_keys(like)))
    return rebuild(like, dict(leaves(restore(path, args))))


def stored_leaves(path: Path, like: dict) -> dict[str, Any]:
    """Orbax's metadata of all leaves, after a check that they are those of `like`."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        try:
            found = dict(leaves(checkpointer.metadata(path).item_metadata.tree))
        except Exception as error:  # Orbax raises whatever its storage layers raise
            raise CheckpointError(f"cannot read the weights in {path}: {_brief(error)}") from error
    compare(str(path), shapes(like), {name: tuple(leaf.shape) for name, leaf in found.items()})
    return found


def restore(path: Path, args: ocp.args.PyTreeRestore) -> Any:
    """What Orbax reads. Raises `CheckpointError`."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        try:
            return checkpointer.restore(path, args=args)
        except Exception as error:
            raise CheckpointError(f"cannot read the weights in {path}: {_brief(error)}") from error


def string_keys(tree: Any) -> Any:
    """The same nested dict with keys as text, as Orbax wants them."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): string_keys(value) for key, value in tree.items()}


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
