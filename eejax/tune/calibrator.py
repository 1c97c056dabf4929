"""Thresholds that keep a promise, from a model's own answers: losses against full depth, then Learn-then-Test."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from eejax.core import (
    MODEL_MEASURES,
    EarlyExitParams,
    Measure,
    ModelConfig,
    is_number,
    require,
    require_positive_int,
    require_seed,
)
from eejax.model import leaves, load_config
from eejax.serve import LLM, Calibration, MeasureCalibration, fingerprint, load_calibration, save_calibration
from eejax.tune.answer_losses import LOSSES, Loss, Losses, LossMeter, usable_prompts
from eejax.tune.length_labels import choose_prompts
from eejax.tune.risk import check_bound, fixed_sequence, requests_needed

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
class CalibrationOptions:
    """What is to be promised, and how it is measured.

    Attributes:
        max_risk, confidence: with probability `confidence`, the expected loss of a request is at most `max_risk`.
        measures: to calibrate, each with a promise of its own. To pick the best of m of them by these same
            prompts, ask for a confidence of `1 - (1 - confidence) / m`.
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


def certify(meter: LossMeter, measure: Measure, model: ModelConfig, options: CalibrationOptions) -> MeasureCalibration:
    """Find the lowest threshold of one measure that keeps the promise; nothing after the first failure is run."""
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
        say: receives progress, a line at a time.

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
