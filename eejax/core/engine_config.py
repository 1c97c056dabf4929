"""Options of an engine, and the configurations that they become; validated on construction. No jax here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eejax.core.checks import (
    is_number,
    named_options,
    option,
    require,
    require_choice,
    require_positive_int,
    require_seed,
    with_help,
)
from eejax.core.config import ModelConfig

PolicyName = Literal["fcfs", "length", "static"]
Choice = Literal["auto", "always", "never"]
FillMode = Literal["auto", "eager", "deferred"]
PredictorName = Literal["prompt", "hidden", "perception", "constant"]

DTYPES = ("float32", "bfloat16", "float16")
MIN_PREFILL_BUCKET = 16
PAGE_SIZE = 64


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache: `num_pages` pages of `page_size` tokens for every block."""

    num_pages: int
    page_size: int = PAGE_SIZE

    def __post_init__(self) -> None:
        require_positive_int("CacheConfig", num_pages=self.num_pages, page_size=self.page_size)


@named_options
@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How requests are admitted and how long the device runs between two decisions.

    Attributes:
        max_num_seqs: slots: sequences that decode together at most.
        max_chunk_steps: decode steps in one device call at most.
        max_prefill_tokens: prompt tokens prefilled between two decode chunks, so that running sequences do not stall.
            A single longer prompt is still prefilled as a whole.
        policy: `fcfs` (continuous batching in order of arrival), `length` (continuous batching in micro-batches of
            similar predicted length) or `static` (a batch runs until its last answer ends; a baseline).
        predictor: how the length of an answer is predicted: `prompt`, `hidden`, `perception` or `constant`; when None,
            the best that the checkpoint has a head for.
        window: waiting requests, in order of arrival, among which `length` chooses.
        quantile: of the predicted length; `length` reserves a request's pages up to there.
        max_wait: how far a request can be overtaken, in its own expected lengths: no request that arrives later than
            `max_wait` times a request's expected answer (in decode steps) is ever run before it. 0 is first come, first
            served.
    """

    max_num_seqs: int = 32
    max_chunk_steps: int = 16
    max_prefill_tokens: int = 2048
    policy: PolicyName = "fcfs"
    predictor: PredictorName | None = None
    window: int = 1024
    quantile: float = 0.5
    max_wait: float = 16.0

    def __post_init__(self) -> None:
        me = "SchedulerConfig"
        require_positive_int(
            me,
            max_num_seqs=self.max_num_seqs,
            max_chunk_steps=self.max_chunk_steps,
            max_prefill_tokens=self.max_prefill_tokens,
            window=self.window,
        )
        require_choice(me, PolicyName, policy=self.policy)
        if self.predictor is not None:
            require_choice(me, PredictorName, predictor=self.predictor)
        require(
            is_number(self.quantile) and 0 < self.quantile < 1,
            f"{me}.quantile must be a number between 0 and 1, got {self.quantile!r}",
        )
        require(
            is_number(self.max_wait) and 0 <= self.max_wait < math.inf,
            f"{me}.max_wait must be a number of at least 0, got {self.max_wait!r}",
        )


@named_options
@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How a batch executes its rows' exits. Tokens are the same under every setting; only time differs.

    `DecodeConfig("never", "eager", "never")` is the rule of Miao et al. (arXiv 2407.20272): all rows run on until the
    last one has exited.

    Attributes:
        compaction: a block computes only the rows that need it. `auto` does so where there are kernels that can;
            without them all rows are computed either way.
        fill: when K and V are written in blocks that a token did not run: `eager`, before its step ends; `deferred`,
            when the block next runs, or at the end of the chunk.
        rebatching: rows that exited go on to their next token, while the others are held until there are enough of them
            to run the deeper blocks together (DREX, arXiv 2512.15705). `auto` does so while all slots are taken, more
            requests wait, and the measured steps show that it pays.
    """

    compaction: Choice = "auto"
    fill: FillMode = "auto"
    rebatching: Choice = "auto"

    def __post_init__(self) -> None:
        require_choice("DecodeConfig", Choice, compaction=self.compaction, rebatching=self.rebatching)
        require_choice("DecodeConfig", FillMode, fill=self.fill)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine is built from besides the weights.

    Attributes:
        max_model_len: tokens of prompt and answer together at most; never above `model.max_position`.
        prefill_chunk: prompt tokens in one prefill call at most, a power of two of at least 16.
        seed: from which the seeds of requests without one are derived.
    """

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig = SchedulerConfig()
    decode: DecodeConfig = DecodeConfig()
    max_model_len: int = 2048
    prefill_chunk: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive_int("EngineConfig", max_model_len=self.max_model_len, prefill_chunk=self.prefill_chunk)
        require(
            self.max_model_len <= self.model.max_position,
            f"max_model_len {self.max_model_len} is above the model's {self.model.max_position} positions",
        )
        chunk = self.prefill_chunk
        require(
            chunk >= MIN_PREFILL_BUCKET and chunk & (chunk - 1) == 0,
            f"prefill_chunk must be a power of two of at least {MIN_PREFILL_BUCKET}, got {chunk}",
        )
        require_seed("EngineConfig", self.seed)

    @property
    def pages_per_seq(self) -> int:
        """Width of a page table row: pages that the longest sequence takes."""
        return -(-self.max_model_len // self.cache.page_size)


@named_options
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options of `LLM`. The command line and the benches take names, types, defaults and help texts from here.

    `scheduler` may be a `SchedulerConfig`, and `length_predictor` is a `LengthPredictor` to use instead of the one that
    the scheduler's configuration names. Tokens are the same under every `compaction`, `fill` and `rebatching`;
    `DecodeConfig` describes them.

    Raises:
        ConfigError: an option does not exist, or its value is not allowed; the message names it.
    """

    dtype: str | None = option(None, "float32, bfloat16 or float16; by default float32 on CPU, else bfloat16.")
    max_model_len: int | None = option(None, "Tokens of prompt and answer together; by default the model's limit.")
    max_num_seqs: int | None = option(
        None, f"Sequences decoded together at most; by default {SchedulerConfig().max_num_seqs}."
    )
    num_pages: int | None = option(
        None, "Pages of the KV cache; by default for all sequences at full length, if they fit."
    )
    page_size: int = option(PAGE_SIZE, "Tokens per page.")
    exit_layers: Sequence[int] | None = option(
        None, "Blocks to exit after, instead of the checkpoint's own; only some of those unless heads are shared."
    )
    seed: int = option(0, "Seed for requests without one.")
    scheduler: PolicyName | SchedulerConfig | None = option("fcfs", "fcfs, length or static.")
    length_predictor: Any = option(None, "What predicts the lengths of answers.")
    compaction: Choice = option("auto", "auto, always or never: blocks compute only the rows still running.")
    fill: FillMode = option("auto", "auto, eager or deferred: when blocks that were not run get their K and V.")
    rebatching: Choice = option("auto", "auto, always or never: rows that do not exit wait for others to run with.")

    def __post_init__(self) -> None:
        me = "EngineOptions"
        require(
            self.dtype is None or self.dtype in DTYPES,
            f"{me}.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}",
        )
        for name in ("max_model_len", "max_num_seqs", "num_pages"):
            if (value := getattr(self, name)) is not None:
                require_positive_int(me, **{name: value})
        require_positive_int(me, page_size=self.page_size)
        require(
            self.exit_layers is None or isinstance(self.exit_layers, list | tuple),
            f"{me}.exit_layers must be a list of block numbers, got {self.exit_layers!r}",
        )
        for layer in self.exit_layers or ():
            require_positive_int(me, exit_layers=layer)
        require_seed(me, self.seed)
        _ = self.scheduler_config, self.decode_config  # which check the others

    @property
    def scheduler_config(self) -> SchedulerConfig:
        """The configuration that `scheduler` and `max_num_seqs` give together."""
        slots, given = self.max_num_seqs, self.scheduler or "fcfs"
        if not isinstance(given, SchedulerConfig):
            return SchedulerConfig(policy=given) if slots is None else SchedulerConfig(slots, policy=given)
        require(
            slots in (None, given.max_num_seqs),
            f"max_num_seqs is {slots!r}, and the scheduler's configuration says {given.max_num_seqs}",
        )
        return given

    @property
    def decode_config(self) -> DecodeConfig:
        """The configuration that `compaction`, `fill` and `rebatching` give together."""
        return DecodeConfig(self.compaction, self.fill, self.rebatching)

    def engine_config(self, model: ModelConfig, num_pages: int) -> EngineConfig:
        """The configuration of an engine for `model`, with a cache of `num_pages` pages."""
        return EngineConfig(
            model=model,
            cache=CacheConfig(num_pages, self.page_size),
            scheduler=self.scheduler_config,
            decode=self.decode_config,
            max_model_len=self.max_model_len or model.max_position,
            seed=self.seed,
        )


EngineOptions.__doc__ = with_help(EngineOptions.__doc__, EngineOptions)
