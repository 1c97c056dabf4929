"""Asking the model for the length of an answer before it answers (arXiv 2305.13144). No jax here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from eejax.core import (
    FinishReason,
    LengthEstimate,
    MicroBatch,
    Request,
    SamplingParams,
    SchedulerConfig,
    Sequence,
    StepResult,
)
from eejax.schedule import QUESTION_TOKENS, PageAllocator, PerceptionPredictor, Scheduler


class AskingScheduler(Scheduler):
    """A scheduler that asks the model a question about each request, and queues the request when it has answered.

    A question is a request of its own, greedy and at full depth. It and its sequence are known to the scheduler only.
    A request whose question does not fit into the cache or the model's length is queued at once.

    Args:
        predictor: makes the questions and understands the answers.
        decode: token ids to text.
        eos_ids: tokens that end the answer to a question.
        max_model_len: tokens of question and answer together.
        others: arguments of `Scheduler`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        allocator: PageAllocator,
        *,
        page_size: int,
        predictor: PerceptionPredictor,
        decode: Callable[[list[int]], str],
        eos_ids: frozenset[int],
        max_model_len: int,
        **others: Any,
    ) -> None:
        super().__init__(config, allocator, page_size=page_size, predictor=predictor, **others)
        self._asks = predictor
        self._decode_text = decode
        self._eos_ids = eos_ids
        self._longest = min(max_model_len, allocator.num_pages * page_size)
        self._questions: dict[Sequence, Request] = {}  # open questions, and the requests that wait for their answers

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue the answers to one request, or the question about it."""
        sequences = list(sequences)
        request = sequences[0].request
        question = self._asks.question(request.prompt_token_ids)
        if len(question) + QUESTION_TOKENS > self._longest:
            super().add(sequences)
            return
        [asked] = Request(
            request_id=f"length of {request.request_id}",
            prompt=None,
            prompt_token_ids=tuple(question),
            params=SamplingParams(temperature=0.0, max_tokens=QUESTION_TOKENS),
            max_tokens=QUESTION_TOKENS,
            thresholds=(math.inf,) * len(request.thresholds),
            stop_token_ids=self._eos_ids,
            seed=0,
            priority=request.priority,
        ).sequences
        asked.take_estimate(LengthEstimate.unknown(QUESTION_TOKENS))
        self._questions[asked] = request
        super().add([asked])

    def update(self, batch: MicroBatch, result: StepResult, seconds: float | None = None) -> None:
        """As `Scheduler.update`; requests whose questions have been answered are queued."""
        super().update(batch, result, seconds)
        for asked in batch.rows:
            if asked in self._questions and asked.finish_reason is not None:
                request = self._questions.pop(asked)
                text = self._decode_text(asked.output_token_ids)
                estimate = self._asks.understand(text, request.max_tokens)
                for seq in request.sequences:
                    if estimate is not None:
                        seq.take_estimate(estimate)
                super().add(request.sequences)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """As `Scheduler.finish`. The question about a request ends with the last of the request's answers."""
        asked = next((question for question, request in self._questions.items() if request is seq.request), None)
        if asked is None:
            super().finish(seq, reason)
            return
        seq.finish(reason)  # it was not queued yet
        if seq.request.finished:
            del self._questions[asked]
            super().finish(asked, reason)
