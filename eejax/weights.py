"""Checkpoint folders: `config.json` beside an Orbax tree in `weights/`.

Loading refuses a checkpoint whose leaves differ from what its configuration needs, and names them: a weight that is
silently missing, or silently ignored, is a model that is silently wrong.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from eejax.config import ModelConfig
from eejax.errors import CheckpointError, ConfigError
from eejax.model import param_shapes

CONFIG_FILE = "config.json"
WEIGHTS_DIR = "weights"
DATA_FILE_BYTES = 8 * 2**20
"""Orbax starts another data file about here, so that no file of a small checkpoint is too large for git hosts."""
MAX_NAMED = 8


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` to fill, which takes its place at the end; an error leaves `path` as it was."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        old = temporary.with_name(temporary.name + ".old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_tree(path: str | Path, tree: dict) -> None:
    """Write a nested dict of arrays with Orbax to the new folder `path`."""
    args = ocp.args.PyTreeSave(_string_keys(tree), ocdbt_target_data_file_size=DATA_FILE_BYTES)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        checkpointer.save(Path(path).absolute(), args=args)


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
    wanted = dict(_leaves(like))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        try:
            found = dict(_leaves(checkpointer.metadata(path).item_metadata.tree))
        except Exception as error:  # Orbax raises whatever its storage layers raise
            raise CheckpointError(f"cannot read the weights in {path}: {_brief(error)}") from error
        _compare(path, {k: tuple(v.shape) for k, v in wanted.items()}, {k: tuple(v.shape) for k, v in found.items()})
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def restore(leaf: Any) -> ocp.ArrayRestoreArgs:
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            return ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype if dtype and floating else leaf.dtype)

        args = jax.tree.map(restore, _string_keys(like))
        try:
            loaded = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
        except Exception as error:
            raise CheckpointError(f"cannot read the weights in {path}: {_brief(error)}") from error
    leaves = dict(_leaves(loaded))
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


def save_checkpoint(path: str | Path, config: ModelConfig, params: dict, dtype: Any = None) -> None:
    """Write `config.json` and `weights/` to the folder `path`, replacing it whole once all is written.

    Args:
        path: the checkpoint folder; other files in it are lost.
        config: what the parameters belong to.
        params: nested dict of arrays, as `eejax.model.init_params` returns.
        dtype: floating leaves are stored as this dtype; as they are when not given.

    Raises:
        CheckpointError: `params` are not those of `config`.
    """
    with replacing_folder(path) as folder:
        write_checkpoint(folder, config, params, dtype)


def write_checkpoint(folder: Path, config: ModelConfig, params: dict, dtype: Any = None) -> None:
    """`save_checkpoint` into a folder that exists, beside what it already holds (a tokenizer, say)."""
    shapes = param_shapes(config)
    _compare(folder, *({name: tuple(leaf.shape) for name, leaf in _leaves(tree)} for tree in (shapes, params)))
    (folder / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    save_tree(folder / WEIGHTS_DIR, params if dtype is None else _cast(params, dtype))


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of the checkpoint folder `path`. Raises `CheckpointError` naming the file and what is wrong."""
    file = Path(path) / CONFIG_FILE
    try:
        values = json.loads(file.read_bytes())
        if not isinstance(values, dict):
            raise ConfigError(f"it must hold a JSON object, got {type(values).__name__}")
        return ModelConfig.from_dict(values)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:  # ConfigError and malformed JSON are ValueErrors
        raise CheckpointError(f"{file} is not a valid model configuration: {error}") from error


def load_checkpoint(path: str | Path, dtype: Any = jnp.float32) -> tuple[ModelConfig, dict]:
    """Read a checkpoint folder onto the default device.

    Args:
        path: the checkpoint folder.
        dtype: floating leaves are cast to this dtype while they are read.

    Returns:
        The configuration and the parameters, a nested dict as `eejax.model.init_params` returns.

    Raises:
        CheckpointError: a file is missing or corrupt, or leaves are missing, extra or misshaped; they are named.
    """
    config = load_config(path)
    return config, load_tree(Path(path) / WEIGHTS_DIR, param_shapes(config), dtype)


def _cast(params: dict, dtype: Any) -> dict:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def _string_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(key): _string_keys(value) for key, value in tree.items()}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and leaves, in the order in which jax flattens the same dict."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key in sorted(tree):
        yield from _leaves(tree[key], f"{prefix}.{key}" if prefix else str(key))


def _compare(path: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    def listed(names: list[str]) -> str:
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        return ", ".join(names[:MAX_NAMED]) + more

    missing = [f"{name} {wanted[name]}" for name in wanted if name not in found]
    extra = [f"{name} {found[name]}" for name in found if name not in wanted]
    bad = [f"{n}: expected {wanted[n]}, found {found[n]}" for n in wanted if n in found and wanted[n] != found[n]]
    problems = [
        f"{kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("extra", extra), ("misshaped", bad))
        if names
    ]
    if problems:
        raise CheckpointError(f"the weights in {path} do not match the configuration; " + "; ".join(problems))


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
