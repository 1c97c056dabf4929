"""Parameter trees in Orbax's form, as `eejax.model.weights` keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.future import Future

from eejax.core import CheckpointError
from eejax.model.param_tree import LazyArray, compare, leaves, rebuild, shapes

COMMIT_FILE = "commit_success.txt"
"""Orbax notes in it where it was written; nobody reads that, and a checkpoint may travel."""
DATA_FILE_BYTES = 8 * 2**20
"""Orbax starts another data file about here, so that no file of a small checkpoint is too large for git hosts."""
BATCH_BYTES = 64 * 2**20


class _LeafWriter(ocp.type_handlers.NumpyHandler):
    """Has Orbax write a few leaves at a time, read just before: memory for two batches, however large the tree."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Future]:
        options: Sequence[Any] = args or [ocp.SaveArgs()] * len(values)
        pending: Sequence[Future] = ()
        for batch in _batches(values):
            arrays = [value.read() for value in values[batch]]  # while the batch before is being written
            for one in pending:
                one.result()
            pending = await super().serialize(arrays, infos[batch], options[batch])
        return pending


def _batches(values: Sequence[LazyArray]) -> Iterator[slice]:
    """Neighbours of `BATCH_BYTES` together, or one that has more."""
    start, size = 0, 0
    for number, value in enumerate(values):
        if number > start and size + value.nbytes > BATCH_BYTES:
            yield slice(start, number)
            start, size = number, 0
        size += value.nbytes
    yield slice(start, len(values))


def _handler() -> ocp.PyTreeCheckpointHandler:
    kinds = (LazyArray, _LeafWriter()), (jax.Array, ocp.type_handlers.ArrayHandler())
    registry = ocp.type_handlers.create_type_handler_registry(*kinds)
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, type_handler_registry=registry)


def save_tree(path: str | Path, tree: dict) -> None:
    """Write a nested dict of arrays, lazy ones among them, with Orbax to the new folder `path`."""

    def lazy(leaf: Any) -> LazyArray:
        return leaf if isinstance(leaf, LazyArray) else LazyArray(leaf.shape, leaf.dtype, lambda: np.asarray(leaf))

    args = ocp.args.PyTreeSave(jax.tree.map(lazy, _string_keys(tree)), ocdbt_target_data_file_size=DATA_FILE_BYTES)
    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(Path(path).absolute(), args=args)
    (Path(path) / COMMIT_FILE).unlink(missing_ok=True)


def load_tree(path: str | Path, like: dict, dtype: Any = None) -> dict:
    """Read what `save_tree` wrote, onto the default device.

    Args:
        path: the folder.
        like: nested dict of arrays or `jax.ShapeDtypeStruct`: names and shapes that must be there, and no others.
        dtype: floating leaves are read as this dtype; as `like` says when not given.

    Raises:
        CheckpointError: a leaf is missing, extra or misshaped, or a file is missing or corrupt.
    """
    path = Path(path).absolute()
    _stored(path, like)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def restore(leaf: Any) -> ocp.ArrayRestoreArgs:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype if dtype and floating else leaf.dtype)

    args = ocp.args.PyTreeRestore(restore_args=jax.tree.map(restore, _string_keys(like)))
    return rebuild(like, dict(leaves(_restore(path, args))))


def lazy_tree(path: str | Path, like: dict) -> dict:
    """What `save_tree` wrote as a tree of `LazyArray` in the dtypes stored, each read when it is asked for.

    Raises:
        CheckpointError: as `load_tree`; for a corrupt file when the leaf is read.
    """
    path = Path(path).absolute()

    def lazy(name: str, stored: Any) -> LazyArray:
        def read() -> np.ndarray:
            item: Any = jax.ShapeDtypeStruct(stored.shape, stored.dtype)
            wish: Any = ocp.RestoreArgs(restore_type=np.ndarray)
            for key in reversed(name.split(".")):
                item, wish = {key: item}, {key: wish}
            args = ocp.args.PyTreeRestore(item=item, restore_args=wish, partial_restore=True)
            return dict(leaves(_restore(path, args)))[name]

        return LazyArray(tuple(stored.shape), np.dtype(stored.dtype), read)

    return rebuild(like, {name: lazy(name, stored) for name, stored in _stored(path, like).items()})


def _stored(path: Path, like: dict) -> dict[str, Any]:
    """Orbax's metadata of all leaves, once they are known to be those of `like`."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        try:
            found = dict(leaves(checkpointer.metadata(path).item_metadata.tree))
        except Exception as error:  # Orbax raises whatever its storage layers raise
            raise CheckpointError(f"cannot read the weights in {path}: {_brief(error)}") from error
    compare(str(path), shapes(like), {name: tuple(leaf.shape) for name, leaf in found.items()})
    return found


def _restore(path: Path, args: ocp.args.PyTreeRestore) -> Any:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        try:
            return checkpointer.restore(path, args=args)
        except Exception as error:
            raise CheckpointError(f"cannot read the weights in {path}: {_brief(error)}") from error


def _string_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(key): _string_keys(value) for key, value in tree.items()}


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
