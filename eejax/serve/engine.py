"""The engine: requests in, tokens out, one micro-batch at a time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from functools import cached_property, partial
from pathlib import Path

from eejax.core import (
    LOGIT_MEASURES,
    CompletionOutput,
    Counts,
    EngineConfig,
    FinishReason,
    InvalidRequestError,
    PromptLike,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    SchedulerConfig,
    Sequence,
    require,
)
from eejax.device import Runner
from eejax.model import leaves
from eejax.schedule import LengthPredictor, PageAllocator, PerceptionPredictor, Scheduler, StepCost
from eejax.serve.calibration import CalibratedThresholds
from eejax.serve.engine_stats import EngineStats
from eejax.serve.exit_cost import ExitLedger
from eejax.serve.intake import Intake, TextCodec
from eejax.text import Detokenizer


class Engine:
    """Iteration-level continuous batching (Orca; arXiv 2407.20272, sec. 3) with early exits.

    Args:
        params: the model's parameters (nested dict, `eejax.model.init_params` gives the form).
        tokenizer: needed for text prompts, stop strings and text output.
        eos_ids: tokens that end an answer unless the request ignores them.
        predictor: estimates the lengths of answers for the scheduler.
        folder: the folder that the model was loaded from, which may hold calibrated thresholds.
    """

    def __init__(
        self,
        config: EngineConfig,
        params: dict,
        tokenizer: TextCodec | None = None,
        eos_ids: Collection[int] = (),
        *,
        predictor: LengthPredictor | None = None,
        folder: Path | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.runner = Runner(config, params)
        self._folder = folder
        self._ledger: ExitLedger | None = None
        self._requests: dict[str, Request] = {}
        self._detokenizers: dict[Sequence, Detokenizer] = {}
        self._numbers = itertools.count()
        self._step_cost = StepCost(compacts=self.runner.compacts)
        self.reschedule(config.scheduler, predictor=predictor)

    def reschedule(
        self,
        config: SchedulerConfig,
        *,
        predictor: LengthPredictor | None = None,
        num_pages: int | None = None,
        scheduler: Callable[..., Scheduler] | None = None,
    ) -> None:
        """Schedule otherwise from now on, over the same weights, cache and compiled programs; counts start anew.

        Args:
            config: `max_chunk_steps` must be the one that decoding was compiled for.
            num_pages: pages to use of the cache; all of them when None.
            scheduler: makes the scheduler from the arguments of `Scheduler`, in its place.

        Raises:
            RuntimeError: requests are unfinished.
            ConfigError: the cache has fewer pages, or decoding was compiled for another `max_chunk_steps`.
        """
        if self._requests:
            raise RuntimeError(f"{len(self._requests)} requests are unfinished")
        have, steps = self.config.cache.num_pages, self.config.scheduler.max_chunk_steps
        require(num_pages is None or 1 <= num_pages <= have, f"num_pages must lie in 1..{have}, got {num_pages!r}")
        require(
            config.max_chunk_steps == steps,
            f"decoding was compiled for max_chunk_steps {steps}, got {config.max_chunk_steps}",
        )
        if scheduler is None and isinstance(predictor, PerceptionPredictor) and self.tokenizer is not None:
            from eejax.serve.perception import AskingScheduler

            limits = {"eos_ids": self.eos_ids, "max_model_len": self.config.max_model_len}
            scheduler = partial(AskingScheduler, decode=self.tokenizer.decode, **limits)
        self.allocator = PageAllocator(num_pages or have)
        self.scheduler = (scheduler or Scheduler)(
            config,
            self.allocator,
            page_size=self.config.cache.page_size,
            predictor=predictor,
            cost=self._step_cost,
            rebatching=self.config.decode.rebatching,
        )
        self._needs_hidden = predictor is not None and predictor.needs_hidden
        self._counts = Counts()
        self._tokens = self._prompt_tokens = self._token_blocks = 0
        self._schedule_seconds = 0.0

    @cached_property
    def calibrated(self) -> CalibratedThresholds:
        """The model's "calibrated" thresholds."""
        return CalibratedThresholds(self._folder, lambda: leaves(self.runner.params))

    @property
    def has_unfinished(self) -> bool:
        """Whether any request still waits or runs."""
        return bool(self._requests)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether this request still waits or runs."""
        return request_id in self._requests

    def add_request(
        self,
        prompt: PromptLike,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        text: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> str:
        """Queue a request and return its id.

        Args:
            prompt: text, or `{"prompt_token_ids": [...]}`. A text that spells BOS itself gets no second one.
            request_id: must not be in use; numbered when not given.
            text: what token ids were made from, for `RequestOutput.prompt`.
            priority: requests of a lower number go first, whatever their length.
            deadline: seconds from now; an answer that is unfinished then ends with what it has, as `deadline`. A
                request whose deadline has passed already (0 or less) is reported by the next step without being run.

        Raises:
            InvalidRequestError: the prompt or its parameters do not fit this model; nothing was queued.
            CapacityError: the request could not run even with the whole cache to itself.
        """
        number = next(self._numbers)
        request_id = request_id or f"request-{number}"
        if request_id in self._requests:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        pages = self.allocator.num_pages
        intake = Intake(self.config, self.tokenizer, self.eos_ids, pages, lambda: self.calibrated)
        request = intake.request(
            prompt, params, request_id=request_id, number=number, text=text, priority=priority, deadline=deadline
        )
        self._requests[request_id] = request
        if self.tokenizer is not None:
            for seq in request.sequences:
                self._detokenizers[seq] = Detokenizer(self.tokenizer, tuple(params.stop))
        self.scheduler.add(request.sequences)
        return request_id

    def abort(self, request_id: str) -> RequestOutput:
        """End a request now and free its pages. Returns what it had produced.

        Raises:
            InvalidRequestError: no such request is waiting or running.
        """
        if request_id not in self._requests:
            raise InvalidRequestError(f"request {request_id!r} is not waiting or running")
        return self._end(self._requests[request_id], "abort")

    def step(self, max_steps: int | None = None) -> list[RequestOutput]:
        """Run one micro-batch. Returns the requests that got tokens or finished, with everything they have so far.

        Args:
            max_steps: decode steps at most; the scheduler may choose fewer.
        """
        now = time.monotonic()
        late = [one for one in self._requests.values() if one.deadline is not None and one.deadline <= now]
        ended = [self._end(request, "deadline") for request in late]
        began = time.perf_counter()
        batch = self.scheduler.schedule(max_steps)
        if batch is None:
            return ended
        called = time.perf_counter()
        prefilled = sum(seq.prefill_length - seq.num_cached for seq in batch.rows) if batch.kind == "prefill" else 0
        known = [len(seq.output_token_ids) for seq in batch.rows]
        programs = self.runner.programs
        result = self.runner.run(batch, wants_hidden=self._needs_hidden)
        returned = time.perf_counter()
        first_run = self.runner.programs > programs  # and the time to load or compile the program was in it
        self.scheduler.update(batch, result, None if first_run else returned - called)
        self._schedule_seconds += called - began + time.perf_counter() - returned
        self._counts += result.counts
        self._prompt_tokens += prefilled
        touched: dict[str, Request] = {}
        for seq, before in zip(batch.rows, known, strict=True):
            self._token_blocks += sum(seq.exit_layers[before:]) if batch.kind == "decode" else 0
            request = seq.request
            if self._requests.get(request.request_id) is not request:
                continue  # a request of the scheduler's own
            touched[request.request_id] = request
            self._detokenize(seq, seq.output_token_ids[before:])
            self._tokens += len(seq.output_token_ids) - before
        return ended + [self._output(request) for request in touched.values()]

    def stats(self) -> EngineStats:
        """Counts since the start and present load."""
        return EngineStats(
            **dataclasses.asdict(self._counts),
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            blocks_full_depth=self._counts.steps * self.config.model.n_layers,
            token_blocks=self._token_blocks,
            compilations=self.runner.compilations,
            schedule_seconds=self._schedule_seconds,
            preemptions=self.scheduler.num_preemptions,
            parkings=self.scheduler.num_parkings,
            requests_running=self.scheduler.num_running,
            requests_waiting=self.scheduler.num_waiting,
            pages_in_use=self.allocator.num_used,
            num_pages=self.allocator.num_pages,
        )

    def exit_complaint(self) -> str | None:
        """A message for the user if exits have cost more than they saved, see `ExitLedger.complaint`."""
        return None if self._ledger is None else self._ledger.complaint()

    def _end(self, request: Request, reason: FinishReason) -> RequestOutput:
        """End the unfinished answers of a request, whether they wait or run."""
        for seq in request.sequences:
            if seq.finish_reason is None:
                self.scheduler.finish(seq, reason)
                if seq in self._detokenizers:
                    self._detokenizers[seq].finish()
        return self._output(request)

    def _detokenize(self, seq: Sequence, new: Seq[int]) -> None:
        """Turn new tokens into text; a completed stop string ends the sequence there."""
        detokenizer = self._detokenizers.get(seq)
        if detokenizer is None:
            return
        detokenizer.append(*new)
        if detokenizer.stopped:
            seq.truncate(detokenizer.num_tokens)
        if seq.finish_reason is not None:
            detokenizer.finish()  # what was held back may complete a stop string, too
        if detokenizer.stopped:
            self.scheduler.finish(seq, "stop")

    def _output(self, request: Request) -> RequestOutput:
        """The answers to a request so far; a finished request is dropped."""
        texts = [self._detokenizers[seq].text if seq in self._detokenizers else "" for seq in request.sequences]
        outputs = tuple(map(CompletionOutput.of, request.sequences, texts))
        if request.finished:
            self._forget(request)
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            outputs,
            request.finished,
            RequestMetrics.of(request),
        )

    def _forget(self, request: Request) -> None:
        """Drop a finished request, and enter what exits cost and saved it where it asked their heads."""
        self._requests.pop(request.request_id, None)
        early_exit = request.params.early_exit
        asked_heads = early_exit is not None and early_exit.measure in LOGIT_MEASURES and request.may_exit
        if asked_heads and self._ledger is None:
            self._ledger = ExitLedger(self.config.model, self.config.scheduler.max_num_seqs)
        for seq in request.sequences:
            self._detokenizers.pop(seq, None)
            if asked_heads and self._ledger is not None:
                self._ledger.add(request.thresholds, seq.exit_counts)
