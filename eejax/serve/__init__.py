"""From prompts to answers: `LLM` for users, `Engine` for one micro-batch at a time; checks, certified thresholds.

Scheduler and runner meet here.
"""

from __future__ import annotations

from eejax.serve.calibration import Calibration, MeasureCalibration, fingerprint, load_calibration, save_calibration
from eejax.serve.engine import Engine
from eejax.serve.exit_cost import PartSizes, asked_and_left, exit_costs
from eejax.serve.llm import LLM, StreamDelta
from eejax.serve.options import DTYPES, default_num_pages, resolve_dtype

__all__ = [
    "DTYPES",
    "LLM",
    "Calibration",
    "Engine",
    "MeasureCalibration",
    "PartSizes",
    "StreamDelta",
    "asked_and_left",
    "default_num_pages",
    "exit_costs",
    "fingerprint",
    "load_calibration",
    "resolve_dtype",
    "save_calibration",
]
