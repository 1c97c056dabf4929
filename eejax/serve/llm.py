"""The Python API: load a model, answer prompts."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Self

import jax
import jax.numpy as jnp

from eejax.core import (
    EngineOptions,
    ExitCostWarning,
    InvalidRequestError,
    ModelConfig,
    PromptLike,
    RequestOutput,
    SamplingParams,
    announced,
    with_help,
)
from eejax.device import default_num_pages, resolve_dtype
from eejax.model import load_checkpoint, load_config
from eejax.schedule import LengthPredictor, load_length_heads, make_predictor
from eejax.serve.engine import Engine, EngineStats
from eejax.text import Message, Tokenizer, has_tokenizer, load_end_tokens, load_tokenizer

if TYPE_CHECKING:
    from eejax.serve.stream import StreamDelta

log = logging.getLogger(__name__)

type _Constructor[**P] = Callable[Concatenate[LLM, str | os.PathLike[str], P], None]


def _with_options[**P](_: Callable[P, EngineOptions]) -> Callable[[Callable[..., None]], _Constructor[P]]:
    """Tell type checkers and editors that a constructor's `**options` are those of `EngineOptions`."""
    return lambda constructor: constructor


class LLM:
    """A model that is ready to answer.

    Args:
        path: an eejax checkpoint folder, or a Hugging Face folder, which is converted while it is read. Without a
            tokenizer in it, prompts must be token ids.
        options: see below. `scheduler` may also be a `SchedulerConfig`, and `length_predictor` is a `LengthPredictor`.
            Thresholds that were calibrated for the checkpoint's exits are refused with other `exit_layers`.
            `DecodeConfig` explains `compaction`, `fill` and `rebatching`; tokens are the same under all of them.

    Raises:
        CheckpointError, TokenizerError: the folder is not a usable checkpoint.
        ConfigError: an option does not exist, or its value is not allowed; the message names it.
    """

    @_with_options(EngineOptions)
    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        wanted, folder = EngineOptions(**options), Path(path)
        tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
        predictor = _predictor(wanted, folder, tokenizer)
        with announced("weights"):
            model, params = load_checkpoint(folder, dtype=resolve_dtype(wanted.dtype))
        self._build(model, params, tokenizer, load_end_tokens(folder, tokenizer), wanted, predictor, folder)

    @classmethod
    def from_params(
        cls,
        model: ModelConfig,
        params: dict,
        *,
        tokenizer: Tokenizer | None = None,
        eos_id: int | Collection[int] | None = None,
        **options: Any,
    ) -> Self:
        """An `LLM` with the given parameters (`eejax.model.init_params` gives the form), for instance random ones.

        Args:
            eos_id: the token that ends an answer, or several such tokens.
            options: as for `LLM`.
        """
        llm, wanted = cls.__new__(cls), EngineOptions(**options)
        dtype = resolve_dtype(wanted.dtype)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        eos_ids = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id
        llm._build(model, params, tokenizer, eos_ids, wanted, _predictor(wanted, None, tokenizer), None)
        return llm

    def _build(
        self,
        model: ModelConfig,
        params: dict,
        tokenizer: Tokenizer | None,
        eos_ids: Collection[int],
        options: EngineOptions,
        predictor: LengthPredictor | None,
        folder: Path | None,
    ) -> None:
        if options.exit_layers is not None:
            model = model.with_exit_layers(tuple(options.exit_layers))
            params = {name: part for name, part in params.items() if name != "exits" or model.exits.has_params}
            if model.exits.has_params:
                params["exits"] = {name: params["exits"][name] for name in model.exit_names}
        length, slots = options.max_model_len or model.max_position, options.scheduler_config.max_num_seqs
        itemsize = jax.tree.leaves(params)[0].dtype.itemsize
        affordable = default_num_pages(model, length, slots, options.page_size, itemsize)
        self.config = options.engine_config(model, options.num_pages or affordable)
        self.tokenizer = tokenizer
        with announced("kernels and KV cache"):
            self.engine = Engine(self.config, params, tokenizer, eos_ids, predictor=predictor, folder=folder)
        self._news: dict[str, RequestOutput | None] = {}  # for each open stream, the latest output not yet passed on

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
            use_tqdm: show a progress bar on stderr; it also shows which program is being compiled.
            priority: prompts with lower numbers are answered first, whatever their length; one for all, or one per
                prompt.
            deadline: seconds from now, one for all or one per prompt. An answer that is unfinished then ends as it is,
                with the finish reason `deadline`; with a deadline of 0 or less it is not begun.

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
        given: list[PromptLike] = [prompts] if single else list(prompts)  # pyright: ignore[reportAssignmentType]
        items = [(prompt, prompt if isinstance(prompt, str) else None) for prompt in given]
        return self._answer(items, sampling_params, priority, deadline, single, use_tqdm)

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
        """Answer conversations, which the model's chat template turns into prompts.

        The template writes BOS where the model needs it; none is added.

        Args:
            messages: one conversation, `[{"role": "user", "content": ...}, ...]`, or a list of conversations.
            sampling_params: one for all, or one per conversation; `SamplingParams()` when not given.
            use_tqdm: show a progress bar on stderr.
            priority, deadline: as for `generate`.
            add_generation_prompt: end the prompt with the text that opens an answer.
            chat_template_kwargs: more variables for the template, for instance `tools` and `documents`.

        Returns:
            One `RequestOutput` per conversation; its `prompt` is the template's text. In a list, a conversation
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
        talks: Seq[Seq[Message]] = [messages] if single else messages  # pyright: ignore[reportAssignmentType]

        def prompt_of(talk: Seq[Message]) -> tuple[PromptLike | InvalidRequestError, str | None]:
            try:
                text, ids = chat_prompt(self.tokenizer, talk, add_generation_prompt, chat_template_kwargs or {})
            except InvalidRequestError as error:
                return error, None
            return {"prompt_token_ids": ids}, text

        return self._answer(list(map(prompt_of, talks)), sampling_params, priority, deadline, single, use_tqdm)

    def _answer(
        self,
        items: Seq[tuple[PromptLike | InvalidRequestError, str | None]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None,
        priority: int | Seq[int],
        deadline: float | Seq[float | None] | None,
        single: bool,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Answer prompts, except those that were refused already; with each comes its text, where it is known."""
        wanted = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(wanted, SamplingParams | list | tuple):
            raise InvalidRequestError(f"sampling parameters must be SamplingParams or a list of them, got {wanted!r}")
        params = _per_prompt("sampling parameters", wanted, len(items))
        priorities = _per_prompt("priorities", priority, len(items))
        deadlines = _per_prompt("deadlines", deadline, len(items))
        outputs: dict[str, RequestOutput] = {}
        ids: list[str] = []
        try:
            together = zip(items, params, priorities, deadlines, strict=True)
            for number, ((prompt, text), one, rank, due) in enumerate(together):
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
            with _progress(use_tqdm, len(items)) as show:
                show(len(outputs))
                mine = set(ids)
                while mine - outputs.keys():
                    for output in self._step():
                        if output.finished and output.request_id in mine:
                            outputs[output.request_id] = output
                            show(len(outputs))
        finally:
            self._abort_all(request for request in ids if request not in outputs)
        if (complaint := self.engine.exit_complaint()) is not None:
            warnings.warn(complaint, ExitCostWarning, stacklevel=3)  # at the caller of `generate` or `chat`
        return [outputs[request] for request in ids]

    def stream(self, prompt: PromptLike, params: SamplingParams | None = None) -> Iterator[StreamDelta]:
        """Answer one prompt piece by piece. The joined texts are the answer; closing the iterator aborts the request.

        Raises:
            InvalidRequestError: the prompt or parameters are not valid for this model, or `n` is not 1. It is raised by
                the call itself, not by the first piece.
        """
        params = SamplingParams() if params is None else params
        if isinstance(params, SamplingParams) and params.n != 1:
            raise InvalidRequestError(f"stream answers once, got n={params.n}")
        from eejax.serve.stream import deltas_of

        deltas = deltas_of(self.engine.add_request(prompt, params), self._news, self._step, self._abort_all)
        next(deltas)  # enter the `try`, so that closing the iterator before the first piece also aborts the request
        return deltas

    def _step(self, max_steps: int | None = None) -> list[RequestOutput]:
        """One step of the engine, for any caller; outputs of open streams are kept until the streams read them."""
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
    """A list with one value per prompt, from one value for all or a list of them."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise InvalidRequestError(f"{len(given)} {what} for {count} prompts: give one, or one each")
    return list(given)


def _predictor(options: EngineOptions, folder: Path | None, tokenizer: Tokenizer | None) -> LengthPredictor | None:
    """The predictor that is given or named, with the length heads in `folder`; None if the scheduler needs none.

    Raises:
        ConfigError: the predictor needs length heads or a tokenizer, and the model has none.
        CheckpointError: the length heads are not usable.
    """
    config = options.scheduler_config
    if options.length_predictor is not None or (config.predictor is None and config.policy != "length"):
        return options.length_predictor
    heads = None if folder is None else load_length_heads(folder, load_config(folder))
    return make_predictor(config.predictor, heads, tokenizer)


def _progress(shown: bool, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A function to call with the number of finished answers; with a progress bar if `shown`."""
    if not shown:
        return nullcontext(lambda done: None)
    from eejax.serve.progress import progress_bar

    return progress_bar(total)


LLM.__doc__ = with_help(LLM.__doc__, EngineOptions)
