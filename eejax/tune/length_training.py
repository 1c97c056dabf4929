"""Length heads from a model's own answers: training, and how well each predictor does.

`length_labels.py` makes the labels. The paper (arXiv 2305.13144) learns the longest of a prompt's answers; here every
answer is one sample of the distribution, and the heads learn its quantiles.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from eejax.core import (
    LEVELS,
    LengthEstimate,
    MicroBatch,
    PredictorName,
    PromptLike,
    Request,
    SamplingParams,
    is_number,
    require,
    require_choice,
    require_positive_int,
    require_seed,
)
from eejax.model import load_checkpoint, load_config
from eejax.schedule import (
    QUESTION_TOKENS,
    LengthHeads,
    PerceptionPredictor,
    make_predictor,
    said_number,
    save_length_heads,
)
from eejax.serve import LLM
from eejax.text import load_end_tokens, load_tokenizer, prompt_ids
from eejax.tune.length_fit import FOLDS, fit_heads, scores
from eejax.tune.length_labels import LabelledPrompt, choose_prompts, make_labels, read_labels, require_enough

LengthTarget = Literal["every", "max"]

FEWEST_NUMBERS = 20
"""Numbers said by the model from which on their spread is measured."""


@dataclass(frozen=True, slots=True)
class LengthOptions:
    """How labels are made and split.

    Attributes:
        num_prompts: prompts to use, equally many of each file; all when None.
        temperatures: at which every prompt is answered, once at each and twice at the middle one.
        max_tokens: of an answer.
        hold_out: share of the prompts on which predictors are measured and which they do not learn from.
        target: what heads learn: `every` answer's length, or the `max` of a prompt's answers, as the paper.
        seed: of the choice of prompts, their split, and the answers.
    """

    num_prompts: int | None = None
    temperatures: tuple[float, ...] = (0.3, 0.7, 1.0)
    max_tokens: int = 512
    hold_out: float = 0.2
    target: LengthTarget = "every"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_prompts is not None:
            require_positive_int("LengthOptions", num_prompts=self.num_prompts)
        require_positive_int("LengthOptions", max_tokens=self.max_tokens)
        require(
            bool(self.temperatures) and all(is_number(t) and 0 < t <= 1000 for t in self.temperatures),
            f"LengthOptions.temperatures must be numbers above 0, got {self.temperatures!r}",
        )
        require(
            is_number(self.hold_out) and 0 < self.hold_out < 1,
            f"LengthOptions.hold_out must be a number between 0 and 1, got {self.hold_out!r}",
        )
        require_choice("LengthOptions", LengthTarget, target=self.target)
        require_seed("LengthOptions", self.seed)


def train_length(
    path: str | Path,
    prompts: Sequence[str | Path] = (),
    *,
    labels: str | Path | None = None,
    labels_out: str | Path | None = None,
    options: LengthOptions | None = None,
) -> tuple[dict[str, Any], Path]:
    """Train length heads for the model in `path`, and store them there.

    Args:
        path: an eejax checkpoint or a Hugging Face folder, with a tokenizer.
        prompts: files that `eejax.text.prompts.read_sourced_prompts` reads.
        labels: a file of labels made before, in place of prompts; the model answers nothing then.
        labels_out: where to write the labels.

    Returns:
        The report, and the file written. Per source and over all, for each predictor and for the noise floor (two
        answers to one prompt, one as the prediction of the other), against the pair of answers at one temperature:
        mean absolute error of the median in tokens; share within 50 tokens, within 100, and within a factor of two;
        Spearman's rank correlation; mean pinball loss of the quantiles' logarithms.

    Raises:
        ConfigError, CheckpointError, TokenizerError: an option or a file is not as it must be; before any work.
    """
    options = options or LengthOptions()
    require(bool(prompts) != (labels is not None), "give files of prompts, or labels made from them, not both")
    require(labels is None or labels_out is None, "labels that are read are not written again; leave out labels_out")
    known = None if labels is None else read_labels(labels)
    chosen = choose_prompts(prompts, options.num_prompts, options.seed)
    require_enough(len(chosen) if known is None else len(known))
    require(os.access(path, os.W_OK), f"length heads are stored beside the model, and {path} cannot be written to")
    limit = load_config(path).max_position
    require(
        known is not None or options.max_tokens < limit,
        f"max_tokens must be below the model's {limit} positions, got {options.max_tokens}",
    )
    tokenizer = load_tokenizer(path)
    model, params = load_checkpoint(path)
    llm = LLM.from_params(model, params, tokenizer=tokenizer, eos_id=load_end_tokens(path, tokenizer))
    if known is None:
        out = None if labels_out is None else Path(labels_out)
        known = make_labels(llm, chosen, options.temperatures, options.max_tokens, options.seed, out)
    ids = [prompt_ids(llm.tokenizer, one.prompt) for one in known]
    hidden = hidden_states(llm, ids)
    order = np.random.default_rng([options.seed, 2]).permutation(len(known)).tolist()
    size = min(max(1, round(options.hold_out * len(known))), len(known) - FOLDS)
    test, train = order[:size], order[size:]
    lengths = np.array([one.lengths for one in known])
    targets = lengths.max(axis=1, keepdims=True) if options.target == "max" else lengths
    heads = fit_heads([ids[i] for i in train], hidden[train], targets[train], known[0].max_tokens)
    said = ask(llm, [ids[i] for i in test])
    heads = replace(heads, perception=_spread([known[i] for i in test], said))
    made = {
        "training_prompts": len(train),
        "held_out_prompts": len(test),
        "temperatures": list(known[0].temperatures),
        "max_tokens": known[0].max_tokens,
        "target": options.target,
        "seed": options.seed,
    }
    heads = replace(heads, about=made)
    file = save_length_heads(path, heads)
    report = {
        **made,
        "numbers_said": sum(said_number(text) is not None for text in said),
        "evaluation": _evaluate(llm, heads, [known[i] for i in test], [ids[i] for i in test], hidden[test], said),
    }
    return report, file


def hidden_states(llm: LLM, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """The last token's hidden state of every prompt, `[P, hidden_size]` float32, as prefill hands it out.

    Args:
        llm: idle, so that all its pages are free.
    """
    config = llm.config
    found = []
    for ids in prompts:
        limit = config.max_model_len
        require(len(ids) < limit, f"a prompt has {len(ids)} tokens; the model takes fewer than {limit}")
        never = (float("inf"),) * len(config.model.exits.layers)
        [seq] = Request("prompt", None, tuple(ids), SamplingParams(temperature=0.0), 1, never, frozenset(), 0).sequences
        seq.pages = list(range(config.pages_per_seq))
        found.append(llm.engine.runner.run(MicroBatch("prefill", (seq,)), wants_hidden=True).rows[0].hidden)
    return np.stack(found)


def ask(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[str]:
    """What the model answers when asked how long its answers would be; empty where the question does not fit."""
    assert llm.tokenizer is not None
    predictor = PerceptionPredictor(None, llm.tokenizer)
    questions: list[PromptLike] = [{"prompt_token_ids": predictor.question(ids)} for ids in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=QUESTION_TOKENS)
    outputs = llm.generate(questions, params, use_tqdm=False)
    return [output.outputs[0].text if output.outputs else "" for output in outputs]


def _spread(labels: Sequence[LabelledPrompt], said: Sequence[str]) -> np.ndarray | None:
    """Quantiles of the logarithm of length over number; None where the model said too few numbers."""
    logs = [
        np.log(np.array(label.lengths) / number)
        for label, text in zip(labels, said, strict=True)
        if (number := said_number(text)) is not None
    ]
    return np.quantile(logs, LEVELS).astype(np.float32) if len(logs) >= FEWEST_NUMBERS else None


def _evaluate(
    llm: LLM,
    heads: LengthHeads,
    labels: Sequence[LabelledPrompt],
    prompts: Sequence[list[int]],
    hidden: np.ndarray,
    said: Sequence[str],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """The report's figures by source and predictor; the spread of perception is that of these same prompts."""
    limit = labels[0].max_tokens
    truth = np.array([one.lengths[one.pair : one.pair + 2] for one in labels])
    found: dict[str, list[LengthEstimate]] = {}
    names: tuple[PredictorName, ...] = get_args(PredictorName)
    for name in names:
        predictor = make_predictor(name, heads, llm.tokenizer)
        found[name] = []
        for ids, state, text in zip(prompts, hidden, said, strict=True):
            estimate = predictor.refine(predictor.predict(ids, limit), state, limit)
            said_by = predictor.understand(text, limit) if isinstance(predictor, PerceptionPredictor) else None
            found[name].append(said_by or estimate)
    sources = np.array([one.source for one in labels])
    groups = {name: sources == name for name in sorted(set(sources.tolist()))}
    report = {}
    for source, which in {**groups, "all": np.ones(len(labels), bool)}.items():
        rows = {
            name: scores(np.array([[one.quantiles] * 2 for one in estimates])[which], truth[which])
            for name, estimates in found.items()
        }
        other = np.repeat(truth[:, ::-1, None], len(LEVELS), axis=2)
        report[source] = {**rows, "noise floor": scores(other[which], truth[which])}
    return report
