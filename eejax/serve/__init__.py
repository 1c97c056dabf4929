"""From prompts to answers: `LLM` for users, and `Engine`, which runs one micro-batch at a time.

The engine joins scheduler and runner. Requests are checked here, and calibrated thresholds looked up.
"""

from __future__ import annotations

from eejax.serve.calibration import Calibration, MeasureCalibration, fingerprint, load_calibration, save_calibration
from eejax.serve.engine import Engine
from eejax.serve.exit_cost import PartSizes, asked_and_left, exit_costs
from eejax.serve.llm import LLM
from eejax.serve.stream import StreamDelta

__all__ = [
    "LLM",
    "Calibration",
    "Engine",
    "MeasureCalibration",
    "PartSizes",
    "StreamDelta",
    "asked_and_left",
    "exit_costs",
    "fingerprint",
    "load_calibration",
    "save_calibration",
]
