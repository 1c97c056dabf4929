"""What every part of eejax shares: options, requests and answers, errors, checks, batch sizes, reports of a slow start.

Nothing here imports jax, and nothing here imports another package of eejax.
"""

from __future__ import annotations

from eejax.core.buckets import Piece, batch_size, bucket_of, cut_prefill
from eejax.core.checks import from_mapping, is_number, named_options, require, require_positive_int
from eejax.core.config import (
    MIN_PREFILL_BUCKET,
    CacheConfig,
    Choice,
    DecodeConfig,
    EngineConfig,
    ExitConfig,
    ExitHeadKind,
    FillMode,
    ModelConfig,
    PolicyName,
    PredictorName,
    RopeScaling,
    SchedulerConfig,
)
from eejax.core.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EejaxError,
    ExitCostWarning,
    InvalidRequestError,
    TokenizerError,
)
from eejax.core.lengths import LEVELS, LengthEstimate
from eejax.core.params import (
    CALIBRATED,
    LOGIT_MEASURES,
    MAX_CONFIDENCE,
    MAX_LOGPROBS,
    DecayingThreshold,
    EarlyExitParams,
    Measure,
    SamplingParams,
)
from eejax.core.replacing import replacing_file, replacing_folder
from eejax.core.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    MicroBatch,
    PromptLike,
    Request,
    RequestMetrics,
    RequestOutput,
    RowResult,
    Sequence,
    StepResult,
)
from eejax.core.start_up import Step, announce, begun, describe, heard, log, status
from eejax.core.xla_flags import compiler_options, set_xla_flags

__all__ = [
    "CALIBRATED",
    "LEVELS",
    "LOGIT_MEASURES",
    "MAX_CONFIDENCE",
    "MAX_LOGPROBS",
    "MIN_PREFILL_BUCKET",
    "CacheConfig",
    "CapacityError",
    "CheckpointError",
    "Choice",
    "CompletionOutput",
    "ConfigError",
    "DecayingThreshold",
    "DecodeConfig",
    "EarlyExitParams",
    "EejaxError",
    "EngineConfig",
    "ExitConfig",
    "ExitCostWarning",
    "ExitHeadKind",
    "FillMode",
    "FinishReason",
    "InvalidRequestError",
    "LengthEstimate",
    "Logprob",
    "Measure",
    "MicroBatch",
    "ModelConfig",
    "Piece",
    "PolicyName",
    "PredictorName",
    "PromptLike",
    "Request",
    "RequestMetrics",
    "RequestOutput",
    "RopeScaling",
    "RowResult",
    "SamplingParams",
    "SchedulerConfig",
    "Sequence",
    "Step",
    "StepResult",
    "TokenizerError",
    "announce",
    "batch_size",
    "begun",
    "bucket_of",
    "compiler_options",
    "cut_prefill",
    "describe",
    "from_mapping",
    "heard",
    "is_number",
    "log",
    "named_options",
    "replacing_file",
    "replacing_folder",
    "require",
    "require_positive_int",
    "set_xla_flags",
    "status",
]
