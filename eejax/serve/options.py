"""Options of `LLM`: what they may be, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TypedDict

import jax
import jax.numpy as jnp

from eejax.core import (
    Choice,
    ConfigError,
    DecodeConfig,
    FillMode,
    ModelConfig,
    PolicyName,
    SchedulerConfig,
    require,
    require_positive_int,
)
from eejax.device import default_dtype, page_bytes
from eejax.model import load_config
from eejax.schedule import ConstantPredictor, LengthPredictor, load_length_heads, make_predictor
from eejax.text import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
CPU_CACHE_BYTES = 2**30
"""Default ceiling of the KV cache on CPU, where nothing says how much memory is free for it."""
GPU_CACHE_SHARE = 0.8
"""Share of the GPU memory that is free after loading which the KV cache takes by default, at the most."""


class Options(TypedDict, total=False):
    """Options of `LLM` beside path and dtype; `LLM` says what they mean."""

    max_model_len: int | None
    max_num_seqs: int | None
    num_pages: int | None
    page_size: int
    exit_layers: Seq[int] | None
    seed: int
    scheduler: PolicyName | SchedulerConfig | None
    length_predictor: LengthPredictor | None
    compaction: Choice
    fill: FillMode
    rebatching: Choice


def scheduler_config(options: Options) -> SchedulerConfig:
    """What `scheduler` and `max_num_seqs` say together."""
    scheduler, slots = options.get("scheduler") or "fcfs", options.get("max_num_seqs")
    if not isinstance(scheduler, SchedulerConfig):
        return SchedulerConfig(policy=scheduler) if slots is None else SchedulerConfig(slots, policy=scheduler)
    require(
        slots in (None, scheduler.max_num_seqs),
        f"max_num_seqs is {slots!r}, and the scheduler's configuration says {scheduler.max_num_seqs}",
    )
    return scheduler


def decode_config(options: Options) -> DecodeConfig:
    """What `compaction`, `fill` and `rebatching` say together."""
    return DecodeConfig(
        options.get("compaction", "auto"), options.get("fill", "auto"), options.get("rebatching", "auto")
    )


def choose_predictor(options: Options, folder: Path | None, tokenizer: Tokenizer | None) -> LengthPredictor:
    """The predictor that is given or named, with the length heads in `folder`; one that nobody asks for costs nothing.

    Raises:
        ConfigError: it needs what this model does not have.
        CheckpointError: the length heads are not usable.
    """
    given, config = options.get("length_predictor"), scheduler_config(options)
    if given is not None:
        return given
    if config.predictor is None and config.policy != "length":
        return ConstantPredictor(None)
    heads = None if folder is None else load_length_heads(folder, load_config(folder))
    return make_predictor(config.predictor, heads, tokenizer)


def check(options: Options) -> None:
    """Refuse options that no model could be loaded with."""
    names = Options.__annotations__
    unknown = sorted(set(options) - set(names))
    require(not unknown, f"LLM has no option {', '.join(unknown)}; allowed: {', '.join(names)}")
    scheduler_config(options)
    decode_config(options)
    exit_layers = options.get("exit_layers")
    require(
        exit_layers is None or isinstance(exit_layers, list | tuple),
        f"LLM.exit_layers must be a list of block numbers, got {exit_layers!r}",
    )
    for name in ("max_model_len", "num_pages", "max_num_seqs", "page_size"):
        if (value := options.get(name)) is not None:
            require_positive_int("LLM", **{name: value})


def resolve_dtype(name: str | None) -> jnp.dtype:
    """The dtype called `name`, the device's default for None. Raises `ConfigError` for one that is not served."""
    if name is None:
        return default_dtype()
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return jnp.dtype(name)


def default_num_pages(model: ModelConfig, length: int, max_num_seqs: int, page_size: int, itemsize: int) -> int:
    """Pages for full slots of full length, as far as memory allows, and never fewer than one sequence needs."""
    per_seq = -(-length // page_size)
    stats = jax.devices()[0].memory_stats() or {}
    free = GPU_CACHE_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]) if "bytes_limit" in stats else None
    affordable = int((CPU_CACHE_BYTES if free is None else free) // page_bytes(model, page_size, itemsize))
    return max(per_seq, min(per_seq * max_num_seqs, affordable))
