"""When the tokens of a request may exit: thresholds and measures. No jax here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from eejax.core.checks import (
    is_number,
    named_options,
    option,
    require,
    require_choice,
    require_integer,
    require_number,
    require_positive_int,
)
from eejax.core.config import ModelConfig
from eejax.core.errors import InvalidRequestError

type Thresholds = float | list[float] | tuple[float, ...]
Measure = Literal["softmax", "margin", "similarity", "classifier", "random"]

CALIBRATED = "calibrated"
"""Stands for the threshold that `eejax calibrate` stored in the checkpoint."""
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""All measures; on the device, a row's measure is an index into this."""
MODEL_MEASURES = MEASURES[:-1]
"""Measures of what the model computes; `random` is a draw."""
LOGIT_MEASURES = ("softmax", "margin")
"""Measures of an exit's logits: they need its head."""
MAX_CONFIDENCE = 1.0
"""No measure exceeds this, so a threshold above it is exactly full depth."""


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
        require_number("DecayingThreshold", "tau", self.tau, 0.0, 1e6, "a number in [0, 1e6]")


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
        require_number("EarlyExitParams", "gate", self.gate, 0.0, 1.0, "a number in [0, 1]")
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
