"""Reading checkpoint folders: `config.json` beside an Orbax tree in `weights/`, or a Hugging Face folder.

Loading refuses a checkpoint whose leaves differ from what its configuration needs, and names them: a weight that is
silently missing, or silently ignored, is a model that is silently wrong.

Each format's code is imported when a folder of that format is opened: Orbax alone takes 25 MB of memory and a fifth of
a second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from eejax.core import CheckpointError, ConfigError, ModelConfig
from eejax.model.transformer import param_shapes

CONFIG_FILE = "config.json"
WEIGHTS_DIR = "weights"


def is_huggingface(path: str | Path) -> bool:
    """Whether the folder's `config.json` is Hugging Face's: it names a model type or architectures."""
    try:
        values = json.loads((Path(path) / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and not {"model_type", "architectures"}.isdisjoint(values)


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of the checkpoint folder `path`. Raises `CheckpointError` naming the file and what is wrong."""
    if is_huggingface(path):
        from eejax.model.huggingface import read_config

        return read_config(path)
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
    if is_huggingface(path):
        from eejax.model.huggingface import load_model

        return load_model(path, dtype)
    config = load_config(path)
    from eejax.model.orbax_tree import load_tree

    return config, load_tree(Path(path) / WEIGHTS_DIR, param_shapes(config), dtype)
