"""Checkpoint folders: `config.json` beside an Orbax tree in `weights/`, or a Hugging Face folder.

Loading refuses a checkpoint whose leaves differ from what its configuration needs, and names them: a weight that is
silently missing, or silently ignored, is a model that is silently wrong.

Orbax takes 25 MB of memory and a fifth of a second to import: only functions that need it do.
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

from eejax.core import CheckpointError, ConfigError, ModelConfig, require
from eejax.model import huggingface
from eejax.model.param_tree import compare, shapes
from eejax.model.transformer import param_shapes

CONFIG_FILE = "config.json"
WEIGHTS_DIR = "weights"


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
    from eejax.model.orbax_tree import save_tree

    compare(str(folder), shapes(param_shapes(config)), shapes(params))
    (folder / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    save_tree(folder / WEIGHTS_DIR, params if dtype is None else _cast(params, dtype))


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of the checkpoint folder `path`. Raises `CheckpointError` naming the file and what is wrong."""
    if huggingface.is_folder(path):
        return huggingface.read_config(path)
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
        path: an eejax checkpoint, or a Hugging Face folder, which is converted while it is read.
        dtype: floating leaves are cast to this dtype while they are read.

    Returns:
        The configuration and the parameters, a nested dict as `eejax.model.init_params` returns.

    Raises:
        CheckpointError: a file is missing or corrupt, or leaves are missing, extra or misshaped; they are named.
    """
    config = load_config(path)
    if huggingface.is_folder(path):
        return huggingface.load_model(path, dtype)
    from eejax.model.orbax_tree import load_tree

    return config, load_tree(Path(path) / WEIGHTS_DIR, param_shapes(config), dtype)


def load_lazily(path: str | Path) -> tuple[ModelConfig, dict]:
    """`load_checkpoint` with a tree of `LazyArray` in the dtypes stored: only metadata is read, and checked."""
    config = load_config(path)
    if huggingface.is_folder(path):
        return huggingface.load_lazily(path)
    from eejax.model.orbax_tree import lazy_tree

    return config, lazy_tree(Path(path) / WEIGHTS_DIR, param_shapes(config))


def _cast(params: dict, dtype: Any) -> dict:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
