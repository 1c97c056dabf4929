"""The quality half of `bench.exits`: how close answers under early exit come to those of the full-depth model.

Answers do not depend on their batch nor on the rule that runs it, so each setting is asked once, in full batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.cost import ModelCost, ideal_from_bytes, ideal_from_operations
from bench.rounds import answer_costs, request_params
from eejax import LLM, EarlyExitParams
from eejax.core import PromptLike, RequestOutput
from eejax.tune import agreement, rouge_l


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Text for the model to predict: token ids of documents, and their bytes without those of each first token."""

    documents: Sequence[np.ndarray]
    text_bytes: int


class Quality:
    """Greedy answers of the full-depth model to `prompts`, and what others come to beside them.

    Args:
        cost: of the model's parts.
        max_tokens: of an answer; it may end before.
        held_out: text for bits per byte, where there is any.
    """

    def __init__(
        self,
        llm: LLM,
        cost: ModelCost,
        prompts: list[PromptLike],
        *,
        max_tokens: int,
        seed: int,
        held_out: HeldOut | None = None,
    ) -> None:
        self._llm, self._cost, self._prompts, self._held_out = llm, cost, prompts, held_out
        self._max_tokens, self._seed = max_tokens, seed
        self._full = self._answers(None)

    def _answers(self, early_exit: EarlyExitParams | None) -> list[RequestOutput]:
        params = request_params(len(self._prompts), self._max_tokens, self._seed, early_exit, ignore_eos=False)
        outputs = self._llm.generate(self._prompts, params, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs

    def of(self, early_exit: EarlyExitParams | None) -> dict[str, Any]:
        """Figures of one setting; None is full depth itself.

        Exits are those of decoded tokens; the first of an answer is prefill's. `agreement` is the mean over answers of
        the share of decoded tokens that full depth would have chosen after the same text; `agreement_of_tokens` the
        same share over all tokens. `rouge_l` (of words, of ids without a tokenizer) and `identical` compare with the
        answer that full depth gives. The ideal speed-ups are of these very tokens (`bench.cost`).
        """
        outputs = self._full if early_exit is None else self._answers(early_exit)
        config = self._llm.config.model
        tokens = [
            token
            for output in outputs
            for token in answer_costs(output.outputs[0].exit_layers, len(output.prompt_token_ids), config, early_exit)
        ]
        layers = Counter(token.exit_layer for token in tokens)
        agreements = [self._agreement(output) for output in outputs]
        pairs = [(mine.outputs[0], full.outputs[0]) for mine, full in zip(outputs, self._full, strict=True)]
        as_text = self._llm.tokenizer is not None
        overlaps = [rouge_l(a.text, b.text) if as_text else rouge_l(a.token_ids, b.token_ids) for a, b in pairs]
        weights = [len(output.outputs[0].token_ids) - 1 for output in outputs]
        return {
            "decoded_tokens": len(tokens),
            "mean_exit_layer": sum(layers.elements()) / max(1, len(tokens)),
            "tokens_at_exit": {str(layer): layers[layer] for layer in config.exit_points},
            "share_at_exit": {str(layer): layers[layer] / max(1, len(tokens)) for layer in config.exit_points},
            "ideal_speedup_alone": ideal_from_bytes(self._cost, tokens) if tokens else None,
            "ideal_speedup_in_batch": ideal_from_operations(self._cost, tokens) if tokens else None,
            "agreement": float(np.mean(agreements)),
            "agreement_of_tokens": float(np.dot(agreements, weights) / max(1, sum(weights))),
            "rouge_l": float(np.mean(overlaps)),
            "identical": float(np.mean([a.token_ids == b.token_ids for a, b in pairs])),
            "bits_per_byte": None if self._held_out is None else self._bits_per_byte(self._held_out, early_exit),
        }

    def _agreement(self, output: RequestOutput) -> float:
        prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        choices = np.asarray(self._llm.engine.runner.score([*prompt, *answer], start=len(prompt)).choices)
        return agreement(answer, choices[len(prompt) - 1 :][: len(answer)].tolist())

    def _bits_per_byte(self, text: HeldOut, early_exit: EarlyExitParams | None) -> float:
        """The first token of a document is a prompt, the others run as decoding them would."""
        runner, config = self._llm.engine.runner, self._llm.config.model
        options: dict[str, Any] = {}
        if early_exit is not None:
            options = {"thresholds": early_exit.thresholds_for(config), "measure": early_exit.measure}
        nats = 0.0
        for ids in text.documents:
            scores = runner.score(ids.tolist(), start=1, **options)
            nats -= float(np.sum(np.asarray(scores.logprobs)[: len(ids) - 1], dtype=np.float64))
        return nats / math.log(2) / text.text_bytes
