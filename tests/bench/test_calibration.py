"""The calibration experiment: its figures on losses that are known, a dry run, and its mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.__main__ import main
from bench.calibration import on_all_prompts, resample
from eejax.tune.answer_losses import Losses
from eejax.tune.calibrator import CalibrationOptions

OPTIONS = CalibrationOptions(max_risk=0.1, confidence=0.9)
GRID = (0.9, 0.5, 0.1)


def splits(count: int, number: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.permutation(count) for _ in range(number)]


def columns(*losses: np.ndarray) -> list[Losses]:
    return [Losses(tuple(one.tolist()), 12.0 - 2 * i) for i, one in enumerate(losses)]


def test_figures_where_every_split_certifies_the_same():
    losses = columns(np.zeros(100), np.full(100, 0.01), np.full(100, 0.3))
    found = resample(GRID, losses, OPTIONS, splits(100, 20), 50, 12)
    assert (found["share_certified"], found["median_threshold"], found["lowest_threshold"]) == (1.0, 0.5, 0.5)
    assert (found["share_above_bound_on_test"], found["share_above_bound_on_all"]) == (0.0, 0.0)
    assert found["mean_test_risk"] == pytest.approx(0.01)
    assert (found["mean_exit_layer"], found["share_at_the_end"]) == (10.0, 0.0)
    assert found["share_of_blocks"] == pytest.approx(10 / 12)
    whole = on_all_prompts(GRID, losses, OPTIONS)
    assert (whole["certified"], whole["risks"]) == (0.5, pytest.approx([0.0, 0.01, 0.3]))
    assert len(whole["p_values"]) == 3


def test_the_risk_is_that_of_the_prompts_that_were_held_back():
    """One prompt has all the loss: it is held back in the splits that certify, and counted there."""
    loss = np.zeros(44)
    loss[7] = 1.0
    orders = splits(44, 50)
    found = resample(GRID[:1], columns(loss), OPTIONS, orders, 22, 12)
    held_back = np.mean([7 in order[22:] for order in orders])
    assert 0 < held_back < 1
    assert found["share_certified"] == pytest.approx(held_back)
    assert found["mean_test_risk"] == pytest.approx(held_back / 22)
    assert found["mean_exit_layer"] == 12.0
    assert found["largest_test_risk"] == pytest.approx(1 / 22)
    assert (found["share_above_bound_on_test"], found["share_above_bound_on_all"]) == (0.0, 0.0)


def test_broken_promises_are_counted():
    """A bound between the mean over all and that over those held back: certified splits break it on these alone."""
    loss = np.zeros(60)
    loss[:8] = 1.0
    strict = CalibrationOptions(max_risk=0.15, confidence=0.5)
    found = resample(GRID[:1], columns(loss), strict, splits(60, 100), 30, 12)
    assert 0 < found["share_certified"] < 1
    assert found["share_above_bound_on_test"] == pytest.approx(found["share_certified"])
    assert found["share_above_bound_on_all"] == 0.0


def test_where_nothing_is_certified_full_depth_has_no_risk():
    found = resample(GRID[:2], columns(np.ones(40), np.ones(40)), OPTIONS, splits(40, 5), 22, 12)
    assert (found["share_certified"], found["mean_exit_layer"], found["mean_test_risk"]) == (0.0, 12.0, 0.0)
    assert (found["median_threshold"], found["share_at_the_end"]) == (None, 0.0)


def test_dry_run(capsys: pytest.CaptureFixture[str], tmp_path):
    file = tmp_path / "calibration.json"
    arguments = "--random tiny --num-prompts 8 --max-num-seqs 1 --max-tokens 4 --max-risk 0.9 --confidence 0.6"
    more = "--measures softmax similarity --grid 1,0.5 --resamplings 10 --output-json"
    assert main(["calibration", *arguments.split(), *more.split(), str(file)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(file.read_text()) == found
    assert (found["prompts"], found["calibration_prompts"]) == (8, 4)
    assert set(found["measures"]) == {"softmax", "similarity"}
    for one in found["measures"].values():
        assert one["on_all_prompts"]["thresholds"] == [1.0, 0.5]
        assert one["resampled"]["share_certified"] == 1.0
    # A cosine of 0.5 is reached at the first exit by every token of this model; a top probability of 1 by none.
    assert found["measures"]["similarity"]["on_all_prompts"]["mean_exit_layers"][1] == 2.0
    assert found["measures"]["softmax"]["on_all_prompts"]["mean_exit_layers"][0] == 6.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-prompts", "100"], "50 usable prompts can certify nothing: a risk of at most 0.02 with confidence 0.95 "
         "needs 149"),
        (["--max-risk", "1"], "max_risk must be a number between 0 and 1, got 1.0"),
        (["--calibration-share", "1.5"], "--calibration-share must be a number between 0 and 1, got 1.5"),
        (["--random", "tiny", "--num-prompts", "40", "--max-risk", "0.5", "--measures", "classifier"], "needs a probe"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str):
    assert main(["calibration", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
