"""What decode steps are taken to cost, and which rows are run apart for it."""

import functools
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax.schedule.row_group import RowGroup, split
from eejax.schedule.step_cost import MIN_OBSERVATIONS, StepCost

SHAPES = [RowGroup(count, pages) for count in (1, 2, 3, 5, 8, 13, 16, 32) for pages in (1, 2, 5, 9)]
TRUTH = (2e-3, 1e-4, 5e-5)  # seconds


def seconds(rows, fixed, per_row, per_page):
    """The formula of the class, with the bucket spelt out."""
    bucket = next(2**i for i in range(20) if 2**i >= rows.count)
    return (fixed + per_row * bucket + per_page * bucket * rows.pages) * rows.expected_depth


def observe(cost, rows, time):
    cost.observe(rows.expected_depth, rows.row_depth(False), rows.pages, time)


def taught(cost, truth, rounds, *, noise=0.0):
    rng = random.Random(0)
    for _ in range(rounds):
        for rows in SHAPES:
            observe(cost, rows, seconds(rows, *truth) * (1 + noise * rng.uniform(-1, 1)))
    return cost


# --------------------------------------------------------------------------------------------------------------- rows


def test_a_batch_goes_as_deep_as_its_deepest_row():
    depths = (0.25, 0.5, 1.0)
    early, late, never = (RowGroup(1, 3, depths, r) for r in ((0.8, 0.9, 1.0), (0.5, 0.5, 1.0), (0.0, 0.0, 1.0)))
    assert early.expected_depth == pytest.approx(0.8 * 0.25 + 0.1 * 0.5 + 0.1 * 1)
    assert (late.expected_depth, never.expected_depth) == (pytest.approx(0.625), 1)
    both = early.join(RowGroup(4, 7, depths, late.resolved))
    assert (both.count, both.pages, both.depths) == (5, 7, depths)
    assert both.resolved == pytest.approx((0.4, 0.45, 1.0))  # both have left, independently
    assert early.join(never).expected_depth == 1


def test_a_step_costs_what_the_device_computes_padding_and_longest_row_included():
    cost = StepCost(*TRUTH)
    assert cost.tells_rows_apart
    for rows in (*SHAPES, RowGroup(6, 3, (0.5, 1.0), (0.25, 1.0))):
        assert rows.seconds(cost) == pytest.approx(seconds(rows, *TRUTH))
    assert RowGroup(5, 4).seconds(cost) == RowGroup(8, 4).seconds(cost)


def test_with_compaction_rows_that_have_left_are_not_paid_for():
    depths = (0.25, 0.5, 1.0)
    early, late = RowGroup(1, 3, depths, (0.75, 1.0, 1.0)), RowGroup(1, 3, depths, (0.0, 0.5, 1.0))
    eight = functools.reduce(RowGroup.join, [early] * 8)
    assert eight.rows_left == (6, 8, 8)
    assert eight.resolved == pytest.approx((0.75**8, 1, 1))
    # All eight run the first quarter, two of them the second, nobody the rest.
    assert eight.row_depth(True) == pytest.approx(0.25 * 8 + 0.25 * 2)
    assert eight.row_depth(False) == pytest.approx(8 * eight.expected_depth)
    mixed = eight.join(late)
    assert mixed.rows_left == (6, 8.5, 9)
    assert mixed.row_depth(True) == pytest.approx(0.25 * 9 + 0.25 * 3 + 0.5 * 0.5)
    cost = StepCost(*TRUTH, compacts=True)
    fixed, per_row, per_page = TRUTH
    assert eight.seconds(cost) == pytest.approx(
        fixed * eight.expected_depth + (per_row + 3 * per_page) * eight.row_depth(True)
    )
    assert eight.seconds(cost) < eight.seconds(StepCost(*TRUTH))


# ----------------------------------------------------------------------------------------------------------- learning


def test_until_it_knows_better_a_step_costs_the_same_whatever_it_holds():
    cost = StepCost()
    for i in range(MIN_OBSERVATIONS):
        assert not cost.tells_rows_apart
        assert len({rows.seconds(cost) for rows in SHAPES}) == 1
        observe(cost, SHAPES[i], seconds(SHAPES[i], *TRUTH))
    assert cost.tells_rows_apart
    assert RowGroup(32, 9).seconds(cost) > 2 * RowGroup(1, 1).seconds(cost)


@pytest.mark.parametrize("truth", [TRUTH, (2e-3, 0.0, 0.0), (0.0, 1e-4, 0.0), (0.0, 0.0, 5e-5), (5.0, 0.1, 0.3)])
def test_costs_are_learnt_from_steps(truth):
    cost = taught(StepCost(), truth, rounds=2)
    for rows in (RowGroup(4, 3), RowGroup(64, 12), RowGroup(7, 2, (0.5, 1.0), (0.5, 1.0))):
        assert rows.seconds(cost) == pytest.approx(seconds(rows, *truth), rel=0.02)
    noisy = taught(StepCost(), truth, rounds=8, noise=0.2)
    for rows in SHAPES:  # the errors are relative: cheap steps are fitted as well as dear ones
        assert rows.seconds(noisy) == pytest.approx(seconds(rows, *truth), rel=0.15)


def test_the_past_is_forgotten():
    cost = taught(StepCost(), TRUTH, rounds=30)
    slower = tuple(3 * one for one in TRUTH)
    taught(cost, slower, rounds=60)
    for rows in SHAPES:
        assert rows.seconds(cost) == pytest.approx(seconds(rows, *slower), rel=0.05)


def test_times_that_cannot_be_are_not_learnt_from():
    cost = taught(StepCost(), TRUTH, rounds=2)
    before = [rows.seconds(cost) for rows in SHAPES]
    for bad in (0.0, -1.0, math.nan, math.inf, -math.inf):
        observe(cost, SHAPES[0], bad)
    assert [rows.seconds(cost) for rows in SHAPES] == before


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(1, 40), st.floats(0.05, 1), st.floats(1e-6, 10)),
        min_size=MIN_OBSERVATIONS,
        max_size=40,
    )
)
def test_whatever_was_observed_more_rows_pages_or_depth_never_cost_less(observations):
    cost = StepCost()
    for count, pages, depth, time in observations:
        observe(cost, RowGroup(count, pages, (depth, 1.0), (1.0, 1.0)), time)
    small = RowGroup(3, 2, (0.5, 1.0), (0.9, 1.0))
    assert 0 < small.seconds(cost) < math.inf
    for more in (RowGroup(9, 2, *_of(small)), RowGroup(3, 7, *_of(small)), RowGroup(3, 2, small.depths, (0.1, 1.0))):
        assert more.seconds(cost) >= small.seconds(cost)


def _of(rows):
    return rows.depths, rows.resolved


# -------------------------------------------------------------------------------------------------------- rows apart

costs = st.builds(StepCost, *[st.sampled_from([0.0, 0.01, 0.3, 1.0, 7.0])] * 3)


@settings(max_examples=100)
@given(cost=costs, count=st.integers(1, 40), pages=st.integers(1, 6))
def test_rows_apart_are_the_cheapest_of_all_ways_to_group_them(cost, count, pages):
    best = [0.0]
    for n in range(1, count + 1):
        best.append(min(best[n - size] + RowGroup(size, pages).seconds(cost) for size in range(1, n + 1)))
    total, first = RowGroup(count, pages).apart(cost)
    assert total == pytest.approx(best[count])
    assert 1 <= first <= count
    spent, left = 0.0, count
    while left:  # to run as many as it says, again and again, takes what it says
        _, size = RowGroup(left, pages).apart(cost)
        spent += RowGroup(size, pages).seconds(cost)
        left -= size
    assert spent == pytest.approx(total)


kinds_of_rows = st.lists(
    st.builds(
        lambda count, pages, share: RowGroup(count, pages, (0.5, 1.0), (share, 1.0)),
        st.integers(1, 9),
        st.integers(1, 12),
        st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=100)
@given(cost=costs, kinds=kinds_of_rows)
def test_kinds_are_split_where_it_is_cheapest(cost, kinds):
    def price(run):
        joined = kinds[run[0]]
        for i in run[1:]:
            joined = joined.join(kinds[i])
        return joined.apart(cost)[0]

    ways = []
    for cuts in itertools.product([False, True], repeat=len(kinds) - 1):
        at = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(kinds)]
        ways.append(sum(price(range(a, b)) for a, b in itertools.pairwise(at)))
    total, runs = split(kinds, cost)
    assert total == pytest.approx(min(ways))
    assert [i for run in runs for i in run] == list(range(len(kinds)))
    assert sum(map(price, runs)) == pytest.approx(total)


def test_rows_go_apart_where_they_are_dear_and_together_where_steps_are():
    short, long = RowGroup(8, 1), RowGroup(8, 8)
    assert split([short, long], StepCost(1.0, 0.2, 0.05))[1] == [range(1), range(1, 2)]
    assert split([short, long], StepCost(9.0, 0.2, 0.05))[1] == [range(2)]
    assert split([short, long], StepCost())[1] == [range(2)]
    assert RowGroup(17, 4).apart(StepCost(1.0, 0.2, 0.05))[1] == 16
    assert RowGroup(17, 4).apart(StepCost(9.0, 0.2, 0.05))[1] == 17
