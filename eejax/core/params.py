"""How one request is answered. No jax here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eejax.core.checks import (
    is_integer,
    is_number,
    named_options,
    option,
    require,
    require_integer,
    require_number,
    require_positive_int,
    require_seed,
    with_help,
)
from eejax.core.early_exit import EarlyExitParams

MAX_LOGPROBS = 20


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
        require_number(me, "temperature", self.temperature, 0.0, 1e3, "a number in [0, 1000]")
        require(
            is_number(self.top_p) and 0 < self.top_p <= 1,
            f"{me}.top_p must be a number in (0, 1], got {self.top_p!r}",
        )
        require_number(me, "min_p", self.min_p, 0.0, 1.0, "a number in [0, 1]")
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
