"""Thresholds that keep a promise, from a model's own answers: losses against full depth, then Learn-then-Test.

Losses are measured under the engine's own decode, in whatever batches it makes: a request's tokens do not depend on
its batch, so neither does its loss, and what is certified here holds in every batch.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from eejax.core import (
    MODEL_MEASURES,
    EarlyExitParams,
    ExitCostWarning,
    Measure,
    ModelConfig,
    PromptLike,
    SamplingParams,
    is_number,
    require,
    require_positive_int,
    require_seed,
)
from eejax.model import leaves, load_config
from eejax.serve import LLM, Calibration, MeasureCalibration, fingerprint, load_calibration, save_calibration
from eejax.text import prompt_ids
from eejax.tune.length_training import choose_prompts
from eejax.tune.risk import check_bound, fixed_sequence, requests_needed
from eejax.tune.text_overlap import agreement, rouge_l

log = logging.getLogger(__name__)

PROBABILITIES = (0.99, 0.98, *(round(0.95 - 0.05 * i, 2) for i in range(19)))
COSINES = tuple(round(1 - 2 ** (-i / 3), 4) for i in range(24, 2, -1))
"""Neighbouring hidden states point nearly the same way, so steps are a constant factor of the distance to 1."""
GRIDS: dict[Measure, tuple[float, ...]] = {
    "softmax": PROBABILITIES,
    "margin": PROBABILITIES,
    "similarity": COSINES,
    "classifier": PROBABILITIES,
}
"""Thresholds to test, most cautious first. Fixed: a grid made from the calibration set would break the test."""


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
class CalibrationOptions:
    """What is to be promised, and how it is measured.

    Attributes:
        max_risk, confidence: with probability `confidence`, the expected loss of a request is at most `max_risk`.
        measures: to calibrate, each with a promise of its own. Who then picks the best of m of them by these same
            prompts should ask for a confidence of `1 - (1 - confidence) / m`.
        loss: one of `LOSSES`, or a function of an `AnswerPair`.
        grid: thresholds to test, chosen without a look at the prompts; `GRIDS` of the measure when None.
        max_tokens: of an answer.
        num_prompts: prompts to use, equally many of each file; all when None.
        seed: of the choice of prompts.
    """

    max_risk: float = 0.02
    confidence: float = 0.95
    measures: tuple[str, ...] = ("softmax",)
    loss: str | Loss = "agreement"
    grid: tuple[float, ...] | None = None
    max_tokens: int = 128
    num_prompts: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        me = "CalibrationOptions"
        check_bound(self.max_risk, self.confidence)
        require(bool(self.measures), f"{me}.measures is empty; there are {', '.join(MODEL_MEASURES)}")
        for name in self.measures:
            require(name in MODEL_MEASURES, f"{me}.measures must be of {', '.join(MODEL_MEASURES)}, got {name!r}")
        require(
            callable(self.loss) or self.loss in LOSSES,
            f"{me}.loss must be one of {', '.join(LOSSES)}, or a function, got {self.loss!r}",
        )
        if self.grid is not None:
            require(
                bool(self.grid) and all(is_number(one) and 0 <= one <= 1 for one in self.grid),
                f"{me}.grid must be thresholds in [0, 1], got {self.grid!r}",
            )
            object.__setattr__(self, "grid", tuple(sorted({float(one) for one in self.grid}, reverse=True)))
        require_positive_int(me, max_tokens=self.max_tokens)
        if self.num_prompts is not None:
            require_positive_int(me, num_prompts=self.num_prompts)
        require_seed(me, self.seed)

    @property
    def loss_name(self) -> str:
        """What to call the loss."""
        return self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", type(self.loss).__name__)

    def grid_of(self, measure: Measure) -> tuple[float, ...]:
        """Thresholds to test, most cautious first."""
        return GRIDS[measure] if self.grid is None else self.grid

    def require_enough(self, count: int) -> None:
        """Refuse a calibration set that could certify nothing, whatever its losses were."""
        needed = requests_needed(self.max_risk, self.confidence)
        require(
            count >= needed,
            f"{count} usable prompts can certify nothing: a risk of at most {self.max_risk:g} with confidence "
            f"{self.confidence:g} needs {needed}, even if no answer errs, and more if some do",
        )


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of all prompts at one threshold, and the blocks that a decoded token ran on average."""

    values: tuple[float, ...]
    mean_exit_layer: float


class LossMeter:
    """Answers the same prompts again and again, and holds each answer against full depth.

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
                # An answer that full depth gives as well is made of nothing but its choices.
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


def certify(meter: LossMeter, measure: Measure, model: ModelConfig, options: CalibrationOptions) -> MeasureCalibration:
    """Find the lowest threshold of one measure that keeps the promise; nothing behind the first failure is run."""
    grid = options.grid_of(measure)
    measured: list[Losses] = []

    def columns() -> Iterator[tuple[float, ...]]:
        for threshold in grid:
            measured.append(meter.measure(EarlyExitParams(threshold, measure)))
            yield measured[-1].values

    tested = fixed_sequence(columns(), options.max_risk, options.confidence)
    last = sum(one.accepted for one in tested) - 1
    return MeasureCalibration(
        threshold=None if last < 0 else grid[last],
        max_risk=options.max_risk,
        confidence=options.confidence,
        loss=options.loss_name,
        num_prompts=len(measured[0].values),
        max_tokens=options.max_tokens,
        risk=0.0 if last < 0 else tested[last].risk,
        mean_exit_layer=model.n_layers if last < 0 else measured[last].mean_exit_layer,
        grid=grid,
        p_values=tuple(one.p_value for one in tested),
        risks=tuple(one.risk for one in tested),
        mean_exit_layers=tuple(one.mean_exit_layer for one in measured),
    )


def usable_prompts(llm: LLM, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of the prompts that leave room for `max_tokens` more, as single messages where there is a template."""
    limit = llm.config.max_model_len - max_tokens
    return [ids for text in texts if 0 < len(ids := prompt_ids(llm.tokenizer, text)) <= limit]


def calibrate(
    path: str | Path,
    prompts: Sequence[str | Path],
    options: CalibrationOptions | None = None,
    *,
    exit_layers: Sequence[int] | None = None,
    dtype: str | None = None,
    max_num_seqs: int | None = None,
    say: Callable[[str], None] = log.info,
) -> tuple[Calibration, Path]:
    """Certify thresholds for the model in `path`, and store them there.

    Calibration prompts have to be drawn as later requests will be, and the model must not have been trained or tuned on
    them. What was stored for other measures stays if it is about the same weights and exits.

    Args:
        path: an eejax checkpoint or a Hugging Face folder, with a tokenizer.
        prompts: files that `eejax.text.prompts.read_prompts` reads.
        exit_layers, dtype, max_num_seqs: as for `LLM`. The promise holds for these exits and this dtype alone.
        say: is told how it goes on, a line at a time.

    Returns:
        All that is stored now, and the file.

    Raises:
        ConfigError, InvalidRequestError, CheckpointError, TokenizerError: an option or a file is not as it must be, or
            there are too few prompts; before any answer is made.
    """
    options = options or CalibrationOptions()
    texts = [text for text, _ in choose_prompts(prompts, options.num_prompts, options.seed)]
    options.require_enough(len(texts))
    require(os.access(path, os.W_OK), f"a calibration is stored beside the model, and {path} cannot be written to")
    stored = load_calibration(path)
    limit = load_config(path).max_position
    require(
        options.max_tokens < limit,
        f"max_tokens must be below the model's {limit} positions, got {options.max_tokens}",
    )
    llm = LLM(path, dtype=dtype, exit_layers=exit_layers, max_num_seqs=max_num_seqs)
    model = llm.config.model
    require(bool(model.exits.layers), f"{path} has no exits, so there are no thresholds to calibrate; give exit_layers")
    measures = cast("tuple[Measure, ...]", options.measures)
    for measure in measures:
        EarlyExitParams(1.0, measure).thresholds_for(model)  # a classifier needs probes
    ids = usable_prompts(llm, texts, options.max_tokens)
    options.require_enough(len(ids))
    say(f"{len(ids)} prompts, {len(texts) - len(ids)} too long; answering at full depth")
    meter = LossMeter(
        llm, ids, LOSSES[options.loss] if isinstance(options.loss, str) else options.loss, options.max_tokens
    )
    found: dict[str, MeasureCalibration] = {}
    for measure in measures:
        say(f"{measure}: testing thresholds from {options.grid_of(measure)[0]:g} downwards")
        found[measure] = certify(meter, measure, model, options)
    made = Calibration(fingerprint(leaves(llm.engine.runner.params)), model.exits.layers, model.exits.head, found)
    if stored is not None and stored.same_model(made):
        made = Calibration(made.fingerprint, made.exit_layers, made.exit_head, {**stored.measures, **found})
    elif stored is not None and (dropped := sorted(set(stored.measures) - set(found))):
        say(f"dropped what was stored for {', '.join(dropped)}: it was calibrated for other weights or exits")
    return made, save_calibration(path, made)
