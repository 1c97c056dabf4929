"""Writing checkpoint folders: `config.json` beside an Orbax tree in `weights/`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.future import Future

from eejax.core import ModelConfig, replacing_folder, require
from eejax.model.orbax_tree import string_keys
from eejax.model.param_tree import LazyArray, compare, shapes
from eejax.model.transformer import param_shapes
from eejax.model.weights import CONFIG_FILE, WEIGHTS_DIR

COMMIT_FILE = "commit_success.txt"
"""Orbax records in it where it was written. Nothing reads that, and a checkpoint may be moved."""
DATA_FILE_BYTES = 8 * 2**20
"""Orbax starts another data file at about this size: no file of a small checkpoint is too large for git hosts."""
BATCH_BYTES = 64 * 2**20


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse to write a checkpoint made from `source` where it would destroy something.

    Raises:
        ConfigError: one folder lies in the other, or `target` holds something: other than a checkpoint, or a checkpoint
            and `overwrite` is false.
    """
    one, other = source.resolve(), target.resolve()
    require(one != other, f"source and target are the same folder: {target}")
    require(one not in other.parents, f"the target {target} lies inside the source")
    require(other not in one.parents, f"the source lies inside the target {target}")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    require((target / CONFIG_FILE).is_file(), f"{target} exists and is no checkpoint; it is left as it is")
    require(overwrite, f"{target} exists; give another folder, or say overwrite to replace it")


def save_checkpoint(path: str | Path, config: ModelConfig, params: dict, dtype: Any = None) -> None:
    """Write `config.json` and `weights/` to the folder `path`, replacing it whole once all is written.

    Args:
        path: the checkpoint folder; other files in it are lost.
        config: what the parameters belong to.
        params: nested dict of arrays, as `eejax.model.init_params` returns; or of `LazyArray`, stored as they are.
        dtype: floating leaves are stored as this dtype; as they are when not given.

    Raises:
        CheckpointError: `params` are not those of `config`.
    """
    with replacing_folder(path) as folder:
        write_checkpoint(folder, config, params, dtype)


def write_checkpoint(folder: Path, config: ModelConfig, params: dict, dtype: Any = None) -> None:
    """`save_checkpoint` into a folder that exists, beside what it already holds (a tokenizer, say)."""
    compare(str(folder), shapes(param_shapes(config)), shapes(params))
    (folder / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    save_tree(folder / WEIGHTS_DIR, params if dtype is None else _cast(params, dtype))


def _cast(params: dict, dtype: Any) -> dict:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def save_tree(path: str | Path, tree: dict) -> None:
    """Write a nested dict of arrays, lazy ones among them, with Orbax to the new folder `path`."""

    def lazy(leaf: Any) -> LazyArray:
        return leaf if isinstance(leaf, LazyArray) else LazyArray(leaf.shape, leaf.dtype, lambda: np.asarray(leaf))

    args = ocp.args.PyTreeSave(jax.tree.map(lazy, string_keys(tree)), ocdbt_target_data_file_size=DATA_FILE_BYTES)
    kinds = (LazyArray, _LeafWriter()), (jax.Array, ocp.type_handlers.ArrayHandler())
    registry = ocp.type_handlers.create_type_handler_registry(*kinds)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(path).absolute(), args=args)
    (Path(path) / COMMIT_FILE).unlink(missing_ok=True)


class _LeafWriter(ocp.type_handlers.NumpyHandler):
    """Has Orbax write a few leaves at a time, each read just before: memory for two batches, however large the tree."""

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
    """Neighbouring leaves of up to `BATCH_BYTES` together, or one that is larger."""
    start, size = 0, 0
    for number, value in enumerate(values):
        if number > start and size + value.nbytes > BATCH_BYTES:
            yield slice(start, number)
            start, size = number, 0
        size += value.nbytes
    yield slice(start, len(values))
