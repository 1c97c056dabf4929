"""Learn-then-Test: p-values on exact cases, the order of testing, and the promise itself on simulated losses."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eejax.core.errors import ConfigError
from eejax.tune.risk import fixed_sequence, p_value, requests_needed


def bentkus(k: int, n: int, p: Fraction) -> float:
    """e P(Bin(n, p) <= k) in exact fractions."""
    return math.e * float(sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)))


def test_p_values_by_hand():
    # No loss at all: both bounds are powers of 1 - a, and Hoeffding's has no factor e.
    assert p_value([0.0] * 10, 0.1) == pytest.approx(0.9**10, rel=1e-12)
    # A coin: h(1/4, 1/2) = log 2 - H(1/4), so exp(-8 h) = 2^-8 / (1/4)^2 / (3/4)^6.
    hoeffding = 2**-8 / (0.25**2 * 0.75**6)
    assert p_value([1.0, 1.0] + [0.0] * 6, 0.5) == pytest.approx(min(hoeffding, bentkus(2, 8, Fraction(1, 2))))
    # Many rare losses: the binomial tail is the smaller one.
    n, k = 400, 12
    found = p_value([1.0] * k + [0.0] * (n - k), 0.06)
    assert found == pytest.approx(bentkus(k, n, Fraction(6, 100)), rel=1e-9)
    assert found < math.exp(-n * (0.03 * math.log(0.03 / 0.06) + 0.97 * math.log(0.97 / 0.94)))


def test_fractional_losses_count_as_the_next_whole_one():
    n = 400
    whole, split = [1.0] * 12 + [0.0] * (n - 12), [0.5] * 23 + [0.0] * (n - 23)  # 12 and 11.5 in all
    assert p_value(split, 0.06) == pytest.approx(p_value(whole, 0.06))
    assert p_value([*split, 0.5][1:], 0.06) == pytest.approx(p_value(whole, 0.06))
    # Thirty tenths are three: their rounded sum must not be taken for four.
    tenths = [0.1] * 30 + [0.0] * 70
    assert p_value(tenths, 0.2) == pytest.approx(p_value([1.0] * 3 + [0.0] * 97, 0.2))


def test_a_mean_at_or_above_the_bound_proves_nothing():
    assert p_value([1.0] + [0.0] * 9, 0.1) == 1.0
    assert p_value([1.0] * 10, 0.1) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(0, 59), st.floats(0.01, 0.9))
def test_more_loss_never_makes_a_smaller_p_value(losses, where, max_risk):
    worse = list(losses)
    worse[where % len(losses)] = 1.0
    assert 0 < p_value(losses, max_risk) <= p_value(worse, max_risk) * (1 + 1e-9) <= 1 + 1e-9


@given(st.floats(0.001, 0.9), st.floats(0.5, 0.999))
def test_the_requests_needed_just_suffice(max_risk, confidence):
    n = requests_needed(max_risk, confidence)
    assert p_value([0.0] * n, max_risk) <= 1 - confidence
    assert n == 1 or p_value([0.0] * (n - 1), max_risk) > 1 - confidence


def test_requests_needed_by_hand():
    assert (requests_needed(0.02, 0.95), requests_needed(0.05, 0.95), requests_needed(0.5, 0.75)) == (149, 59, 2)


def test_testing_stops_at_the_first_failure_and_never_goes_on():
    good, bad = [0.0] * 60, [0.2] * 60
    asked = []

    def columns():
        for i, losses in enumerate((good, good, bad, good)):
            asked.append(i)
            yield losses

    tested = fixed_sequence(columns(), 0.1, 0.95)
    assert asked == [0, 1, 2]
    assert [one.accepted for one in tested] == [True, True, False]
    assert [one.risk for one in tested] == pytest.approx([0, 0, 0.2])
    assert tested[0].p_value == pytest.approx(0.9**60)
    assert fixed_sequence([bad], 0.1, 0.95)[0].accepted is False


def test_the_promise_holds_on_losses_whose_risk_is_known():
    """Risks rise through the bound; the last accepted one is above it in no more than 5 % of 600 draws."""
    rng, bound, draws = np.random.default_rng(0), 0.1, 600
    risks = np.array([0.02, 0.06, 0.101, 0.103])
    broken = reached = 0
    for _ in range(draws):
        losses = (rng.random(300)[:, None] < risks).astype(float)  # of one request, alike at every threshold
        accepted = sum(one.accepted for one in fixed_sequence(losses.T.tolist(), bound, 0.95))
        broken += accepted > 2
        reached += accepted == 2
    assert broken <= draws * 0.05 + 2 * math.sqrt(draws * 0.05 * 0.95)
    assert broken > 0  # else the case would show nothing
    assert reached > draws / 4


@pytest.mark.parametrize(
    ("losses", "max_risk", "confidence", "said"),
    [
        ([0.0], 0.0, 0.95, "max_risk must be a number between 0 and 1, got 0.0"),
        ([0.0], 1.0, 0.95, "got 1.0"),
        ([0.0], 0.1, 1.0, "confidence must be a number between 0 and 1, got 1.0"),
        ([0.0], 0.1, float("nan"), "got nan"),
        ([0.0], True, 0.9, "got True"),
        ([0.0, 1.5], 0.1, 0.9, r"a loss must lie in \[0, 1\], got 1.5"),
        ([float("nan")], 0.1, 0.9, "got nan"),
        ([], 0.1, 0.9, "needs losses"),
    ],
)
def test_what_is_not_allowed_is_refused_by_value(losses, max_risk, confidence, said):
    with pytest.raises(ConfigError, match=said):
        fixed_sequence([losses], max_risk, confidence)
