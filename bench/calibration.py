"""Do calibrated thresholds keep their promise? Certified on one part of the prompts, measured on the rest, many times.

The losses of all prompts are measured once at every threshold. Then the prompts are split at random, again and again:
a threshold is certified on one part as `eejax calibrate` would, and its risk measured on the other. The other part is
finite: its mean loss scatters about the risk, and above the bound it does not prove the promise broken. So the same
threshold's mean loss over all prompts is reported as well, as the risk in a population of just these.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.common import (
    ModelOptions,
    at_least,
    dtype_of,
    finish,
    model_facts,
    model_parser,
    numbers,
    options_of,
    random_prompts,
)
from bench.cost import ModelCost
from eejax import LLM, EarlyExitParams
from eejax.core import MODEL_MEASURES, Measure, require
from eejax.tune import LOSSES, CalibrationOptions, Losses, LossMeter, choose_prompts, fixed_sequence, usable_prompts

MODEL = "checkpoints/demo"
PROMPTS = "bench/schedule_prompts.jsonl"
RANDOM_PROMPT_LENGTH = 8
HOPELESS = 3.0
"""Measuring stops at the first threshold whose mean loss is this many times the bound; no split certifies that one."""


def parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    found = model_parser("calibration", __doc__, MODEL)
    found.add_argument("--prompts", nargs="+", metavar="FILE", default=[PROMPTS], help=f"texts ({PROMPTS})")
    found.add_argument("--num-prompts", type=at_least(2), metavar="N", help="prompts to use, equally many of each file")
    found.add_argument("--measures", nargs="+", choices=MODEL_MEASURES, metavar="NAME", help="those that the model has")
    found.add_argument("--loss", choices=sorted(LOSSES), default="agreement", help="of an answer (%(default)s)")
    found.add_argument("--max-risk", type=float, default=0.02, help="highest expected loss (%(default)s)")
    found.add_argument("--confidence", type=float, default=0.95, help="with which that holds (%(default)s)")
    found.add_argument("--grid", type=numbers, metavar="T,T", help="thresholds instead of each measure's own")
    found.add_argument("--max-tokens", type=at_least(1), default=128, help="of an answer (%(default)s)")
    found.add_argument("--max-num-seqs", type=at_least(1), default=32, help="answers at once (%(default)s)")
    found.add_argument("--resamplings", type=at_least(1), default=200, help="random splits (%(default)s)")
    found.add_argument(
        "--calibration-share", type=float, default=0.5, help="of the prompts to calibrate on (%(default)s)"
    )
    return found


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    options = CalibrationOptions(
        max_risk=args.max_risk,
        confidence=args.confidence,
        loss=args.loss,
        grid=args.grid,
        max_tokens=args.max_tokens,
        num_prompts=args.num_prompts,
        seed=args.seed,
    )
    share = args.calibration_share
    require(0 < share < 1, f"--calibration-share must be a number between 0 and 1, got {share}")
    texts = [] if args.random else [text for text, _ in choose_prompts(args.prompts, args.num_prompts, args.seed)]
    count = (args.num_prompts or 64) if args.random else len(texts)
    options.require_enough(round(count * share))
    chosen = ModelOptions.of(args)
    longest = RANDOM_PROMPT_LENGTH + args.max_tokens if args.random else None
    llm = chosen.build(max_model_len=longest, max_num_seqs=args.max_num_seqs)
    model = llm.config.model
    require(bool(model.exits.layers), f"{chosen.name} has no exits to calibrate; give --exit-layers")
    if args.random:
        drawn = random_prompts(count, RANDOM_PROMPT_LENGTH, model.vocab_size, args.seed)
        prompts = [one["prompt_token_ids"] for one in drawn if isinstance(one, dict)]
    else:
        prompts = usable_prompts(llm, texts, args.max_tokens)
    size = round(len(prompts) * share)
    options.require_enough(size)
    measures: Sequence[Measure] = args.measures or [
        name for name in MODEL_MEASURES if name != "classifier" or model.exits.probes
    ]
    for name in measures:
        EarlyExitParams(1.0, name).thresholds_for(model)
    measured = measure_all(llm, prompts, measures, options)
    rng = np.random.default_rng(args.seed)
    splits = [rng.permutation(len(prompts)) for _ in range(args.resamplings)]
    result = {
        "bench": "calibration",
        **machine.provenance(),
        "model": model_facts(llm, chosen.name, ModelCost.of(model, dtype_of(llm).itemsize)),
        "options": options_of(args),
        "prompts": len(prompts),
        "calibration_prompts": size,
        "allowed_share": 1 - options.confidence,
        "sampling_error": math.sqrt(options.confidence * (1 - options.confidence) / len(splits)),
        "measures": {
            name: {
                "on_all_prompts": on_all_prompts(grid, losses, options),
                "resampled": resample(grid, losses, options, splits, size, model.n_layers),
            }
            for name, (grid, losses) in measured.items()
        },
    }
    _show(result)
    finish(result, args.output_json)


def measure_all(
    llm: LLM, prompts: Sequence[Sequence[int]], measures: Sequence[Measure], options: CalibrationOptions
) -> dict[str, tuple[list[float], list[Losses]]]:
    """Each measure's thresholds, down to the first hopeless one, with the losses of all prompts there."""
    meter = LossMeter(llm, prompts, LOSSES[str(options.loss)], options.max_tokens)
    console = Console(stderr=True, highlight=False)
    found: dict[str, tuple[list[float], list[Losses]]] = {}
    for measure in measures:
        grid, losses = found[measure] = [], []
        for threshold in options.grid_of(measure):
            grid.append(threshold)
            losses.append(meter.measure(EarlyExitParams(threshold, measure)))
            risk = float(np.mean(losses[-1].values))
            console.print(f"{measure} {threshold:g}: risk {risk:.4f}", style="dim", soft_wrap=True)
            if risk > HOPELESS * options.max_risk:
                break
    return found


def on_all_prompts(grid: Sequence[float], losses: Sequence[Losses], options: CalibrationOptions) -> dict[str, Any]:
    """Every threshold's mean loss and depth, and what all prompts together certify."""
    tested = fixed_sequence([one.values for one in losses], options.max_risk, options.confidence)
    accepted = sum(one.accepted for one in tested)
    return {
        "thresholds": list(grid),
        "risks": [float(np.mean(one.values)) for one in losses],
        "mean_exit_layers": [one.mean_exit_layer for one in losses],
        "p_values": [one.p_value for one in tested],
        "certified": grid[accepted - 1] if accepted else None,
    }


def resample(
    grid: Sequence[float],
    losses: Sequence[Losses],
    options: CalibrationOptions,
    splits: Sequence[np.ndarray],
    size: int,
    n_layers: int,
) -> dict[str, Any]:
    """Certify on the first `size` prompts of every split, look at the others. Uncertified is full depth: no risk."""
    table = np.array([one.values for one in losses])  # [thresholds, prompts]
    chosen, on_test, on_all = [], [], []
    for order in splits:
        tested = fixed_sequence(table[:, order[:size]].tolist(), options.max_risk, options.confidence)
        accepted = sum(one.accepted for one in tested)
        chosen.append(accepted - 1)
        on_test.append(float(np.mean(table[accepted - 1, order[size:]])) if accepted else 0.0)
        on_all.append(float(np.mean(table[accepted - 1])) if accepted else 0.0)
    layers = [losses[i].mean_exit_layer if i >= 0 else float(n_layers) for i in chosen]
    certified = sorted(grid[i] for i in chosen if i >= 0)
    return {
        "share_certified": len(certified) / len(splits),
        "share_above_bound_on_test": float(np.mean(np.array(on_test) > options.max_risk)),
        "share_above_bound_on_all": float(np.mean(np.array(on_all) > options.max_risk)),
        "mean_test_risk": float(np.mean(on_test)),
        "largest_test_risk": max(on_test),
        "lowest_threshold": certified[0] if certified else None,
        "median_threshold": certified[len(certified) // 2] if certified else None,
        "mean_exit_layer": float(np.mean(layers)),
        "share_of_blocks": float(np.mean(layers)) / n_layers,
        # At the end of what was measured, a lower threshold might have been certified as well.
        "share_at_the_end": float(np.mean(np.array(chosen) == len(grid) - 1)),
    }


def _show(result: dict[str, Any]) -> None:
    model, options = result["model"], result["options"]
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)
    title = (
        f"calibration: {model['name']}, {model['dtype']}, loss {options['loss']}, risk at most {options['max_risk']:g} "
        f"with confidence {options['confidence']:g}; {options['resamplings']} times {result['calibration_prompts']} of "
        f"{result['prompts']} prompts"
    )
    console.print(title, style="bold", markup=False, soft_wrap=True)
    table = Table()
    columns = ("", "certified", "threshold", "exit layer", "blocks", "test risk", "above, test", "above, all")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for name, found in result["measures"].items():
        one = found["resampled"]
        threshold = one["median_threshold"]
        table.add_row(
            name,
            f"{one['share_certified']:.0%}",
            "–" if threshold is None else f"{threshold:g}",
            f"{one['mean_exit_layer']:.2f}",
            f"{one['share_of_blocks']:.0%}",
            f"{one['mean_test_risk']:.4f}",
            f"{one['share_above_bound_on_test']:.1%}",
            f"{one['share_above_bound_on_all']:.1%}",
        )
    console.print(table)
    console.print(
        f"above: share of splits whose certified threshold has a mean loss above {options['max_risk']:g}, on the "
        f"prompts it never saw and on all; allowed {result['allowed_share']:.1%} +- {result['sampling_error']:.1%}",
        markup=False,
        soft_wrap=True,
    )
