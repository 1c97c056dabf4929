"""How bad early-exit answers are: losses of a model's answers against its own at full depth.

Losses are measured under the engine's own decode, in whatever batches it makes: a request's tokens do not depend on
its batch, so neither does its loss, and what is certified with it holds in every batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from eejax.core import EarlyExitParams, ExitCostWarning, PromptLike, SamplingParams, is_number, require
from eejax.serve import LLM
from eejax.text import prompt_ids


def rouge_l(answer: str | Sequence[int], reference: str | Sequence[int]) -> float:
    """ROUGE-L: F1 of the longest common subsequence (Lin 2004), of words between blanks, or of ids.

    Returns:
        A number in [0, 1]; 1 where both are empty, 0 where one of them is.
    """
    a, b = (text.split() if isinstance(text, str) else list(text) for text in (answer, reference))
    if not a or not b:
        return float(a == b)
    # Row by row: longest[j] is the length of the longest common subsequence of a[:i] and b[:j].
    longest = [0] * (len(b) + 1)
    for one in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = longest[j]
            longest[j] = diagonal + 1 if one == other else max(above, longest[j - 1])
            diagonal = above
    return 2 * longest[-1] / (len(a) + len(b))


def agreement(answer: Sequence[int], choices: Sequence[int]) -> float:
    """Share of an answer's decoded tokens that equal the full-depth model's greedy choice after the same text.

    The first token is left out, since prefill makes it at full depth. 1 where there is no other.

    Args:
        answer: token ids of the answer.
        choices: for each of them, what the full-depth model would have chosen in its place.
    """
    pairs = list(zip(answer, choices, strict=True))[1:]
    return sum(mine == full for mine, full in pairs) / len(pairs) if pairs else 1.0


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """An early-exit answer beside the full-depth one to the same prompt: what a loss looks at. Answers are greedy.

    Attributes:
        prompt, early, full_depth: token ids.
        early_text, full_depth_text: of the answers; empty without a tokenizer.
        choices: gives, for every token of `early`, the full-depth model's greedy choice after the same text (a forward
            pass of the model, where the answers differ).
    """

    prompt: tuple[int, ...]
    early: tuple[int, ...]
    full_depth: tuple[int, ...]
    early_text: str
    full_depth_text: str
    choices: Callable[[], Sequence[int]]


class Loss(Protocol):
    """How bad an answer is, from 0 (as good as full depth) to 1."""

    def __call__(self, pair: AnswerPair, /) -> float:
        """The loss of `pair.early`."""
        ...


def _disagreement(pair: AnswerPair) -> float:
    return 1.0 - agreement(pair.early, pair.choices())


def _rouge_l(pair: AnswerPair) -> float:
    if pair.full_depth_text or pair.early_text:
        return 1.0 - rouge_l(pair.early_text, pair.full_depth_text)
    return 1.0 - rouge_l(pair.early, pair.full_depth)


def _exact(pair: AnswerPair) -> float:
    return float(pair.early != pair.full_depth)


LOSSES: dict[str, Loss] = {"agreement": _disagreement, "rouge-l": _rouge_l, "exact": _exact}
"""`agreement`: share of decoded tokens that full depth would not have chosen after the same text. `rouge-l`: one minus
ROUGE-L with the full-depth answer. `exact`: 1 where the answers differ."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of all prompts at one threshold, and the blocks that a decoded token ran on average."""

    values: tuple[float, ...]
    mean_exit_layer: float


class LossMeter:
    """Answers the same prompts at different thresholds, and compares each answer with full depth.

    Args:
        llm: idle.
        prompts: token ids; each leaves room for an answer of `max_tokens`.
        loss: of an answer.
    """

    def __init__(self, llm: LLM, prompts: Sequence[Sequence[int]], loss: Loss, max_tokens: int) -> None:
        self._llm = llm
        self._prompts = [tuple(prompt) for prompt in prompts]
        self._loss = loss
        self._max_tokens = max_tokens
        self._full_depth = self._answers(None)

    def _answers(self, early_exit: EarlyExitParams | None) -> list[tuple[tuple[int, ...], str, tuple[int, ...]]]:
        """Ids, text and exit layers of every greedy answer."""
        params = SamplingParams(temperature=0.0, max_tokens=self._max_tokens, early_exit=early_exit)
        asked: list[PromptLike] = [{"prompt_token_ids": list(prompt)} for prompt in self._prompts]
        found = []
        with warnings.catch_warnings():
            # The grid begins with thresholds that hardly anything passes.
            warnings.simplefilter("ignore", ExitCostWarning)
            outputs = self._llm.generate(asked, params, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise output.error
            [answer] = output.outputs
            found.append((answer.token_ids, answer.text, answer.exit_layers))
        return found

    def measure(self, early_exit: EarlyExitParams) -> Losses:
        """Losses under `early_exit`, in the order of the prompts.

        Raises:
            ConfigError: a loss is no number in [0, 1].
        """
        losses, layers = [], []
        for prompt, early, full in zip(self._prompts, self._answers(early_exit), self._full_depth, strict=True):

            def choices(prompt: tuple[int, ...] = prompt, early: tuple = early, full: tuple = full) -> Sequence[int]:
                # An answer equal to full depth's consists of full depth's choices.
                return full[0] if early[0] == full[0] else full_depth_choices(self._llm, prompt, early[0])

            loss = self._loss(AnswerPair(prompt, early[0], full[0], early[1], full[1], choices))
            require(is_number(loss) and 0 <= loss <= 1, f"a loss must be a number in [0, 1], got {loss!r}")
            losses.append(float(loss))
            layers += early[2][1:]
        depth = self._llm.config.model.n_layers
        return Losses(tuple(losses), sum(layers) / len(layers) if layers else float(depth))


def full_depth_choices(llm: LLM, prompt: Sequence[int], answer: Sequence[int]) -> tuple[int, ...]:
    """For every token of an answer, what the full-depth model would have chosen after the same text."""
    scores = llm.engine.runner.score((*prompt, *answer), start=len(prompt))
    return tuple(scores.choices[len(prompt) - 1 : -1].tolist())


def usable_prompts(llm: LLM, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of the prompts that leave room for `max_tokens` more, as single messages where there is a template."""
    limit = llm.config.max_model_len - max_tokens
    return [ids for text in texts if 0 < len(ids := prompt_ids(llm.tokenizer, text)) <= limit]
