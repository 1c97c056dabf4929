"""The stored calibration: what is written, and what a request with a calibrated threshold gets or is told."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from eejax.core import CacheConfig, DecayingThreshold, EarlyExitParams, EngineConfig, SamplingParams
from eejax.core.errors import CheckpointError, ConfigError, InvalidRequestError
from eejax.serve.calibration import (
    CALIBRATION_FILE,
    CalibratedThresholds,
    Calibration,
    MeasureCalibration,
    fingerprint,
    load_calibration,
    save_calibration,
)
from eejax.serve.intake import Intake
from tests.cases import shape_config

MODEL = shape_config("gqa")  # four blocks, exits after 1 and 3
WEIGHTS = [("b", np.arange(6, dtype=np.float32)), ("a.c", np.ones((2, 3), np.float32))]
FOUND = MeasureCalibration(
    threshold=0.6,
    max_risk=0.02,
    confidence=0.95,
    loss="agreement",
    num_prompts=200,
    max_tokens=64,
    risk=0.011,
    mean_exit_layer=2.5,
    grid=(0.9, 0.6, 0.3),
    p_values=(0.001, 0.02, 0.4),
    risks=(0.004, 0.011, 0.02),
    mean_exit_layers=(3.5, 2.5, 1.5),
)
STORED = Calibration(fingerprint(WEIGHTS), (1, 3), "shared", {"softmax": FOUND})


def calibrated(measure: str = "softmax", **changes) -> EarlyExitParams:
    return EarlyExitParams(**{"threshold": "calibrated", "measure": measure} | changes)


def test_a_calibration_is_read_back_as_it_was_written(tmp_path: Path):
    assert load_calibration(tmp_path) is None
    (tmp_path / "other").write_text("stays")
    file = save_calibration(tmp_path, STORED)
    assert load_calibration(tmp_path) == STORED
    nothing = dataclasses.replace(FOUND, threshold=None, p_values=(0.3,), risks=(0.02,), mean_exit_layers=(3.5,))
    again = dataclasses.replace(STORED, measures={"softmax": FOUND, "margin": nothing})
    assert save_calibration(tmp_path, again) == file
    assert load_calibration(tmp_path) == again
    assert sorted(one.name for one in tmp_path.iterdir()) == [CALIBRATION_FILE, "other"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda stored: stored.pop("fingerprint"), "needs fingerprint"),
        (lambda stored: stored.update(more=1), "no option more"),
        (lambda stored: stored["measures"]["softmax"].pop("grid"), "needs grid"),
        (lambda stored: stored["measures"]["softmax"].update(threshold=1.5), r"in \[0, 1\] or None, got 1.5"),
        (lambda stored: stored["measures"]["softmax"].update(threshold="0.5"), "got '0.5'"),
        (lambda stored: stored["measures"]["softmax"].update(num_prompts=0), "num_prompts must be an integer"),
        (lambda stored: stored["measures"]["softmax"].update(risks=[None]), "risks must be a list of numbers"),
        (lambda stored: stored.update(measures=3), "damaged"),
        (lambda stored: stored.update(exit_layers=["x"]), "damaged"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, change, said):
    file = save_calibration(tmp_path, STORED)
    stored = json.loads(file.read_text())
    change(stored)
    file.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=said) as error:
        load_calibration(tmp_path)
    assert str(file) in str(error.value)


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path: Path):
    (tmp_path / CALIBRATION_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="calibrate again"):
        load_calibration(tmp_path)


def test_a_fingerprint_tells_names_shapes_types_and_bytes_apart():
    one = np.arange(6, dtype=np.float32)
    other = one.copy()
    other[5] = np.nextafter(np.float32(5), np.float32(6))
    trees = [
        [("a", one)],
        [("b", one)],
        [("a", one.reshape(2, 3))],
        [("a", one.view(np.int32))],
        [("a", other)],
        [("a", one), ("b", one)],
        [("a", one[:3]), ("b", one[3:])],
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert fingerprint(WEIGHTS) == fingerprint(WEIGHTS[::-1])
    assert fingerprint([("a", one.reshape(2, 3).T)]) == fingerprint([("a", one.reshape(2, 3).T.copy())])


def test_a_calibrated_threshold_is_looked_up_once(tmp_path: Path):
    save_calibration(tmp_path, STORED)
    asked = []

    def weights():
        asked.append(1)
        return WEIGHTS

    source = CalibratedThresholds(tmp_path, weights)
    assert source.thresholds_for(EarlyExitParams(0.4), MODEL) == (0.4, 0.4)
    assert not asked  # who asks for a number pays for no fingerprint
    for _ in range(3):
        assert source.thresholds_for(calibrated(), MODEL) == (0.6, 0.6)
    assert len(asked) == 1


def test_a_request_carries_the_threshold_that_was_certified(tmp_path: Path):
    save_calibration(tmp_path, STORED)
    config = EngineConfig(MODEL, CacheConfig(16, 8), max_model_len=64)
    source = CalibratedThresholds(tmp_path, lambda: WEIGHTS)
    intake = Intake(config, None, frozenset(), 16, lambda: source)
    params = SamplingParams(early_exit=calibrated())
    request = intake.request({"prompt_token_ids": [1, 2]}, params, request_id="r", number=0)
    assert request.thresholds == (0.6, 0.6)


@pytest.mark.parametrize(
    ("stored", "params", "said"),
    [
        (None, calibrated(), "has no calibrated thresholds; make some with: eejax calibrate"),
        (STORED, calibrated("margin"), "for measure 'margin', only for softmax; make one with: eejax calibrate"),
        (STORED, calibrated("random"), "for measure 'random'"),
        (STORED, calibrated(exit_layers=[1]), r"exit_layers \(1,\) and min_layers 0 cannot be given"),
        (STORED, calibrated(min_layers=2), "min_layers 2 cannot be given"),
        (
            dataclasses.replace(STORED, exit_layers=(2,)),
            calibrated(),
            r"for 'shared' exits after blocks \[2\], and this model has 'shared' .* \[1, 3\];.*--exit-layers 1,3",
        ),
        (dataclasses.replace(STORED, exit_head="mlp"), calibrated(), "calibrated for 'mlp' exits"),
        (dataclasses.replace(STORED, fingerprint="sha256:1234"), calibrated(), "other weights.*sha256:1234… against"),
    ],
)
def test_a_promise_that_was_not_made_is_refused(tmp_path: Path, stored, params, said):
    if stored is not None:
        save_calibration(tmp_path, stored)
    with pytest.raises(InvalidRequestError, match=said):
        CalibratedThresholds(tmp_path, lambda: WEIGHTS).thresholds_for(params, MODEL)


def test_a_model_from_no_folder_has_none():
    with pytest.raises(InvalidRequestError, match="not loaded from a folder"):
        CalibratedThresholds().thresholds_for(calibrated(), MODEL)


def test_where_nothing_was_certified_requests_run_at_full_depth(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    nothing = dataclasses.replace(FOUND, threshold=None)
    save_calibration(tmp_path, dataclasses.replace(STORED, measures={"softmax": nothing, "margin": nothing}))
    source = CalibratedThresholds(tmp_path, lambda: WEIGHTS)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert source.thresholds_for(calibrated(), MODEL) == (math.inf, math.inf)
    [record] = caplog.records  # said once for a measure
    assert "'softmax'" in record.getMessage()
    assert "full depth" in record.getMessage()


def test_calibrated_is_the_only_word_for_a_threshold():
    with pytest.raises(ConfigError, match="numbers or 'calibrated', got 'best'"):
        EarlyExitParams("best")
    with pytest.raises(ConfigError, match="got 'calibrated'"):
        DecayingThreshold("calibrated")
    with pytest.raises(InvalidRequestError, match="here a number is needed"):
        calibrated().thresholds_for(MODEL)


def test_what_was_calibrated_together_is_told_apart():
    other = dataclasses.replace(STORED, measures={})
    assert other.same_model(STORED)
    for change in ({"fingerprint": "sha256:0"}, {"exit_layers": (1,)}, {"exit_head": "norm"}):
        assert not other.same_model(dataclasses.replace(STORED, **change))
