"""The Python API: load a model, answer prompts."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, Unpack

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eejax.core import (
    CacheConfig,
    Choice,
    EngineConfig,
    ExitCostWarning,
    FillMode,
    FinishReason,
    InvalidRequestError,
    ModelConfig,
    PolicyName,
    PromptLike,
    RequestOutput,
    SamplingParams,
    SchedulerConfig,
    Step,
    announce,
    heard,
    named_options,
)
from eejax.model import leaves, load_checkpoint
from eejax.schedule import LengthPredictor
from eejax.serve.calibration import CalibratedThresholds
from eejax.serve.engine import Engine, EngineStats
from eejax.serve.options import (
    Options,
    check,
    choose_predictor,
    decode_config,
    default_num_pages,
    resolve_dtype,
    scheduler_config,
)
from eejax.text import Message, Tokenizer, has_tokenizer, load_end_tokens, load_tokenizer

log = logging.getLogger(__name__)

STREAM_STEPS = 4
"""Decode steps between two looks at a streamed answer: few, so that text flows; more than one, to spare the host."""


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """What is new of a streamed answer: text that is safe to show, and the tokens behind it with their exit layers.

    Text lags behind tokens where a character or a possible stop string is still incomplete.
    """

    text: str
    token_ids: tuple[int, ...]
    exit_layers: tuple[int, ...]
    finish_reason: FinishReason | None


@named_options
class LLM:
    """A model ready to answer.

    Args:
        path: an eejax checkpoint folder, or a Hugging Face folder, which is converted while it is read. Without a
            tokenizer in it, prompts must be token ids.
        dtype: `float32`, `bfloat16` or `float16`; by default float32 on CPU and bfloat16 elsewhere.
        max_model_len: tokens of prompt and answer together; the model's own limit by default.
        max_num_seqs: sequences decoded together at the most (32).
        num_pages: pages of the KV cache; by default enough for `max_num_seqs` sequences of `max_model_len` tokens, as
            far as memory allows (1 GiB on CPU).
        page_size: tokens per page.
        exit_layers: replaces the checkpoint's own exits. With `shared` heads any block can be one, else a subset.
            Thresholds that were calibrated for the checkpoint's exits do not hold for others, and are refused.
        seed: seeds requests that bring no seed.
        compaction, fill, rebatching: how a batch takes its exits, `DecodeConfig` says what each may be. Tokens are the
            same under all.
        scheduler: a policy (`fcfs`, `length` or `static`), or a `SchedulerConfig`.
        length_predictor: an object that tells lengths, instead of the one that the scheduler's configuration names.

    Raises:
        CheckpointError, TokenizerError: the folder is not a usable checkpoint.
        ConfigError: an option is not allowed; the message names it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        num_pages: int | None = None,
        page_size: int = 64,
        exit_layers: Seq[int] | None = None,
        seed: int = 0,
        scheduler: PolicyName | SchedulerConfig | None = None,
        length_predictor: LengthPredictor | None = None,
        compaction: Choice = "auto",
        fill: FillMode = "auto",
        rebatching: Choice = "auto",
    ) -> None:
        options = Options(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            num_pages=num_pages,
            page_size=page_size,
            exit_layers=exit_layers,
            seed=seed,
            scheduler=scheduler,
            length_predictor=length_predictor,
            compaction=compaction,
            fill=fill,
            rebatching=rebatching,
        )
        wanted = resolve_dtype(dtype)
        check(options)  # before anything is loaded
        folder = Path(path)
        tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
        predictor = choose_predictor(options, folder, tokenizer)
        start = time.perf_counter()
        announce(Step("weights", program=False))
        model, params = load_checkpoint(folder, dtype=wanted)
        announce(Step("weights", time.perf_counter() - start, program=False))
        self._build(model, params, tokenizer, load_end_tokens(folder, tokenizer), options, predictor, folder)

    @classmethod
    def from_params(
        cls,
        model: ModelConfig,
        params: dict,
        *,
        tokenizer: Tokenizer | None = None,
        eos_id: int | Collection[int] | None = None,
        dtype: str | None = None,
        **options: Unpack[Options],
    ) -> Self:
        """The same over parameters at hand (`eejax.model.init_params`), for instance random ones.

        Args:
            eos_id: the token that ends an answer, or several such tokens.
        """
        llm = cls.__new__(cls)
        wanted = resolve_dtype(dtype)
        check(options)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, wanted), params)
        eos_ids = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id
        llm._build(model, params, tokenizer, eos_ids, options, choose_predictor(options, None, tokenizer))
        return llm

    def _build(
        self,
        model: ModelConfig,
        params: dict,
        tokenizer: Tokenizer | None,
        eos_ids: Collection[int],
        options: Options,
        predictor: LengthPredictor,
        folder: Path | None = None,
    ) -> None:
        exit_layers = options.get("exit_layers")
        if exit_layers is not None:
            model = model.with_exit_layers(tuple(exit_layers))
            if "exits" in params:
                owned = {name: params["exits"][name] for name in model.exit_names} if model.exits.has_params else None
                params = {name: part for name, part in params.items() if name != "exits"}
                params |= {} if owned is None else {"exits": owned}
        max_model_len = options.get("max_model_len")
        length = model.max_position if max_model_len is None else max_model_len
        scheduler = scheduler_config(options)
        page_size, num_pages = options.get("page_size", 64), options.get("num_pages")
        if num_pages is None:
            itemsize = jax.tree.leaves(params)[0].dtype.itemsize
            num_pages = default_num_pages(model, length, scheduler.max_num_seqs, page_size, itemsize)
        self.config = EngineConfig(
            model=model,
            cache=CacheConfig(num_pages=num_pages, page_size=page_size),
            scheduler=scheduler,
            decode=decode_config(options),
            max_model_len=length,
            seed=options.get("seed", 0),
        )
        self.tokenizer = tokenizer
        calibrated = CalibratedThresholds(folder, lambda: leaves(self.engine.runner.params))
        start, what = time.perf_counter(), "kernels and KV cache"
        announce(Step(what, program=False))
        self.engine = Engine(self.config, params, tokenizer, eos_ids, predictor=predictor, calibrated=calibrated)
        announce(Step(what, time.perf_counter() - start, program=False))
        self._news: dict[str, RequestOutput | None] = {}  # of open streams: the latest output that was not passed on

    def generate(
        self,
        prompts: PromptLike | Seq[PromptLike],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Seq[int] = 0,
        deadline: float | Seq[float | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts; the outputs come in the order of the prompts.

        Args:
            prompts: text or `{"prompt_token_ids": [...]}`, one or a list.
            sampling_params: one for all, or one per prompt; `SamplingParams()` when not given.
            use_tqdm: show a progress bar on stderr; it also says what is being compiled.
            priority: lower numbers go first, whatever their length; one for all, or one per prompt.
            deadline: seconds from now, one for all or one per prompt. An answer that is unfinished then ends as it is,
                with the finish reason `deadline`; one whose deadline is past (0 or less) is not begun.

        Returns:
            One `RequestOutput` per prompt. In a list, a prompt that cannot be served has its `error` set and no
            outputs, and the others are answered.

        Raises:
            InvalidRequestError: a single prompt (not a list) cannot be served, or the numbers of prompts and
                parameters differ.
        """
        single = isinstance(prompts, str | dict)
        if not isinstance(prompts, str | dict | Iterable):
            raise InvalidRequestError(f"prompts must be text, {{'prompt_token_ids': [...]}} or a list, got {prompts!r}")
        items: list[PromptLike] = [prompts] if single else list(prompts)  # pyright: ignore[reportAssignmentType]
        texts = [prompt if isinstance(prompt, str) else None for prompt in items]
        return self._answer(items, texts, sampling_params, priority, deadline, single, use_tqdm)

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Seq[int] = 0,
        deadline: float | Seq[float | None] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, written as prompts by the model's own chat template.

        The template spells BOS where the model wants it; none is added.

        Args:
            messages: one conversation, `[{"role": "user", "content": ...}, ...]`, or a list of conversations.
            sampling_params: one for all, or one per conversation; `SamplingParams()` when not given.
            use_tqdm: show a progress bar on stderr.
            priority, deadline: as for `generate`.
            add_generation_prompt: end the prompt with the words that open an answer.
            chat_template_kwargs: more for the template, `tools` and `documents` for instance.

        Returns:
            One `RequestOutput` per conversation; its `prompt` is what the template wrote. In a list, a conversation
            that the template refuses, or that cannot be served, has its `error` set, and the others are answered.

        Raises:
            TokenizerError: the model has no tokenizer or no chat template.
            InvalidRequestError: a single conversation (not a list) cannot be served, or the numbers of conversations
                and parameters differ.
        """
        from eejax.text import chat_prompt  # with Jinja, for conversations only

        if not isinstance(messages, list | tuple):
            raise InvalidRequestError(f"messages must be a conversation or a list of them, got {messages!r:.200}")
        single = bool(messages) and isinstance(messages[0], Mapping)
        prompts: list[PromptLike | InvalidRequestError] = []
        texts: list[str | None] = []
        talks: Seq[Seq[Message]] = [messages] if single else messages  # pyright: ignore[reportAssignmentType]
        for talk in talks:
            text = None
            try:
                text, ids = chat_prompt(self.tokenizer, talk, add_generation_prompt, chat_template_kwargs or {})
                prompts.append({"prompt_token_ids": ids})
            except InvalidRequestError as error:
                prompts.append(error)
            texts.append(text)
        return self._answer(prompts, texts, sampling_params, priority, deadline, single, use_tqdm)

    def _answer(
        self,
        items: Seq[PromptLike | InvalidRequestError],
        texts: Seq[str | None],
        sampling_params: SamplingParams | Seq[SamplingParams] | None,
        priority: int | Seq[int],
        deadline: float | Seq[float | None] | None,
        single: bool,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Answer prompts, some of which may have been refused already; `texts` is what they say, where it is known."""
        wanted = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(wanted, SamplingParams | list | tuple):
            raise InvalidRequestError(f"sampling parameters must be SamplingParams or a list of them, got {wanted!r}")
        params = _per_prompt("sampling parameters", wanted, len(items))
        priorities = _per_prompt("priorities", priority, len(items))
        deadlines = _per_prompt("deadlines", deadline, len(items))
        outputs: dict[str, RequestOutput] = {}
        ids: list[str] = []
        try:
            together = zip(items, texts, params, priorities, deadlines, strict=True)
            for number, (prompt, text, one, rank, due) in enumerate(together):
                try:
                    if isinstance(prompt, InvalidRequestError):
                        raise prompt
                    ids.append(self.engine.add_request(prompt, one, text=text, priority=rank, deadline=due))
                except InvalidRequestError as error:
                    if single:
                        raise
                    log.warning("prompt %d is not served: %s", number, error)
                    ids.append(f"invalid-{number}")
                    outputs[ids[-1]] = RequestOutput(ids[-1], text, (), (), True, None, error)
            with _progress(use_tqdm) as bar:
                task = bar.add_task("answering", total=len(items), completed=len(outputs))

                def show(step: Step) -> None:
                    bar.update(task, description=str(step) if step.seconds is None else "answering")

                mine = set(ids)
                with heard(show):
                    while mine - outputs.keys():
                        for output in self._step():
                            if output.finished and output.request_id in mine:
                                outputs[output.request_id] = output
                                bar.update(task, completed=len(outputs))
        finally:
            self._abort_all(request for request in ids if request not in outputs)
        if (complaint := self.engine.exit_ledger.complaint()) is not None:
            warnings.warn(complaint, ExitCostWarning, stacklevel=3)  # at the caller of `generate` or `chat`
        return [outputs[request] for request in ids]

    def stream(self, prompt: PromptLike, params: SamplingParams | None = None) -> Iterator[StreamDelta]:
        """Answer one prompt piece by piece. The pieces' texts joined are the answer; closing the iterator aborts it.

        Raises:
            InvalidRequestError: the prompt or parameters do not fit, or `n` is not 1. Raised at the call itself.
        """
        params = SamplingParams() if params is None else params
        if isinstance(params, SamplingParams) and params.n != 1:
            raise InvalidRequestError(f"stream answers once, got n={params.n}")
        deltas = self._deltas(self.engine.add_request(prompt, params))
        next(deltas)  # into its `try`, so that closing it aborts the request even before the first piece
        return deltas

    def _deltas(self, request: str) -> Iterator[StreamDelta]:
        shown, seen, finished = 0, 0, False
        self._news[request] = None
        try:
            yield StreamDelta("", (), (), None)
            while not finished:
                output, self._news[request] = self._news[request], None
                if output is None:
                    self._step(STREAM_STEPS)
                    continue
                answer, finished = output.outputs[0], output.finished
                yield StreamDelta(
                    answer.text[shown:], answer.token_ids[seen:], answer.exit_layers[seen:], answer.finish_reason
                )
                shown, seen = len(answer.text), len(answer.token_ids)
        finally:
            del self._news[request]
            if not finished:
                self._abort_all([request])

    def _step(self, max_steps: int | None = None) -> list[RequestOutput]:
        """One step of the engine, whoever asks for it; what it has for open streams is kept until they look."""
        outputs = self.engine.step(max_steps)
        self._news.update((output.request_id, output) for output in outputs if output.request_id in self._news)
        return outputs

    def stats(self) -> EngineStats:
        """Counts since the model was loaded: tokens, steps, blocks, compilations, pages in use."""
        return self.engine.stats()

    def warm_up(self) -> None:
        """Compile every batch and prompt bucket now instead of on first use."""
        self.engine.runner.warm_up()

    def _abort_all(self, requests: Iterable[str]) -> None:
        for request in list(requests):
            if self.engine.is_unfinished(request):
                self.engine.abort(request)


def _per_prompt(what: str, given: Any, count: int) -> list[Any]:
    """One of `given` for each prompt, whether it was one for all or one each."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise InvalidRequestError(f"{len(given)} {what} for {count} prompts: give one, or one each")
    return list(given)


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not shown,
        transient=True,
    )
