"""Parameters of one request: sampling, and when its tokens may exit. No jax here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from eejax.core.checks import (
    is_integer,
    is_number,
    named_options,
    option,
    require,
    require_choice,
    require_integer,
    require_positive_int,
    require_seed,
    with_help,
)
from eejax.core.config import ModelConfig
from eejax.core.errors import InvalidRequestError

type Thresholds = float | list[float] | tuple[float, ...]
Measure = Literal["softmax", "margin", "similarity", "classifier", "random"]

CALIBRATED = "calibrated"
"""Stands for the threshold that `eejax calibrate` stored in the checkpoint."""
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""All measures; on the device, a row's measure is an index into this."""
MODEL_MEASURES: tuple[Measure, ...] = tuple(name for name in MEASURES if name != "random")
"""Measures of what the model computes; `random` is a draw."""
LOGIT_MEASURES = ("softmax", "margin")
"""Measures of an exit's logits: they need its head."""
MAX_CONFIDENCE = 1.0
"""No measure exceeds this, so a threshold above it is exactly full depth."""
MAX_LOGPROBS = 20


def _require_number(owner: str, name: str, value: object, low: float, high: float, allowed: str) -> None:
    require(
        is_number(value) and low <= value <= high,  # pyright: ignore[reportOperatorIssue]
        f"{owner}.{name} must be {allowed}, got {value!r}",
    )


@named_options
@dataclass(frozen=True, slots=True)
class DecayingThreshold:
    """A threshold that decreases along the answer (CALM, arXiv 2207.07061, eq. 5).

    At answer token `t` of at most `N = max_tokens` tokens it is `clip(0.9 value + 0.1 exp(-tau t / N), 0, 1)`: it is
    higher for early tokens, since their errors affect all later ones.
    """

    value: Thresholds
    tau: float = option(4.0, "Let the threshold decay along the answer at this rate (CALM).")

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _checked_thresholds("DecayingThreshold.value", self.value))
        _require_number("DecayingThreshold", "tau", self.tau, 0.0, 1e6, "a number in [0, 1e6]")


def _checked_thresholds(name: str, value: Thresholds) -> float | tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else (value,)
    require(
        all(is_number(one) and one >= 0 for one in values),  # False for NaN
        f"{name} must be numbers of at least 0 (above 1 is full depth), got {value!r}",
    )
    return tuple(float(one) for one in value) if isinstance(value, list | tuple) else float(value)


@named_options
@dataclass(frozen=True, slots=True)
class EarlyExitParams:
    """When a request's tokens may exit before the last block.

    Attributes:
        threshold: confidence at which a token exits; one number, one per exit (ascending layers), or a
            `DecayingThreshold`. Above 1 no token exits: exactly full depth. `"calibrated"` is the threshold that
            `eejax calibrate` certified for this measure and stored in the checkpoint: with the confidence asked for,
            the expected loss is at most `max_risk`, for greedy answers with the `max_tokens` of the calibration to
            prompts like its prompts. Results do not depend on the batch, so this holds in every batch.
        measure: how a row's confidence at an exit is measured (CALM, arXiv 2207.07061, sec. 3.3).
            `softmax` (top probability) and `margin` (top minus second probability), both of the distribution before
            temperature, need the logits of the exit's head.
            `similarity` (cosine of the hidden states after and before the exit's block) and `classifier` (the
            probability given by the exit's linear probe, trained by `eejax tune-exits`) need no logits: one vocabulary
            projection per token.
            `random`, a seeded uniform number per token, needs no logits either (with a threshold of 0.3, 70 % of
            tokens exit): a baseline, and a way to replay a distribution of exits on any weights.
        exit_layers: use only these of the model's exits; all when None.
        min_layers: blocks that every token runs at least.
        gate: probability, by the exit's linear probe, below which the exit's logits are not computed, so that the token
            goes on: one dot product instead of a vocabulary projection. With 0 they always are. For `softmax` and
            `margin`.
    """

    threshold: Thresholds | DecayingThreshold | Literal["calibrated"] = option(
        0.9,
        "Confidence at which a token exits: one, or one per exit. Above 1 is full depth; calibrated is the one that "
        "eejax calibrate certified.",
    )
    measure: Measure = option("softmax", "softmax, margin, similarity or classifier.")
    exit_layers: Sequence[int] | None = None
    min_layers: int = option(0, "Blocks that every token runs at least.")
    gate: float = option(0.0, "Compute an exit's logits only if its probe gives at least this probability.")

    def __post_init__(self) -> None:
        _require_number("EarlyExitParams", "gate", self.gate, 0.0, 1.0, "a number in [0, 1]")
        if self.gate:
            require(
                self.measure in LOGIT_MEASURES,
                f"EarlyExitParams.gate is for measures that need logits, {' and '.join(LOGIT_MEASURES)}; with "
                f"{self.measure!r} it must be 0",
            )
            require(
                self.threshold != CALIBRATED,
                f"EarlyExitParams.gate must be 0 where the threshold is {CALIBRATED!r}, got {self.gate!r}: the "
                "calibration ran without a gate",
            )
        if isinstance(self.threshold, str):
            require(
                self.threshold == CALIBRATED,
                f"EarlyExitParams.threshold must be numbers or {CALIBRATED!r}, got {self.threshold!r}",
            )
        elif not isinstance(self.threshold, DecayingThreshold):
            object.__setattr__(self, "threshold", _checked_thresholds("EarlyExitParams.threshold", self.threshold))
        require_choice("EarlyExitParams", Measure, measure=self.measure)
        if self.exit_layers is not None:
            require(
                isinstance(self.exit_layers, list | tuple),
                f"EarlyExitParams.exit_layers must be a list of block numbers, got {self.exit_layers!r}",
            )
            for layer in self.exit_layers:
                require_positive_int("EarlyExitParams", exit_layers=layer)
            object.__setattr__(self, "exit_layers", tuple(sorted(set(self.exit_layers))))
        require_integer("EarlyExitParams", 0, min_layers=self.min_layers)

    def thresholds_for(self, model: ModelConfig) -> tuple[float, ...]:
        """One threshold per exit of `model`, `inf` where this request may not exit.

        Raises:
            InvalidRequestError: the model lacks one of `exit_layers` or the probes that `classifier` and `gate` need,
                `min_layers` exceeds its depth, the number of thresholds differs from the number of exits used, or the
                threshold is "calibrated", which only a loaded model can look up (`CalibratedThresholds`).
        """
        layers = model.exits.layers
        if isinstance(self.threshold, str):
            raise InvalidRequestError(f"the threshold is {self.threshold!r}; here a number is needed")
        if (self.measure == "classifier" or self.gate) and not model.exits.probes:
            wish = f"gate {self.gate:g}" if self.gate else f"measure {self.measure!r}"
            raise InvalidRequestError(
                f"{wish} needs a probe at each of the exits {list(layers)}, and this model has none: "
                "eejax tune-exits trains them"
            )
        used = layers if self.exit_layers is None else self.exit_layers
        unknown = [layer for layer in used if layer not in layers]
        if unknown:
            raise InvalidRequestError(f"exit_layers {unknown} are not exits of this model; it has {list(layers)}")
        if self.min_layers > model.n_layers:
            raise InvalidRequestError(f"min_layers {self.min_layers} is above the model's {model.n_layers} blocks")
        values = self.threshold.value if isinstance(self.threshold, DecayingThreshold) else self.threshold
        values = values if isinstance(values, list | tuple) else (values,) * len(used)
        if len(values) != len(used):
            raise InvalidRequestError(
                f"{len(values)} thresholds {list(values)} for {len(used)} exits {list(used)}: give one, or one per exit"
            )
        chosen = dict(zip(used, values, strict=True))
        allowed = {e: t for e, t in chosen.items() if e >= self.min_layers and t <= MAX_CONFIDENCE}
        return tuple(allowed.get(layer, math.inf) for layer in layers)


@named_options
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is answered; names and meanings are vLLM's.

    With `early_exit` None every token runs at full depth. With `max_tokens` None an answer may be as long as the model
    allows. Without `seed`, the request's seed is derived from the engine's. Tokens tied at the limit of `top_p`,
    `top_k` or `min_p` are all kept. `logprobs` may be 0, for the log-probability of the token alone, up to 20.

    Raises:
        ConfigError: a parameter does not exist, or its value is not allowed; the message names it.
    """

    n: int = option(1, "Answers to the prompt.")
    temperature: float = option(1.0, "0 is greedy.")
    top_p: float = option(1.0, "Keep the likeliest tokens that have this probability together; 1 keeps all.")
    top_k: int = option(0, "Keep so many of the likeliest tokens; 0 keeps all.")
    min_p: float = option(0.0, "Keep tokens with this share of the likeliest token's probability; 0 keeps all.")
    max_tokens: int | None = option(16, "Answer tokens at most.")
    stop: str | Sequence[str] = option((), "String that ends the answer, whose text ends before it.")
    stop_token_ids: Sequence[int] = option((), "Tokens that end the answer; they are kept in it.")
    ignore_eos: bool = option(False, "Go on after the end-of-sequence token.")
    seed: int | None = option(None, "Seed of sampling.")
    logprobs: int | None = option(None, "Report log-probabilities of each token and of so many likeliest ones.")
    early_exit: EarlyExitParams | None = None

    def __post_init__(self) -> None:
        me = "SamplingParams"
        require_positive_int(me, n=self.n)
        _require_number(me, "temperature", self.temperature, 0.0, 1e3, "a number in [0, 1000]")
        require(
            is_number(self.top_p) and 0 < self.top_p <= 1,
            f"{me}.top_p must be a number in (0, 1], got {self.top_p!r}",
        )
        _require_number(me, "min_p", self.min_p, 0.0, 1.0, "a number in [0, 1]")
        require(
            is_integer(self.top_k) and self.top_k >= -1,
            f"{me}.top_k must be 0 or -1 (all) or a positive integer, got {self.top_k!r}",
        )
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        if self.max_tokens is not None:
            require_positive_int(me, max_tokens=self.max_tokens)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        require(
            isinstance(stop, list | tuple) and all(isinstance(s, str) and s for s in stop),
            f"{me}.stop must be a non-empty string or a list of them, got {self.stop!r}",
        )
        object.__setattr__(self, "stop", tuple(stop))  # a tuple from here on
        ids = self.stop_token_ids
        require(
            isinstance(ids, list | tuple) and all(is_integer(i) and i >= 0 for i in ids),
            f"{me}.stop_token_ids must be a list of token ids, got {ids!r}",
        )
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        require(isinstance(self.ignore_eos, bool), f"{me}.ignore_eos must be a bool, got {self.ignore_eos!r}")
        if self.seed is not None:
            require_seed(me, self.seed)
        if self.logprobs is not None:
            require_integer(me, 0, MAX_LOGPROBS, logprobs=self.logprobs)
        require(
            self.early_exit is None or isinstance(self.early_exit, EarlyExitParams),
            f"{me}.early_exit must be EarlyExitParams or None, got {self.early_exit!r}",
        )


SamplingParams.__doc__ = with_help(SamplingParams.__doc__, SamplingParams)
