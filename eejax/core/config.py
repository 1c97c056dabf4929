"""The shape of a model with exits, validated on construction. No jax here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from eejax.core.checks import (
    from_mapping,
    is_integer,
    is_number,
    require,
    require_choice,
    require_positive_int,
)

ExitHeadKind = Literal["shared", "norm", "mlp", "block"]


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
    """After which blocks tokens may exit, and through which head.

    Attributes:
        layers: numbers of the blocks that are followed by an exit, ascending, each in `1..n_layers-1`.
        head: `shared` uses the final norm and LM head (LayerSkip, arXiv 2404.16710). The others are EE-LLM's (arXiv
            2312.04916): `norm` has a norm of its own; `mlp` also an MLP parallel to the exit block's MLP, with the same
            residual as input; `block` also a whole transformer layer after the exit block, with a KV cache of its own.
        tie_output: the exits share the LM head's matrix; otherwise each has its own (not for `shared`).
        norm: the exit has a norm of its own before the output matrix; false is EE-LLM without `--use-exit-norm`, and a
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
        require_choice("ExitConfig", ExitHeadKind, head=self.head)
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
        sliding_window: tokens that attention sees, the query's own included (Mistral, arXiv 2310.06825); None for all.
        sliding_from: blocks before this one attend to everything despite `sliding_window` (Qwen's `max_window_layers`).
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
            is_integer(self.sliding_from)
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
        """Blocks that keep K and V: the backbone's, then those of `block` exits in ascending order."""
        return self.n_layers + (len(self.exits.layers) if self.exits.head == "block" else 0)

    def window_of(self, block: int) -> int | None:
        """Tokens that attention of block number `block` (from 0) sees; None for all. Exits' own blocks see all."""
        return self.sliding_window if self.sliding_from <= block < self.n_layers else None

    def with_exit_layers(self, layers: tuple[int, ...] | list[int]) -> Self:
        """The same model with other exits.

        A head with parameters is trained for its block, so only a subset can be chosen. With `shared` heads any block
        can be an exit; if one of them has no probe, the probes of the others are dropped.
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
