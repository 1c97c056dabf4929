"""Frozen configuration objects, validated on construction. Nothing here imports jax."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from eejax.core.checks import from_mapping, is_number, named_options, require, require_positive_int

ExitHeadKind = Literal["shared", "norm", "mlp", "block"]
PolicyName = Literal["fcfs", "length", "static"]
Choice = Literal["auto", "always", "never"]
FillMode = Literal["auto", "eager", "deferred"]
PredictorName = Literal["prompt", "hidden", "perception", "constant"]

MIN_PREFILL_BUCKET = 16


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 rotary frequency scaling (`rope_type: llama3` in Hugging Face configurations)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        require_positive_int("RopeScaling", original_max_position=self.original_max_position)
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            require(is_number(value), f"RopeScaling.{name} must be a number, got {value!r}")
        require(self.factor >= 1, f"RopeScaling.factor must be at least 1, got {self.factor!r}")
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            "RopeScaling needs 0 < low_freq_factor < high_freq_factor, got "
            f"{self.low_freq_factor!r} and {self.high_freq_factor!r}",
        )


@dataclass(frozen=True, slots=True)
class ExitConfig:
    """Where tokens may leave, and through which head.

    Attributes:
        layers: numbers of blocks after which an exit stands, ascending, each in `1..n_layers-1`.
        head: `shared` reads the final norm and LM head (LayerSkip, arXiv 2404.16710). The others are EE-LLM's (arXiv
            2312.04916): `norm` has a norm of its own; `mlp` also an MLP that stands beside the exit block's MLP and is
            fed the same residual; `block` also a whole transformer layer behind the exit block, with a KV cache of its
            own.
        tie_output: the exits share the LM head's matrix; otherwise each has its own (not for `shared`).
        norm: a norm of the exit's own stands before the output matrix; false is EE-LLM without `--use-exit-norm`, and a
            `norm` head is then the bare output matrix. Always true for `shared`.
        probes: each exit has a linear probe, the `classifier` measure (CALM, arXiv 2207.07061).
    """

    layers: tuple[int, ...] = ()
    head: ExitHeadKind = "shared"
    tie_output: bool = True
    norm: bool = True
    probes: bool = False

    def __post_init__(self) -> None:
        require(
            isinstance(self.layers, list | tuple),
            f"ExitConfig.layers must be a list of block numbers, got {self.layers!r}",
        )
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            require_positive_int("ExitConfig", layers=layer)
        require(
            all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False)),
            f"ExitConfig.layers must be ascending without repeats, got {self.layers}",
        )
        kinds = get_args(ExitHeadKind)
        require(self.head in kinds, f"ExitConfig.head must be one of {', '.join(kinds)}, got {self.head!r}")
        for name in ("norm", "tie_output", "probes"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"ExitConfig.{name} must be true or false, got {value!r}")
        require(
            self.tie_output or self.head != "shared",
            "ExitConfig: a shared head has no output matrix of its own, so tie_output must be true",
        )
        require(
            self.norm or self.head != "shared", "ExitConfig: a shared head reads the final norm, so norm must be true"
        )

    @property
    def has_params(self) -> bool:
        """Whether the exits own parameters, so that only those that were trained can be used."""
        return self.head != "shared" or self.probes


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a Llama-family decoder with exits. Sizes in elements; weights are stored `[out, in]`.

    Attributes:
        attention_bias: W_q, W_k and W_v have biases (Qwen2); W_o never has one.
        qk_norm: RMS norms over `head_dim` of queries and keys, before the rotary embedding (Qwen3).
        sliding_window: tokens that attention sees, its own included (Mistral, arXiv 2310.06825); all when None.
        sliding_from: blocks below this one see everything in spite of `sliding_window` (Qwen's `max_window_layers`).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_position: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_from: int = 0
    exits: ExitConfig = ExitConfig()

    def __post_init__(self) -> None:
        require_positive_int(
            "ModelConfig",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            max_position=self.max_position,
        )
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"ModelConfig.n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})",
        )
        require(self.head_dim % 2 == 0, f"ModelConfig.head_dim must be even for rotary embedding, got {self.head_dim}")
        require(
            is_number(self.rope_theta) and math.isfinite(self.rope_theta) and self.rope_theta > 0,
            f"ModelConfig.rope_theta must be positive, got {self.rope_theta!r}",
        )
        require(
            is_number(self.norm_eps) and 0 < self.norm_eps < 1,
            f"ModelConfig.norm_eps must lie in (0, 1), got {self.norm_eps!r}",
        )
        if self.sliding_window is not None:
            require_positive_int("ModelConfig", sliding_window=self.sliding_window)
        require(
            isinstance(self.sliding_from, int)
            and not isinstance(self.sliding_from, bool)
            and 0 <= self.sliding_from < self.n_layers
            and (self.sliding_from == 0 or self.sliding_window is not None),
            f"ModelConfig.sliding_from must lie in 0..{self.n_layers - 1}, and be 0 without a sliding_window, "
            f"got {self.sliding_from!r}",
        )
        bad = [layer for layer in self.exits.layers if layer >= self.n_layers]
        require(
            not bad,
            f"exit layers {bad} do not exist: a model of {self.n_layers} blocks can exit after blocks "
            f"1 to {self.n_layers - 1}",
        )

    @property
    def exit_points(self) -> tuple[int, ...]:
        """Every depth at which logits may be read: the exit layers, then `n_layers`."""
        return (*self.exits.layers, self.n_layers)

    @property
    def segments(self) -> tuple[range, ...]:
        """Block indices of each segment: the blocks between neighbouring exit points."""
        starts = (0, *self.exits.layers)
        return tuple(range(a, b) for a, b in zip(starts, self.exit_points, strict=True))

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Names of the exits' own parameters, one per exit layer."""
        return tuple(f"after_{layer}" for layer in self.exits.layers)

    @property
    def n_cached_blocks(self) -> int:
        """Blocks that keep K and V: the network's, then those of `block` exits in ascending order."""
        return self.n_layers + (len(self.exits.layers) if self.exits.head == "block" else 0)

    def window_of(self, block: int) -> int | None:
        """Tokens that attention of block number `block` (from 0) sees; None for all. Exits' own blocks see all."""
        return self.sliding_window if self.sliding_from <= block < self.n_layers else None

    def with_exit_layers(self, layers: tuple[int, ...] | list[int]) -> Self:
        """The same model with other exits.

        A head with parameters is trained, so only a subset can be chosen. With `shared` heads any block can be an exit;
        if one of them has no probe, none keeps its own.
        """
        for layer in layers:
            require_positive_int("ExitConfig", layers=layer)
        layers = tuple(sorted(set(layers)))
        unknown = [layer for layer in layers if layer not in self.exits.layers]
        require(
            not unknown or self.exits.head == "shared",
            f"this checkpoint has no {self.exits.head!r} exit head after blocks {unknown}; it has them after "
            f"{self.exits.layers}",
        )
        probes = self.exits.probes and not unknown
        return dataclasses.replace(self, exits=dataclasses.replace(self.exits, layers=layers, probes=probes))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready mapping; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises `ConfigError` naming unknown, missing or invalid options."""
        values = dict(values)
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = from_mapping(RopeScaling, values["rope_scaling"])
        if "exits" in values:
            values["exits"] = from_mapping(ExitConfig, values["exits"])
        return from_mapping(cls, values)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache: `num_pages` pages of `page_size` tokens for every block."""

    num_pages: int
    page_size: int = 64

    def __post_init__(self) -> None:
        require_positive_int("CacheConfig", num_pages=self.num_pages, page_size=self.page_size)


@named_options
@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How requests are admitted and how long the device runs between two decisions.

    Attributes:
        max_num_seqs: slots: sequences that decode together at the most.
        max_chunk_steps: decode steps in one device call at the most.
        max_prefill_tokens: prompt tokens prefilled between two decode chunks, so that running rows do not stall.
            A single longer prompt is still taken whole.
        policy: `fcfs` (continuous batching in order of arrival), `length` (continuous batching in micro-batches of
            similar predicted length) or `static` (a batch runs until its last answer ends; a baseline).
        predictor: what tells the length of an answer: `prompt`, `hidden`, `perception` or `constant`; when None, the
            best that the checkpoint has a head for.
        window: waiting requests, in order of arrival, among which `length` chooses.
        quantile: of the predicted length; `length` promises a request its pages up to there.
        max_wait: how far a request can be overtaken, in its own expected lengths: nobody who comes later than
            `max_wait` times a request's expected answer (in decode steps) is ever put before it. 0 is first come, first
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
        require_positive_int(
            "SchedulerConfig",
            max_num_seqs=self.max_num_seqs,
            max_chunk_steps=self.max_chunk_steps,
            max_prefill_tokens=self.max_prefill_tokens,
            window=self.window,
        )
        policies, predictors = get_args(PolicyName), get_args(PredictorName)
        require(
            self.policy in policies, f"SchedulerConfig.policy must be one of {', '.join(policies)}, got {self.policy!r}"
        )
        require(
            self.predictor is None or self.predictor in predictors,
            f"SchedulerConfig.predictor must be one of {', '.join(predictors)}, or None, got {self.predictor!r}",
        )
        require(
            is_number(self.quantile) and 0 < self.quantile < 1,
            f"SchedulerConfig.quantile must be a number between 0 and 1, got {self.quantile!r}",
        )
        require(
            is_number(self.max_wait) and 0 <= self.max_wait < math.inf,
            f"SchedulerConfig.max_wait must be a number of at least 0, got {self.max_wait!r}",
        )


@named_options
@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How a batch takes its rows' exits. Tokens are the same under every setting; only time differs.

    `DecodeConfig("never", "eager", "never")` is the rule of Miao et al. (arXiv 2407.20272): all rows go on until the
    last one is resolved.

    Attributes:
        compaction: a block computes the rows that run it, and no others. `auto` does so where there are kernels that
            can; without them all rows are computed either way.
        fill: when K and V are written in blocks that a token did not run: `eager`, before its step ends; `deferred`,
            when the block next runs, or at the end of the chunk.
        rebatching: rows that left go on to their next token, while the others are held until enough of them have
            gathered to run the deeper blocks together (DREX, arXiv 2512.15705). `auto` does so while all slots are
            taken, more requests wait, and the steps that were measured say that it pays.
    """

    compaction: Choice = "auto"
    fill: FillMode = "auto"
    rebatching: Choice = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("compaction", get_args(Choice)),
            ("fill", get_args(FillMode)),
            ("rebatching", get_args(Choice)),
        ):
            value = getattr(self, name)
            require(value in allowed, f"DecodeConfig.{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine is built from besides the weights.

    Attributes:
        max_model_len: tokens of prompt and answer together at the most; never above `model.max_position`.
        prefill_chunk: prompt tokens in one prefill call at the most, a power of two of at least 16.
        seed: seeds requests that bring no seed of their own.
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
        require(
            not isinstance(self.seed, bool) and isinstance(self.seed, int) and 0 <= self.seed < 2**32,
            f"seed must be an integer in 0..2**32-1, got {self.seed!r}",
        )

    @property
    def pages_per_seq(self) -> int:
        """Width of a page table row: pages that the longest sequence takes."""
        return -(-self.max_model_len // self.cache.page_size)
