"""The engine: requests in, tokens out, one micro-batch at a time."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from eejax.config import EngineConfig
from eejax.detokenizer import Detokenizer
from eejax.errors import CapacityError, InvalidRequestError, TokenizerError
from eejax.page_allocator import PageAllocator
from eejax.params import SamplingParams
from eejax.request import CompletionOutput, PromptLike, Request, RequestMetrics, RequestOutput, Sequence
from eejax.runner import Runner
from eejax.scheduler import Scheduler


class TextCodec(Protocol):
    """What the engine needs of a tokenizer."""

    bos_id: int | None
    cleans_up: bool

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Token ids to text."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine started, and its present load.

    Attributes:
        tokens: answer tokens produced; `prompt_tokens` were prefilled (again after a preemption).
        steps: decode steps; one step is one token for every row of a micro-batch.
        blocks_run: blocks executed for whole batches while decoding; at full depth it would be `blocks_full_depth`.
        token_blocks: blocks that the decoded tokens themselves ran, summed over tokens.
        heads_run: vocabulary projections executed while decoding.
        compilations: programs that XLA compiled; those found in the compilation cache do not count.
    """

    tokens: int
    prompt_tokens: int
    steps: int
    blocks_run: int
    blocks_full_depth: int
    token_blocks: int
    heads_run: int
    compilations: int
    preemptions: int
    requests_running: int
    requests_waiting: int
    pages_in_use: int
    num_pages: int


class Engine:
    """Iteration-level continuous batching (Orca; arXiv 2407.20272, sec. 3) with early exits.

    Args:
        params: the model's parameters (nested dict, `eejax.model.init_params` gives the form).
        tokenizer: needed for text prompts, stop strings and text output.
        eos_ids: tokens that end an answer unless the request ignores them.
    """

    def __init__(
        self, config: EngineConfig, params: dict, tokenizer: TextCodec | None = None, eos_ids: Collection[int] = ()
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.allocator = PageAllocator(config.cache.num_pages)
        self.scheduler = Scheduler(config.scheduler, self.allocator, page_size=config.cache.page_size)
        self.runner = Runner(config, params)
        self._requests: dict[str, Request] = {}
        self._detokenizers: dict[Sequence, Detokenizer] = {}
        self._numbers = itertools.count()
        self._counts = dict.fromkeys(
            ("tokens", "prompt_tokens", "steps", "blocks_run", "blocks_full_depth", "token_blocks", "heads_run"), 0
        )

    @property
    def has_unfinished(self) -> bool:
        """Whether any request still waits or runs."""
        return bool(self._requests)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether this request still waits or runs."""
        return request_id in self._requests

    def add_request(
        self, prompt: PromptLike, params: SamplingParams, request_id: str | None = None, *, text: str | None = None
    ) -> str:
        """Queue a request and return its id.

        Args:
            prompt: text, or `{"prompt_token_ids": [...]}`. A text that spells BOS itself gets no second one.
            request_id: must not be in use; numbered when not given.
            text: what token ids were made from, for `RequestOutput.prompt`.

        Raises:
            InvalidRequestError: the prompt or its parameters do not fit this model; nothing was queued.
            CapacityError: the request could not run even with the whole cache to itself.
        """
        number = next(self._numbers)
        request = self._validated(prompt, params, request_id or f"request-{number}", number, text)
        self._requests[request.request_id] = request
        if self.tokenizer is not None:
            for seq in request.sequences:
                self._detokenizers[seq] = Detokenizer(self.tokenizer, tuple(params.stop))
        self.scheduler.add(request.sequences)
        return request.request_id

    def abort(self, request_id: str) -> RequestOutput:
        """End a request now and free its pages. Returns what it had produced.

        Raises:
            InvalidRequestError: no such request is waiting or running.
        """
        if request_id not in self._requests:
            raise InvalidRequestError(f"request {request_id!r} is not waiting or running")
        request = self._requests[request_id]
        for seq in request.sequences:
            if seq.finish_reason is None:
                self.scheduler.finish(seq, "abort")
                if seq in self._detokenizers:
                    self._detokenizers[seq].finish()
        return self._output(request)

    def step(self, max_steps: int | None = None) -> list[RequestOutput]:
        """Run one micro-batch. Returns the requests that got tokens or finished, with everything they have so far.

        Args:
            max_steps: decode steps at the most, below what the scheduler would choose.
        """
        batch = self.scheduler.schedule(max_steps)
        if batch is None:
            return []
        prefilled = sum(seq.prefill_length - seq.num_cached for seq in batch.rows) if batch.kind == "prefill" else 0
        known = [len(seq.output_token_ids) for seq in batch.rows]
        result = self.runner.run(batch)
        self.scheduler.update(batch, result)
        touched: dict[str, Request] = {}
        for seq, before in zip(batch.rows, known, strict=True):
            touched[seq.request.request_id] = seq.request
            self._detokenize(seq, seq.output_token_ids[before:])
            self._counts["tokens"] += len(seq.output_token_ids) - before
            self._counts["token_blocks"] += sum(seq.exit_layers[before:]) if batch.kind == "decode" else 0
        self._counts["prompt_tokens"] += prefilled
        self._counts["steps"] += result.steps
        self._counts["blocks_run"] += result.blocks_run
        self._counts["blocks_full_depth"] += result.steps * self.config.model.n_layers
        self._counts["heads_run"] += result.heads_run
        return [self._output(request) for request in touched.values()]

    def stats(self) -> EngineStats:
        """Counts since the start and present load."""
        return EngineStats(
            **self._counts,
            compilations=self.runner.compilations,
            preemptions=self.scheduler.num_preemptions,
            requests_running=self.scheduler.num_running,
            requests_waiting=self.scheduler.num_waiting,
            pages_in_use=self.allocator.num_used,
            num_pages=self.config.cache.num_pages,
        )

    def _validated(
        self, prompt: PromptLike, params: SamplingParams, request_id: str, number: int, text: str | None
    ) -> Request:
        model, limit = self.config.model, self.config.max_model_len
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"sampling parameters must be SamplingParams, got {params!r}")
        if request_id in self._requests:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError(f"stop strings {list(params.stop)} need a tokenizer, and this engine has none")
        bad = [token for token in params.stop_token_ids if token >= model.vocab_size]
        if bad:
            raise InvalidRequestError(f"stop_token_ids {bad} are outside the vocabulary (0..{model.vocab_size - 1})")
        ids = self._token_ids(prompt)
        if len(ids) >= limit:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens; at most {limit - 1} fit, as max_model_len is {limit} "
                "and an answer needs one"
            )
        max_tokens = min(params.max_tokens or limit, limit - len(ids))
        needed = self.scheduler.pages_needed(len(ids), max_tokens)
        if needed > self.config.cache.num_pages:
            raise CapacityError(
                f"{len(ids)} prompt tokens and {max_tokens} answer tokens need {needed} pages of "
                f"{self.config.cache.page_size} tokens; the cache has {self.config.cache.num_pages}"
            )
        thresholds = params.early_exit.thresholds_for(model) if params.early_exit else ()
        ends = frozenset() if params.ignore_eos else self.eos_ids
        return Request(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else text,
            prompt_token_ids=ids,
            params=params,
            max_tokens=max_tokens,
            thresholds=thresholds or (float("inf"),) * len(model.exits.layers),
            stop_token_ids=ends.union(params.stop_token_ids),
            seed=(self.config.seed + number) % 2**32 if params.seed is None else params.seed,
        )

    def _token_ids(self, prompt: PromptLike) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError("a text prompt needs a tokenizer; give {'prompt_token_ids': [...]} instead")
            if not prompt:
                raise InvalidRequestError("the prompt is empty")
            try:
                ids: Seq[int] = self.tokenizer.encode(prompt, add_bos=False)
                if list(ids[:1]) != [self.tokenizer.bos_id]:
                    ids = self.tokenizer.encode(prompt)
            except TokenizerError as error:
                raise InvalidRequestError(f"the prompt cannot be tokenised: {error}") from error
        elif isinstance(prompt, dict) and set(prompt) == {"prompt_token_ids"}:
            ids = prompt["prompt_token_ids"]
        else:
            raise InvalidRequestError(f"a prompt must be text or {{'prompt_token_ids': [...]}}, got {prompt!r:.200}")
        if not isinstance(ids, list | tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise InvalidRequestError(f"prompt_token_ids must be a list of integers, got {ids!r:.200}")
        if not ids:
            raise InvalidRequestError("the prompt is empty")
        vocabulary = self.config.model.vocab_size
        bad = [i for i in ids if not 0 <= i < vocabulary]
        if bad:
            raise InvalidRequestError(f"token ids {bad[:8]} are outside the vocabulary (0..{vocabulary - 1})")
        return tuple(ids)

    def _detokenize(self, seq: Sequence, new: Seq[int]) -> None:
        """Turn new tokens into text; a completed stop string ends the sequence there."""
        detokenizer = self._detokenizers.get(seq)
        if detokenizer is None:
            return
        kept = len(seq.output_token_ids) - len(new)
        for count, token in enumerate(new, start=1):
            detokenizer.append(token)
            if detokenizer.stopped:
                seq.truncate(kept + count)
                break
        if seq.finish_reason is not None:
            detokenizer.finish()  # what was held back may complete a stop string, too
        if detokenizer.stopped:
            self.scheduler.finish(seq, "stop")

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
            for seq in request.sequences:
                self._detokenizers.pop(seq, None)
        firsts = [seq.first_token_time for seq in request.sequences if seq.first_token_time is not None]
        lasts = [seq.finish_time for seq in request.sequences if seq.finish_time is not None]
        metrics = RequestMetrics(
            arrival_time=request.arrival_time,
            first_token_time=min(firsts, default=None),
            finish_time=max(lasts) if finished else None,
            preemptions=sum(seq.preemptions for seq in request.sequences),
        )
        return RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, outputs, finished, metrics)
