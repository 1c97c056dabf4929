"""Distributions of lengths: always usable, and consistent when a row outlives a part of them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eejax.core.lengths import LEVELS, LengthEstimate

LIMITS = st.integers(1, 5000)
SAID = st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=0, max_size=7)


@given(said=SAID, limit=LIMITS, longer_than=st.integers(0, 6000), p=st.floats(0, 1))
def test_whatever_a_predictor_says_can_be_used(said: list[float], limit: int, longer_than: int, p: float) -> None:
    estimate = LengthEstimate.of(said, limit)
    assert len(estimate.quantiles) == len(LEVELS)
    assert list(estimate.quantiles) == sorted(estimate.quantiles)
    assert all(1 <= value <= limit for value in estimate.quantiles)
    for value in (estimate.quantile(p, longer_than), estimate.mean(longer_than)):
        assert min(longer_than + 1, limit) <= value * (1 + 1e-12)
        assert value <= limit * (1 + 1e-12)


@given(said=st.lists(st.floats(-10, 1e4), min_size=5, max_size=5), limit=LIMITS, longer_than=st.integers(0, 6000))
def test_quantiles_ascend_with_probability_and_with_what_was_outlived(
    said: list[float], limit: int, longer_than: int
) -> None:
    estimate = LengthEstimate.of(said, limit)
    found = [estimate.quantile(i / 20, longer_than) for i in range(21)]
    later = [estimate.quantile(i / 20, longer_than + 7) for i in range(21)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(found))
    assert all(a <= b * (1 + 1e-9) for a, b in zip(found, later, strict=True))


def test_given_quantiles_are_kept_in_whatever_order_and_cut_to_what_is_allowed() -> None:
    estimate = LengthEstimate.of([40, 10, 20, 1e9, -3], 100)
    assert estimate.quantiles == (1.0, 10.0, 20.0, 40.0, 100.0)
    assert [estimate.quantile(level) for level in LEVELS] == pytest.approx(estimate.quantiles)
    assert (estimate.quantile(0), estimate.quantile(1)) == pytest.approx((1, 100))
    assert estimate.quantile(0.375) == pytest.approx(math.sqrt(10 * 20))  # halfway, in the logarithm


@pytest.mark.parametrize("said", [[1, 2, math.nan, 4, 5], [1, 2, 3], [], [1] * 6])
def test_no_distribution_is_worth_nothing(said: list[float]) -> None:
    assert LengthEstimate.of(said, 500) == LengthEstimate.unknown(500)
    assert LengthEstimate.unknown(500).quantile(0.5) == pytest.approx(math.sqrt(500))


def test_one_length_is_certain_until_it_is_outlived() -> None:
    estimate = LengthEstimate.exactly(30, 1000)
    assert {estimate.quantile(p) for p in (0.1, 0.5, 0.9)} == {30.0}
    medians = [estimate.quantile(0.5, n) for n in (30, 100, 500, 998)]
    assert medians == sorted(medians)
    assert medians[0] > 30
    assert medians[-1] == pytest.approx(1000, rel=0.01)


def test_the_tail_is_the_conditional_distribution() -> None:
    estimate = LengthEstimate.of([5, 12, 40, 90, 250], 512)
    drawn = np.array([estimate.quantile(u) for u in (np.arange(20000) + 0.5) / 20000])
    for outlived in (3, 20, 40, 200, 400):
        rest = drawn[drawn > outlived]
        expected = np.maximum(np.quantile(rest, [0.25, 0.5, 0.9]), outlived + 1)
        found = [estimate.quantile(p, outlived) for p in (0.25, 0.5, 0.9)]
        np.testing.assert_allclose(found, expected, rtol=5e-3)
    assert estimate.mean(40) > estimate.mean()


@pytest.mark.parametrize("outlived", [511, 512, 9999])
def test_at_the_limit_nothing_is_left_to_guess(outlived: int) -> None:
    estimate = LengthEstimate.of([5, 12, 40, 90, 250], 512)
    assert estimate.quantile(0.01, outlived) == estimate.mean(outlived) == 512
