"""The engine: requests in, tokens out, one micro-batch at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Collection
from collections.abc import Sequence as Seq

from eejax.core import (
    LOGIT_MEASURES,
    CompletionOutput,
    Counts,
    EngineConfig,
    FinishReason,
    InvalidRequestError,
    LengthEstimate,
    MicroBatch,
    PromptLike,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    SchedulerConfig,
    Sequence,
    StepResult,
    require,
)
from eejax.device import Runner
from eejax.schedule import (
    QUESTION_TOKENS,
    ConstantPredictor,
    LengthPredictor,
    PageAllocator,
    Policy,
    Scheduler,
    StepCost,
)
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
        predictor: what tells the length of answers to the scheduler; by default nothing does.
        policy: instead of the one that `config.scheduler` names.
        calibrated: what tells "calibrated" thresholds; by default there are none.
    """

    def __init__(
        self,
        config: EngineConfig,
        params: dict,
        tokenizer: TextCodec | None = None,
        eos_ids: Collection[int] = (),
        *,
        predictor: LengthPredictor | None = None,
        policy: Policy | None = None,
        calibrated: CalibratedThresholds | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.calibrated = calibrated or CalibratedThresholds()
        self.runner = Runner(config, params)
        self.exit_ledger = ExitLedger(config.model, config.scheduler.max_num_seqs)
        self._requests: dict[str, Request] = {}
        self._detokenizers: dict[Sequence, Detokenizer] = {}
        self._questions: dict[Sequence, Request] = {}  # asked of the model -> the request that waits for its answer
        self._numbers = itertools.count()
        self._step_cost = StepCost(compacts=self.runner.compacts)
        self._reset(config.scheduler, policy, predictor, config.cache.num_pages)

    def reschedule(
        self,
        config: SchedulerConfig,
        *,
        predictor: LengthPredictor | None = None,
        policy: Policy | None = None,
        num_pages: int | None = None,
    ) -> None:
        """Schedule otherwise from now on, over the same weights, cache and compiled programs; counts start anew.

        Args:
            config: `max_chunk_steps` must be the one that decoding was compiled for.
            num_pages: pages to use of the cache; all of them when None.

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
        self._reset(config, policy, predictor, num_pages or have)

    def _reset(
        self, config: SchedulerConfig, policy: Policy | None, predictor: LengthPredictor | None, num_pages: int
    ) -> None:
        self.allocator = PageAllocator(num_pages)
        self.scheduler = Scheduler(
            config,
            self.allocator,
            page_size=self.config.cache.page_size,
            policy=policy,
            cost=self._step_cost,
            rebatching=self.config.decode.rebatching,
        )
        self._predictor = predictor or ConstantPredictor(None)
        self._counts = Counts()
        self._tokens = self._prompt_tokens = self._token_blocks = 0
        self._schedule_seconds = 0.0

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
            deadline: seconds from now; what is unfinished then ends with what it has, as `deadline`. One that is
                already past (0 or less) is reported by the next step, and nothing is run for it.

        Raises:
            InvalidRequestError: the prompt or its parameters do not fit this model; nothing was queued.
            CapacityError: the request could not run even with the whole cache to itself.
        """
        number = next(self._numbers)
        request_id = request_id or f"request-{number}"
        if request_id in self._requests:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        intake = Intake(self.config, self.tokenizer, self.eos_ids, self.allocator.num_pages, self.calibrated)
        request = intake.request(
            prompt, params, request_id=request_id, number=number, text=text, priority=priority, deadline=deadline
        )
        _estimate(request.sequences, self._predictor.predict(request.prompt_token_ids, request.max_tokens))
        self._requests[request.request_id] = request
        if self.tokenizer is not None:
            for seq in request.sequences:
                self._detokenizers[seq] = Detokenizer(self.tokenizer, tuple(params.stop))
        if not self._ask(request):
            self.scheduler.add(request.sequences)
        return request.request_id

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
            max_steps: decode steps at the most, below what the scheduler would choose.
        """
        ended = self._end_overdue()
        zero = time.perf_counter()
        batch = self.scheduler.schedule(max_steps)
        if batch is None:
            return ended
        called = time.perf_counter()
        prefilled = sum(seq.prefill_length - seq.num_cached for seq in batch.rows) if batch.kind == "prefill" else 0
        known = [len(seq.output_token_ids) for seq in batch.rows]
        programs = self.runner.programs
        result = self.runner.run(batch, wants_hidden=self._predictor.needs_hidden)
        returned = time.perf_counter()
        self.scheduler.update(batch, result)
        self._schedule_seconds += called - zero + time.perf_counter() - returned
        self._learn(batch, result, returned - called, first=self.runner.programs > programs)
        touched: dict[str, Request] = {}
        for seq, before in zip(batch.rows, known, strict=True):
            self._token_blocks += sum(seq.exit_layers[before:]) if batch.kind == "decode" else 0
            if seq in self._questions:
                self._understand(seq)
                continue
            touched[seq.request.request_id] = seq.request
            self._detokenize(seq, seq.output_token_ids[before:])
            self._tokens += len(seq.output_token_ids) - before
        self._prompt_tokens += prefilled
        self._counts += result.counts
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

    def _ask(self, request: Request) -> bool:
        """Ask the model how long the answer will be, if the predictor wants that and it fits; the request waits."""
        question = self._predictor.question(request.prompt_token_ids)
        limit = min(self.config.max_model_len, self.allocator.num_pages * self.config.cache.page_size)
        if question is None or self.tokenizer is None or len(question) + QUESTION_TOKENS > limit:
            return False
        asked = Request(
            request_id=f"length of {request.request_id}",
            prompt=None,
            prompt_token_ids=tuple(question),
            params=SamplingParams(temperature=0.0, max_tokens=QUESTION_TOKENS),
            max_tokens=QUESTION_TOKENS,
            thresholds=(math.inf,) * len(self.config.model.exits.layers),
            stop_token_ids=self.eos_ids,
            seed=0,
            priority=request.priority,
        )
        self._questions[asked.sequences[0]] = request
        self.scheduler.add(asked.sequences)
        return True

    def _understand(self, asked: Sequence) -> None:
        """When the model has said how long an answer will be, queue the request itself."""
        if asked.finish_reason is None:
            return
        request = self._questions.pop(asked)
        text = self.tokenizer.decode(asked.output_token_ids) if self.tokenizer else ""
        estimate = self._predictor.understand(text, request.max_tokens)
        if estimate is not None:
            _estimate(request.sequences, estimate)
        self.scheduler.add(request.sequences)

    def _learn(self, batch: MicroBatch, result: StepResult, seconds: float, first: bool) -> None:
        """Better estimates of lengths after prefill, and of what a step costs after decoding.

        Args:
            first: the program ran for the first time, so that the time to load or compile it is in `seconds`.
        """
        if batch.kind == "prefill":
            for seq, row in zip(batch.rows, result.rows, strict=True):
                if row.hidden is not None and seq.estimate is not None:
                    _estimate([seq], self._predictor.refine(seq.estimate, row.hidden, seq.request.max_tokens))
            return
        counts = result.counts
        if first or not counts.steps:
            return
        pages = -(-max(seq.num_tokens for seq in batch.rows) // self.config.cache.page_size)
        blocks = counts.steps * self.config.model.n_layers
        self._step_cost.observe(counts.blocks_run / blocks, counts.row_blocks / blocks, pages, seconds / counts.steps)

    def _end_overdue(self) -> list[RequestOutput]:
        """End the requests whose deadline has passed."""
        now = time.monotonic()
        late = [one for one in self._requests.values() if one.deadline is not None and one.deadline <= now]
        return [self._end(request, "deadline") for request in late]

    def _end(self, request: Request, reason: FinishReason) -> RequestOutput:
        """End what is unfinished of a request, wherever it stands."""
        asked = next((seq for seq, waiting in self._questions.items() if waiting is request), None)
        if asked is not None:
            self.scheduler.finish(asked, reason)
            del self._questions[asked]
        for seq in request.sequences:
            if seq.finish_reason is None:
                if asked is None:
                    self.scheduler.finish(seq, reason)
                else:  # the scheduler does not know it yet
                    seq.finish(reason)
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

    def _account(self, request: Request) -> None:
        """Enter what the exits cost and saved a finished request, if it asked their heads."""
        early_exit = request.params.early_exit
        if early_exit is not None and early_exit.measure in LOGIT_MEASURES and request.may_leave:
            for seq in request.sequences:
                self.exit_ledger.add(request.thresholds, seq.exit_counts)

    def _output(self, request: Request) -> RequestOutput:
        """What there is of a request; when it is finished, forget it."""
        outputs = tuple(
            CompletionOutput(
                index=seq.index,
                text=self._detokenizers[seq].text if seq in self._detokenizers else "",
                token_ids=tuple(seq.output_token_ids),
                logprobs=None if request.params.logprobs is None else tuple(seq.logprobs),
                exit_layers=tuple(seq.exit_layers),
                finish_reason=seq.finish_reason,
            )
            for seq in request.sequences
        )
        finished = request.finished
        if finished:
            self._requests.pop(request.request_id, None)
            self._account(request)
            for seq in request.sequences:
                self._detokenizers.pop(seq, None)
        firsts = [seq.first_token_time for seq in request.sequences if seq.first_token_time is not None]
        lasts = [seq.finish_time for seq in request.sequences if seq.finish_time is not None]
        metrics = RequestMetrics(
            arrival_time=request.arrival_time,
            first_token_time=min(firsts, default=None),
            finish_time=max(lasts) if finished else None,
            preemptions=sum(seq.preemptions for seq in request.sequences),
            parkings=sum(seq.parkings for seq in request.sequences),
        )
        return RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, outputs, finished, metrics)


def _estimate(sequences: Seq[Sequence], estimate: LengthEstimate) -> None:
    """Take over what a predictor said, made sane: lengths from 1 to the request's limit."""
    for seq in sequences:
        seq.estimate = LengthEstimate.of(estimate.quantiles, seq.request.max_tokens)
        seq.promised_tokens = 0  # so that the policy looks at it
