"""What is fitted to a model before it serves: exit heads, certified thresholds, length heads.

Each has a command of its own; training needs the extra `train`.
"""

from __future__ import annotations

from eejax.tune.answer_losses import LOSSES, Losses, LossMeter, agreement, rouge_l, usable_prompts
from eejax.tune.calibrator import CalibrationOptions
from eejax.tune.length_labels import choose_prompts
from eejax.tune.length_training import LengthTarget
from eejax.tune.risk import fixed_sequence
from eejax.tune.tuning_data import read_documents, text_bytes

__all__ = [
    "LOSSES",
    "CalibrationOptions",
    "LengthTarget",
    "LossMeter",
    "Losses",
    "agreement",
    "choose_prompts",
    "fixed_sequence",
    "read_documents",
    "rouge_l",
    "text_bytes",
    "usable_prompts",
]
