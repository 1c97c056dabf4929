"""Predictors of an answer's length: from the prompt, from its hidden state, or from what the model itself says.

A predictor gives an estimate when a request is submitted, and a better one when its prompt has been prefilled. No jax
here; a prediction takes well under a millisecond of the host's time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from eejax.core import LEVELS, InvalidRequestError, LengthEstimate, PredictorName, TokenizerError, require
from eejax.schedule.length_heads import PROMPT_BUCKETS, LengthHeads
from eejax.text import Tokenizer

QUESTION = (
    "Do not answer the request above. Instead, estimate how many tokens your answer to it would have. "
    "Output one number only."
)
"""The question of `PerceptionPredictor`, in the spirit of arXiv 2305.13144."""
QUESTION_TOKENS = 8
"""Tokens of the answer to the question at most."""
LARGEST_NUMBER = 100_000
"""A number above this is not taken for a length."""
SPREAD = tuple((np.log(2) * (2 * np.asarray(LEVELS) - 1) / 0.8).tolist())
"""Spread around a number that the model said, where none was measured: eight of ten answers within a factor of two."""
LARGEST_LOG = 30.0
"""No answer is longer than e to this power; larger ones would overflow."""


class LengthPredictor(Protocol):
    """Estimates lengths. `refine` need not be overridden.

    Attributes:
        needs_hidden: `refine` reads the hidden state, so the engine has to fetch it.
    """

    needs_hidden: bool = False

    def predict(self, prompt_token_ids: Sequence[int], max_tokens: int) -> LengthEstimate:
        """An estimate at submission, of an answer of at most `max_tokens` tokens."""
        ...

    def refine(self, estimate: LengthEstimate, hidden: np.ndarray, max_tokens: int) -> LengthEstimate:
        """A better estimate after prefill, from the last prompt token's `hidden` state (`[hidden_size]`)."""
        return estimate


class ConstantPredictor(LengthPredictor):
    """One distribution for every prompt: that of all answers in training, or without `heads` one that knows nothing."""

    def __init__(self, heads: LengthHeads | None) -> None:
        self._logs = None if heads is None else heads.marginal

    def predict(self, prompt_token_ids: Sequence[int], max_tokens: int) -> LengthEstimate:
        """The same quantiles whatever the prompt is."""
        return LengthEstimate.unknown(max_tokens) if self._logs is None else _estimate(self._logs, max_tokens)


class PromptPredictor(LengthPredictor):
    """Reads n-grams of the prompt; the model is not run."""

    def __init__(self, heads: LengthHeads) -> None:
        self._head = heads.prompt

    def predict(self, prompt_token_ids: Sequence[int], max_tokens: int) -> LengthEstimate:
        """Quantiles that are linear in the prompt's features."""
        return _read(self._head, prompt_features(prompt_token_ids), max_tokens)


class HiddenPredictor(PromptPredictor):
    """Reads the last prompt token's hidden state; before prefill it knows what `PromptPredictor` knows.

    The head also sees what was estimated before: n-grams show the template of a prompt, the hidden state its content.
    """

    needs_hidden = True

    def __init__(self, heads: LengthHeads) -> None:
        super().__init__(heads)
        self._hidden_head = heads.hidden

    def refine(self, estimate: LengthEstimate, hidden: np.ndarray, max_tokens: int) -> LengthEstimate:
        """Quantiles that are linear in the features of the hidden state and of the estimate."""
        before = np.asarray(estimate.quantiles)
        return _read(self._hidden_head, hidden_features(hidden, before), max_tokens)


class PerceptionPredictor(LengthPredictor):
    """Asks the model itself (arXiv 2305.13144); where it says no number, the estimate is `ConstantPredictor`'s.

    The engine runs `question` as a request of its own before the request itself, and gives its answer to `understand`.
    """

    def __init__(self, heads: LengthHeads | None, tokenizer: Tokenizer) -> None:
        measured = None if heads is None else heads.perception
        self._spread = np.asarray(SPREAD) if measured is None else measured
        self._turn = question_turn(tokenizer)
        self._fallback = ConstantPredictor(heads)

    def predict(self, prompt_token_ids: Sequence[int], max_tokens: int) -> LengthEstimate:
        """The constant's estimate, for requests whose question was not asked, or not answered with a number."""
        return self._fallback.predict(prompt_token_ids, max_tokens)

    def question(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt followed by one more turn, which asks for the length of its answer."""
        return [*prompt_token_ids, *self._turn]

    def understand(self, text: str, max_tokens: int) -> LengthEstimate | None:
        """The first number in `text`, spread by the errors that such numbers had in training; None without one."""
        number = said_number(text)
        if number is None:
            return None
        return _estimate(np.log(number) + self._spread, max_tokens)


def make_predictor(
    name: PredictorName | None, heads: LengthHeads | None, tokenizer: Tokenizer | None
) -> LengthPredictor:
    """The predictor called `name`; for None the best that there are heads for, `hidden` before `constant`.

    Raises:
        ConfigError: it needs heads or a tokenizer, and the model has none.
    """
    if name == "perception":
        require(tokenizer is not None, "predictor 'perception' asks the model in words, and it has no tokenizer")
        assert tokenizer is not None
        return PerceptionPredictor(heads, tokenizer)
    if name == "constant" or (name is None and heads is None):
        return ConstantPredictor(heads)
    require(
        heads is not None,
        f"predictor {name!r} needs length heads, and the checkpoint has none; make them with `eejax train-length PATH "
        "--prompts FILE`, or choose 'constant' or 'perception'",
    )
    assert heads is not None
    return PromptPredictor(heads) if name == "prompt" else HiddenPredictor(heads)


def prompt_features(prompt_token_ids: Sequence[int]) -> np.ndarray:
    """Hashed counts of the prompt's 1-, 2- and 3-grams, and its length.

    Returns:
        `[PROMPT_FEATURES]` float32: the square roots of the counts, as a vector of length one, then a tenth of the
        logarithm of the number of tokens.
    """
    one = np.asarray(prompt_token_ids, np.uint64) + np.uint64(1)
    prime, mixer = np.uint64(0x100000001B3), np.uint64(0x9E3779B97F4A7C15)
    two = one[:-1] * prime + one[1:]
    three = two[:-1] * prime + one[2:]
    grams = np.concatenate([one, two + (mixer >> np.uint64(8)), three + (mixer >> np.uint64(16))]) * mixer
    grams = (grams ^ (grams >> np.uint64(29))) * mixer
    shift = np.uint64(64 - (PROMPT_BUCKETS - 1).bit_length())
    counts = np.bincount((grams >> shift).astype(np.int64), minlength=PROMPT_BUCKETS)
    values = np.sqrt(counts / max(1, len(grams)))
    return np.append(values, 0.1 * np.log(max(1, len(one)))).astype(np.float32)


def hidden_features(hidden: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Hidden states divided by their root mean square, and the logarithms of the lengths estimated before them.

    Args:
        hidden: `[..., hidden_size]`.
        quantiles: `[..., Q]`, in tokens.

    Returns:
        `[..., hidden_size + Q]` float32.
    """
    wide = np.asarray(hidden, np.float64)
    with np.errstate(all="ignore"):  # numbers that are not finite give the estimate that knows nothing
        normal = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
        return np.concatenate([normal, np.log(quantiles)], axis=-1).astype(np.float32)


def said_number(text: str) -> float | None:
    """The first number in `text`, None where there is none from 1 to `LARGEST_NUMBER`."""
    found = re.search(r"\d[\d,]*(?:\.\d+)?", text)
    number = 0.0 if found is None else float(found.group().replace(",", ""))
    return number if 1 <= number <= LARGEST_NUMBER else None


def question_turn(tokenizer: Tokenizer) -> list[int]:
    """Token ids that follow a prompt and ask for the length of its answer.

    Where there is a chat template, that is what it writes between a prompt whose answer is empty and the next one.
    """
    user = {"role": "user", "content": "Hello"}
    if tokenizer.has_chat_template:
        talk = [user, {"role": "assistant", "content": ""}, {"role": "user", "content": QUESTION}]
        try:
            before, whole = tokenizer.apply_chat_template([user]), tokenizer.apply_chat_template(talk)
        except (TokenizerError, InvalidRequestError):  # a template without a second turn
            before, whole = "-", ""
        if whole.startswith(before):
            return tokenizer.encode(whole[len(before) :], add_bos=False)
    return tokenizer.encode(f"\n\n{QUESTION}\n", add_bos=False)


def _read(head: np.ndarray, features: np.ndarray, max_tokens: int) -> LengthEstimate:
    with np.errstate(all="ignore"):
        return _estimate(features @ head[:-1] + head[-1], max_tokens)


def _estimate(logs: np.ndarray, max_tokens: int) -> LengthEstimate:
    return LengthEstimate.of(np.exp(np.minimum(logs, LARGEST_LOG)).tolist(), max_tokens)
