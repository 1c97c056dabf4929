"""Trained length heads, one small file beside a model's weights. No jax here.

All of them predict the natural logarithm of an answer's length in tokens, one column for each probability of
`eejax.core.lengths.LEVELS` (Q of them).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eejax.core import LEVELS, CheckpointError, ModelConfig, replacing_file

HEADS_FILE = "length_heads.safetensors"
PROMPT_BUCKETS = 2048
"""Counters that n-grams of a prompt are hashed into."""
PROMPT_FEATURES = PROMPT_BUCKETS + 1
"""The counters, and the prompt's length."""
HIDDEN_EXTRAS = len(LEVELS)
"""Features beside the hidden state: the quantiles estimated before."""
METADATA_KEY = "eejax"


@dataclass(frozen=True, slots=True, eq=False)
class LengthHeads:
    """What was learnt about the lengths of a model's answers; float32. The last row of a matrix is its bias.

    Attributes:
        marginal: `[Q]`, quantiles of all answers.
        prompt: `[PROMPT_FEATURES + 1, Q]`, linear in `eejax.schedule.length_predictor.prompt_features`.
        hidden: `[hidden_size + HIDDEN_EXTRAS + 1, Q]`, linear in `eejax.schedule.length_predictor.hidden_features`.
        perception: `[Q]`, quantiles of the logarithm of length over what the model said; None where it was not asked.
        about: how they were made, for human readers.
    """

    marginal: np.ndarray
    prompt: np.ndarray
    hidden: np.ndarray
    perception: np.ndarray | None = None
    about: Mapping[str, object] = field(default_factory=dict)


def save_length_heads(folder: str | Path, heads: LengthHeads) -> Path:
    """Write `heads` to their file in `folder`, which it replaces once it is whole. Returns the file."""
    names = ["marginal", "prompt", "hidden"] + ([] if heads.perception is None else ["perception"])
    tensors = {name: np.ascontiguousarray(getattr(heads, name), np.float32) for name in names}
    metadata = {METADATA_KEY: json.dumps({"levels": LEVELS, "about": dict(heads.about)})}
    target = Path(folder) / HEADS_FILE
    with replacing_file(target) as file:
        save_file(tensors, file, metadata)
    return target


def load_length_heads(folder: str | Path, config: ModelConfig) -> LengthHeads | None:
    """The length heads in `folder`, None where there are none.

    Raises:
        CheckpointError: the file is damaged, or its tensors are missing, extra, misshaped for this model or not
            finite, or they are quantiles at other levels; the message names what is wrong.
    """
    file = Path(folder) / HEADS_FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="numpy") as stored:
            metadata = json.loads((stored.metadata() or {})[METADATA_KEY])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a dict
        levels, about = metadata["levels"], metadata["about"]
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if levels != list(LEVELS):
        raise CheckpointError(f"{file} holds quantiles at {levels}, and {list(LEVELS)} are needed; train them again")
    q = len(LEVELS)
    wanted = {"marginal": (q,), "prompt": (PROMPT_FEATURES + 1, q)}
    wanted["hidden"] = (config.hidden_size + HIDDEN_EXTRAS + 1, q)
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    wanted["perception"] = (q,)  # optional
    for name, tensor in tensors.items():
        if name not in wanted:
            problems.append(f"{name} is not known")
        elif tensor.shape != wanted[name] or tensor.dtype != np.float32:
            problems.append(f"{name} must be float32 {wanted[name]}, got {tensor.dtype} {tensor.shape}")
        elif not np.isfinite(tensor).all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        raise CheckpointError(f"{file} holds no length heads for this model: {'; '.join(problems)}")
    return LengthHeads(**tensors, about=about)
