"""The settings that `bench exits` and `bench step` compare: measures, thresholds and gates, from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.common import integers, numbers, replay_params
from eejax import EarlyExitParams
from eejax.core import LOGIT_MEASURES, MODEL_MEASURES, ConfigError, Measure, ModelConfig

PROMPTS = Path("bench/schedule_prompts.jsonl")
GRIDS: dict[Measure, tuple[float, ...]] = {
    "softmax": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
    "margin": (0.1, 0.3, 0.5, 0.7, 0.85, 0.95),
    "similarity": (0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99),
    "classifier": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
}
"""Thresholds of each measure where `--thresholds` names none."""


def batch_sizes(text: str) -> tuple[int, ...]:
    """`1,8` as a tuple of numbers of at least 1, in ascending order."""
    found = integers(text)
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of at least 1 such as 1,8")
    return tuple(sorted(set(found)))


def add_gates(found: argparse.ArgumentParser) -> None:
    """The option `--gates`."""
    found.add_argument(
        "--gates", type=numbers, default=(0.0,), metavar="G,G", help="of softmax and margin; 0 asks every head (0)"
    )


def settings_of(args: argparse.Namespace, config: ModelConfig) -> list[EarlyExitParams]:
    """The settings of `--measures`, `--thresholds` and `--replay`, lowest thresholds first, checked against the exits.

    Raises:
        ConfigError, InvalidRequestError: the options contradict each other, or the model.
    """
    if args.replay is not None:
        if args.measures is not None or args.thresholds is not None:
            raise ConfigError("--replay draws the exits, so it cannot be used with --measures or --thresholds")
        if args.plot is not None or args.text is not None:
            raise ConfigError(
                "--replay measures no agreement and no bits per byte, so it cannot be used with --plot or --text"
            )
        found = [replay_params(args.replay)]
    else:
        measures: Sequence[Measure] = args.measures or [
            name for name in MODEL_MEASURES if name != "classifier" or config.exits.probes
        ]
        found = [
            EarlyExitParams(threshold, measure, gate=gate)
            for measure in measures
            for threshold in sorted(set(args.thresholds or GRIDS[measure]))
            for gate in (args.gates if measure in LOGIT_MEASURES else (0.0,))
        ]
    for one in found:
        one.thresholds_for(config)
    return found


def label_of(one: EarlyExitParams) -> str:
    """How a setting is called in tables."""
    return f"{one.measure} {one.threshold:g}" + (f", gate {one.gate:g}" if one.gate else "")
