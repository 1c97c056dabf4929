"""Requests, their sequences, what the scheduler and the device exchange, and what the user gets back. No jax here."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

from eejax.core.errors import EejaxError
from eejax.core.lengths import LengthEstimate
from eejax.core.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "deadline"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of a token under the untempered distribution, and its rank (1 is the likeliest)."""

    logprob: float
    rank: int


@dataclass(slots=True, eq=False)
class Request:
    """A validated request. `max_tokens` is already cut to what the model's length allows.

    Attributes:
        thresholds: one per exit, infinite where no token may exit.
        priority: requests of a lower number go first.
        deadline: on the monotonic clock, in seconds; answers that are unfinished then end as they are.
        may_exit: whether tokens may exit early anywhere.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    thresholds: tuple[float, ...]
    stop_token_ids: frozenset[int]
    seed: int
    priority: int = 0
    deadline: float | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    sequences: list[Sequence] = field(default_factory=list)
    may_exit: bool = field(init=False)

    def __post_init__(self) -> None:
        self.may_exit = any(threshold < math.inf for threshold in self.thresholds)
        self.sequences = [Sequence(self, index) for index in range(self.params.n)]

    @property
    def finished(self) -> bool:
        """Whether every answer is complete."""
        return all(seq.finish_reason is not None for seq in self.sequences)


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: its tokens, and the pages of its KV.

    Attributes:
        exit_layers: blocks run for each answer token; the first comes from prefill, at full depth.
        exit_counts: how many of the decoded tokens exited at each layer.
        pages: physical pages in order of position; this sequence holds one reference to each.
        num_cached: leading tokens whose K and V are in the cache.
        number: order of arrival at the scheduler; `arrival` is its clock then, in decode steps.
        estimate: how long the answer will be, as far as a predictor knows.
        expected_tokens, promised_tokens: of the answer, by the estimate or its tail: the mean, and what pages are
            promised for. The `length` policy keeps them here.
        parkings: how often it was left out of a chunk after having been in one, while holding pages.
    """

    request: Request
    index: int
    output_token_ids: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    exit_counts: Counter[int] = field(default_factory=Counter)
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    finish_reason: FinishReason | None = None
    number: int = 0
    arrival: int = 0
    estimate: LengthEstimate | None = None
    expected_tokens: float = 0.0
    promised_tokens: int = 0
    parkings: int = 0
    preemptions: int = 0
    first_token_time: float | None = None
    finish_time: float | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and answer tokens so far."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def remaining(self) -> int:
        """Answer tokens that may still follow."""
        return self.request.max_tokens - len(self.output_token_ids)

    @property
    def prefill_length(self) -> int:
        """Tokens to prefill from position 0 before this sequence can decode.

        A fresh sequence prefills its prompt, which yields its first answer token. A preempted one prefills its prompt
        and all answer tokens but the last, which is the next decode step's input.
        """
        return len(self.request.prompt_token_ids) + max(0, len(self.output_token_ids) - 1)

    def prefill_tokens(self, start: int, stop: int, n_layers: int) -> tuple[list[int], list[int]]:
        """Token ids to prefill at positions `start .. stop - 1`, and the number of blocks each one ran.

        That is `n_layers` for the prompt, and for answer token `i`, which was the input that produced token `i + 1`,
        the exit layer of token `i + 1`.
        """
        prompt = self.request.prompt_token_ids[start:stop]
        first, end = (max(0, at - len(self.request.prompt_token_ids)) for at in (start, stop))
        tokens = [*prompt, *self.output_token_ids[first:end]]
        return tokens, [n_layers] * len(prompt) + self.exit_layers[first + 1 : end + 1]

    def append(self, token: int, exit_layer: int, logprobs: dict[int, Logprob] | None) -> None:
        """Take over one answer token and set the finish reason that token ids and counts alone decide."""
        if self.output_token_ids:
            self.exit_counts[exit_layer] += 1
        else:
            self.first_token_time = time.monotonic()
        self.output_token_ids.append(token)
        self.exit_layers.append(exit_layer)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token in self.request.stop_token_ids:
            self.finish("stop")
        elif self.remaining <= 0:
            self.finish("length")

    def truncate(self, length: int) -> None:
        """Forget answer tokens after the first `length`."""
        del self.output_token_ids[length:], self.exit_layers[length:], self.logprobs[length:]
        self.exit_counts = Counter(self.exit_layers[1:])

    def take_estimate(self, estimate: LengthEstimate) -> None:
        """Take over a predictor's estimate, its lengths cut to `1..max_tokens`."""
        self.estimate = LengthEstimate.of(estimate.quantiles, self.request.max_tokens)
        self.promised_tokens = 0  # so that the policy looks at it

    def finish(self, reason: FinishReason) -> None:
        """Set the finish reason and time."""
        self.finish_reason = reason
        self.finish_time = time.monotonic()


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The next work of the device: prefill these sequences, or decode them together.

    Attributes:
        n_steps: decode steps at most; every row has pages for that many more tokens.
        yield_on_free: end the chunk as soon as a row finishes, because a sequence waits for its slot.
        width: rows that the batch has at least; a static batch keeps the places of finished rows.
        hold: rows to gather at an exit before those that did not exit go on (1: no row waits).
    """

    kind: Literal["prefill", "decode"]
    rows: tuple[Sequence, ...]
    n_steps: int = 0
    yield_on_free: bool = False
    width: int = 0
    hold: int = 1


@dataclass(frozen=True, slots=True)
class RowResult:
    """New tokens of one row of a micro-batch, in order; `logprobs` is empty unless the request asked for them.

    Attributes:
        hidden: `[hidden_size]`, the last block's output for the last prompt token; of a fresh prefill alone.
    """

    token_ids: tuple[int, ...]
    exit_layers: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] = ()
    hidden: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Counters of decoding. The device keeps them in one array, in the order of these fields. Prefill counts nothing.

    Attributes:
        steps: decode steps; one step is at most one token for every row of a batch.
        blocks_run: blocks executed for whole batches, without those that exits own.
        heads_run: vocabulary projections executed for whole batches.
        row_steps: rows of each step, padding and finished rows included, summed over steps.
        row_blocks: rows computed in each block, padding included where it is computed, summed over blocks.
        row_heads: the same for vocabulary projections.
        fills: blocks whose K and V projection ran for fill-in alone.
    """

    steps: int = 0
    blocks_run: int = 0
    heads_run: int = 0
    row_steps: int = 0
    row_blocks: int = 0
    row_heads: int = 0
    fills: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Field by field."""
        return Counts(*(getattr(self, name) + getattr(other, name) for name in COUNTERS))


COUNTERS = tuple(one.name for one in fields(Counts))
"""Names of the counters, in the order of the device's array."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one micro-batch produced, row for row, and what it cost."""

    rows: tuple[RowResult, ...]
    counts: Counts = Counts()


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds on the monotonic clock, None where not reached."""

    arrival_time: float
    first_token_time: float | None
    finish_time: float | None
    preemptions: int
    parkings: int = 0

    @classmethod
    def of(cls, request: Request) -> RequestMetrics:
        """From the first token of any answer to the end of the last; preemptions and parkings of all answers."""
        firsts = [seq.first_token_time for seq in request.sequences if seq.first_token_time is not None]
        lasts = [seq.finish_time for seq in request.sequences if seq.finish_time is not None]
        return cls(
            arrival_time=request.arrival_time,
            first_token_time=min(firsts, default=None),
            finish_time=max(lasts) if request.finished else None,
            preemptions=sum(seq.preemptions for seq in request.sequences),
            parkings=sum(seq.parkings for seq in request.sequences),
        )

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the last token."""
        return None if self.finish_time is None else self.finish_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. `exit_layers[i]` is the number of blocks that token `i` ran; `finish_reason` is None meanwhile."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...] | None
    exit_layers: tuple[int, ...]
    finish_reason: FinishReason | None

    @classmethod
    def of(cls, seq: Sequence, text: str) -> CompletionOutput:
        """What there is of an answer, whose text so far is `text`."""
        return cls(
            index=seq.index,
            text=text,
            token_ids=tuple(seq.output_token_ids),
            logprobs=None if seq.request.params.logprobs is None else tuple(seq.logprobs),
            exit_layers=tuple(seq.exit_layers),
            finish_reason=seq.finish_reason,
        )


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's answers. A request that could not be served has no outputs, and `error` says why."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics | None
    error: EejaxError | None = None


PromptLike = str | dict[str, Seq[int]]
