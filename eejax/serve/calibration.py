"""Certified thresholds: one small file beside a model's weights, and their use for requests. No jax here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eejax.core import (
    CALIBRATED,
    MAX_CONFIDENCE,
    CheckpointError,
    EarlyExitParams,
    InvalidRequestError,
    ModelConfig,
    from_mapping,
    is_number,
    replacing_file,
    require,
    require_positive_int,
)

log = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.json"

type Leaves = Iterable[tuple[str, Any]]
"""Names and arrays of a model's parameters."""


@dataclass(frozen=True, slots=True)
class MeasureCalibration:
    """The promise for one measure.

    With probability `confidence` over the draw of calibration prompts, greedy answers of at most `max_tokens` tokens
    to prompts like those have an expected loss of at most `max_risk` at `threshold`.

    Attributes:
        threshold: the lowest that was certified, for all exits; None where none was.
        loss: its name.
        num_prompts: prompts in the calibration set.
        risk: mean loss of the calibration set at `threshold`; 0 where that is None.
        mean_exit_layer: blocks that a decoded token ran there on average.
        grid: thresholds to test, in this order.
        p_values, risks, mean_exit_layers: of the thresholds tested: all up to the first that failed.
    """

    threshold: float | None
    max_risk: float
    confidence: float
    loss: str
    num_prompts: int
    max_tokens: int
    risk: float
    mean_exit_layer: float
    grid: tuple[float, ...]
    p_values: tuple[float, ...]
    risks: tuple[float, ...]
    mean_exit_layers: tuple[float, ...]

    def __post_init__(self) -> None:
        me = "MeasureCalibration"
        require_positive_int(me, num_prompts=self.num_prompts, max_tokens=self.max_tokens)
        require(isinstance(self.loss, str), f"{me}.loss must be a name, got {self.loss!r}")
        for name in ("grid", "p_values", "risks", "mean_exit_layers"):
            values = getattr(self, name)
            good = isinstance(values, list | tuple) and all(is_number(one) and math.isfinite(one) for one in values)
            require(good, f"{me}.{name} must be a list of numbers, got {values!r}")
            object.__setattr__(self, name, tuple(float(one) for one in values))
        for name in ("max_risk", "confidence", "risk", "mean_exit_layer"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, f"{me}.{name} must be a number of at least 0, got {value!r}")
        given = self.threshold
        require(
            given is None or (is_number(given) and 0 <= given <= MAX_CONFIDENCE),
            f"{me}.threshold must be a number in [0, 1] or None, got {given!r}",
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """Certified thresholds of one model by measure.

    Attributes:
        fingerprint: of the weights as they were served (`fingerprint`).
        exit_layers, exit_head: the exits that were calibrated together.
    """

    fingerprint: str
    exit_layers: tuple[int, ...]
    exit_head: str
    measures: Mapping[str, MeasureCalibration]

    def same_model(self, other: Calibration) -> bool:
        """Whether both are of the same weights and exits."""
        return dataclasses.replace(self, measures=other.measures) == other

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready mapping."""
        return dataclasses.asdict(self)


def fingerprint(leaves: Leaves) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of parameters, in the order of their names.

    It identifies the weights that a promise was made for; the same weights served as another dtype are others.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves, key=lambda item: item[0]):
        array = np.ascontiguousarray(np.asarray(leaf))
        digest.update(f"{name} {array.dtype.name} {array.shape};".encode())
        digest.update(array.tobytes())
    return f"sha256:{digest.hexdigest()}"


def save_calibration(folder: str | Path, calibration: Calibration) -> Path:
    """Write `calibration` to its file in `folder`, which it replaces once it is whole. Returns the file.

    Raises:
        CheckpointError: it cannot be written.
    """
    target = Path(folder) / CALIBRATION_FILE
    with replacing_file(target) as file:
        file.write_text(json.dumps(calibration.to_dict(), indent=1, allow_nan=False) + "\n")
    return target


def load_calibration(folder: str | Path) -> Calibration | None:
    """The calibration in `folder`, None where there is none. Raises `CheckpointError` where the file is damaged."""
    file = Path(folder) / CALIBRATION_FILE
    if not file.exists():
        return None
    try:
        found = from_mapping(Calibration, json.loads(file.read_bytes()))
        layers, measures = tuple(int(layer) for layer in found.exit_layers), dict(found.measures)
        measures = {name: from_mapping(MeasureCalibration, one) for name, one in measures.items()}  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:  # ConfigError and malformed JSON are ValueErrors
        raise CheckpointError(f"{file} is damaged: {error}; calibrate again, or remove it") from error
    return dataclasses.replace(found, exit_layers=layers, measures=measures)


class CalibratedThresholds:
    """Resolves `EarlyExitParams(threshold="calibrated")` for one loaded model; nothing is read before the first use.

    Args:
        folder: that the model was loaded from; None where it came from no folder.
        weights: its parameters as they are served.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, weights: Callable[[], Leaves] = lambda: ()
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._weights = weights
        self._stored: Calibration | None = None
        self._fingerprint: str | None = None
        self._warned: set[str] = set()

    def thresholds_for(self, params: EarlyExitParams, model: ModelConfig) -> tuple[float, ...]:
        """One threshold per exit of `model`, `inf` where a request may not exit; looked up where it is "calibrated".

        Raises:
            InvalidRequestError: nothing was calibrated for this measure, these exits or these weights; `exit_layers` or
                `min_layers` change the exits that the promise was made for; or as `EarlyExitParams.thresholds_for`.
            CheckpointError: the calibration file is damaged.
        """
        if params.threshold != CALIBRATED:
            return params.thresholds_for(model)
        if params.exit_layers is not None or params.min_layers:
            raise InvalidRequestError(
                "a calibrated threshold keeps its promise with all exits of the model, so exit_layers "
                f"{params.exit_layers} and min_layers {params.min_layers} cannot be given with it"
            )
        found = self._lookup(params.measure, model)
        if found.threshold is not None:
            return dataclasses.replace(params, threshold=found.threshold).thresholds_for(model)
        if params.measure not in self._warned:
            self._warned.add(params.measure)
            log.warning(
                "no threshold of measure %r was certified for a risk of at most %g with confidence %g: "
                "requests that ask for it run at full depth",
                params.measure,
                found.max_risk,
                found.confidence,
            )
        return (math.inf,) * len(model.exits.layers)

    def _lookup(self, measure: str, model: ModelConfig) -> MeasureCalibration:
        if self._folder is None:
            raise InvalidRequestError("this model was not loaded from a folder, so it has no calibrated thresholds")
        stored = self._stored = self._stored or load_calibration(self._folder)
        command = f"eejax calibrate {self._folder} --prompts FILE --measure {measure}"
        if stored is None:
            raise InvalidRequestError(f"{self._folder} has no calibrated thresholds; make some with: {command}")
        exits = model.exits
        if (stored.exit_layers, stored.exit_head) != (exits.layers, exits.head):
            raise InvalidRequestError(
                f"{self._folder} was calibrated for {stored.exit_head!r} exits after blocks "
                f"{list(stored.exit_layers)}, and this model has {exits.head!r} exits after {list(exits.layers)}; "
                f"calibrate these with: {command} --exit-layers {','.join(map(str, exits.layers))}"
            )
        if measure not in stored.measures:
            raise InvalidRequestError(
                f"{self._folder} has no calibrated threshold for measure {measure!r}, only for "
                f"{', '.join(sorted(stored.measures)) or 'none'}; make one with: {command}"
            )
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._weights())
        if self._fingerprint != stored.fingerprint:
            raise InvalidRequestError(
                f"{self._folder} was calibrated for other weights, or another dtype, than those loaded "
                f"({stored.fingerprint[:19]}… against {self._fingerprint[:19]}…); calibrate again with: {command}"
            )
        return stored.measures[measure]
