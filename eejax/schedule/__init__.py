"""Which sequences are prefilled and decoded next, and on which pages: scheduler, policies, predicted lengths, costs.

No jax, so that a device can be simulated. Scheduler and runner exchange `MicroBatch` and `StepResult`, nothing else.
"""

from __future__ import annotations

from eejax.schedule.integrity import check_integrity
from eejax.schedule.length_heads import HEADS_FILE, LengthHeads, load_length_heads, save_length_heads
from eejax.schedule.length_predictor import (
    QUESTION_TOKENS,
    ConstantPredictor,
    LengthPredictor,
    PerceptionPredictor,
    hidden_features,
    make_predictor,
    prompt_features,
    said_number,
)
from eejax.schedule.page_allocator import PageAllocator, pages_needed
from eejax.schedule.policy import Policy, Selection
from eejax.schedule.scheduler import Scheduler
from eejax.schedule.static_policy import Static
from eejax.schedule.step_cost import StepCost

__all__ = [
    "HEADS_FILE",
    "QUESTION_TOKENS",
    "ConstantPredictor",
    "LengthHeads",
    "LengthPredictor",
    "PageAllocator",
    "PerceptionPredictor",
    "Policy",
    "Scheduler",
    "Selection",
    "Static",
    "StepCost",
    "check_integrity",
    "hidden_features",
    "load_length_heads",
    "make_predictor",
    "pages_needed",
    "prompt_features",
    "said_number",
    "save_length_heads",
]
