"""Validation: from a user's prompt and parameters to a request that can be served, or an error. No device work."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from eejax.core import (
    CALIBRATED,
    CapacityError,
    EngineConfig,
    InvalidRequestError,
    PromptLike,
    Request,
    SamplingParams,
    TokenizerError,
    is_number,
)
from eejax.schedule import pages_needed
from eejax.serve.calibration import CalibratedThresholds


class TextCodec(Protocol):
    """The part of a tokenizer that the engine needs."""

    bos_id: int | None
    cleans_up: bool

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Token ids to text."""
        ...


@dataclass(frozen=True, slots=True)
class Intake:
    """Validates requests for one engine.

    Attributes:
        eos_ids: tokens that end an answer unless the request ignores them.
        num_pages: pages that one request may take at most.
        calibrated: gives the model's "calibrated" thresholds; called only for requests that want them.
    """

    config: EngineConfig
    tokenizer: TextCodec | None
    eos_ids: frozenset[int]
    num_pages: int
    calibrated: Callable[[], CalibratedThresholds]

    def request(
        self,
        prompt: PromptLike,
        params: SamplingParams,
        *,
        request_id: str,
        number: int,
        text: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Request:
        """A validated request. The arguments are those of `Engine.add_request`.

        Args:
            number: of the request; the seed of a request without one derives from it.

        Raises:
            InvalidRequestError: the prompt or its parameters do not fit this model.
            CapacityError: it could not run even with the whole cache to itself.
        """
        model, limit = self.config.model, self.config.max_model_len
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"sampling parameters must be SamplingParams, got {params!r}")
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise InvalidRequestError(f"priority must be an integer, got {priority!r}")
        if deadline is not None and not (is_number(deadline) and math.isfinite(deadline)):
            raise InvalidRequestError(f"deadline must be a number of seconds from now, got {deadline!r}")
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
        needed = pages_needed(len(ids), max_tokens, self.config.cache.page_size)
        if needed > self.num_pages:
            raise CapacityError(
                f"{len(ids)} prompt tokens and {max_tokens} answer tokens need {needed} pages of "
                f"{self.config.cache.page_size} tokens; the cache has {self.num_pages}"
            )
        early_exit, thresholds = params.early_exit, ()
        if early_exit is not None and early_exit.threshold == CALIBRATED:
            thresholds = self.calibrated().thresholds_for(early_exit, model)
        elif early_exit is not None:
            thresholds = early_exit.thresholds_for(model)
        ends = frozenset() if params.ignore_eos else self.eos_ids
        request = Request(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else text,
            prompt_token_ids=ids,
            params=params,
            max_tokens=max_tokens,
            thresholds=thresholds or (math.inf,) * len(model.exits.layers),
            stop_token_ids=ends.union(params.stop_token_ids),
            seed=(self.config.seed + number) % 2**32 if params.seed is None else params.seed,
            priority=priority,
        )
        request.deadline = None if deadline is None else request.arrival_time + deadline
        return request

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
