"""The `length` policy: who goes first, what is reserved, who is parked, and what each of its options does."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax.core import SchedulerConfig
from eejax.core.lengths import LengthEstimate
from eejax.schedule.length_policy import LengthPolicy
from eejax.schedule.page_allocator import PageAllocator
from eejax.schedule.scheduler import Scheduler
from eejax.schedule.step_cost import StepCost
from tests.schedule.test_policies import DEPTH, Device, admitted, lengths, make_scheduler, make_seq
from tests.schedule.test_scheduler import STOP, run_all, step

PAGE = 4
SPREAD = (2.0, 6.0, 10.0, 18.0, 26.0)  # quantiles of a prediction that is unsure


def make_policy(*, cost=None, **options):
    return LengthPolicy(SchedulerConfig(**options), page_size=PAGE, cost=cost or StepCost())


def held_seq(number, done, max_tokens=64, *, arrival=0, early=0, **options):
    """A row that has answered `done` tokens, the last `early` of them half-way through the network."""
    seq = make_seq(4, max_tokens, **options)
    seq.number, seq.arrival = number, arrival
    for i in range(done):
        seq.append(100 + i, DEPTH // 2 if i >= done - early and i > 0 else DEPTH, None)
    return seq


# -------------------------------------------------------------------------------------------------------------- order


def test_in_a_burst_the_shortest_predicted_answer_goes_first():
    scheduler, _ = make_scheduler("length", 64, max_num_seqs=1)
    long, short, unknown, middle = (make_seq(max_tokens=40, predicted=p) for p in (40.0, 3.0, None, 12.0))
    scheduler.add([long, short, unknown, middle])
    unknown_mean = LengthEstimate.unknown(40).mean()
    assert 3 < unknown_mean < 12  # what says nothing stands where its mean is
    assert admitted(run_all(scheduler, Device(PAGE))) == [short, unknown, middle, long]


def test_with_max_wait_0_nobody_is_overtaken():
    scheduler, _ = make_scheduler("length", 64, max_num_seqs=2, max_wait=0)
    seqs = [make_seq(max_tokens=20, predicted=p) for p in (20.0, 1.0, 9.0, 2.0, 15.0)]
    scheduler.add(seqs)
    assert admitted(run_all(scheduler, Device(PAGE))) == seqs


def test_only_a_window_of_those_who_came_first_is_ordered():
    scheduler, _ = make_scheduler("length", 64, max_num_seqs=1, window=3)
    seqs = [make_seq(max_tokens=9, predicted=p) for p in (9.0, 8.0, 7.0, 1.0, 6.0)]
    scheduler.add(seqs)
    order = admitted(run_all(scheduler, Device(PAGE)))
    assert [seqs.index(seq) for seq in order] == [2, 3, 4, 1, 0]  # the fourth comes into sight once the third has left


@pytest.mark.parametrize(("max_wait", "times"), [(0, 0), (0.9, 1), (1.5, 2), (4.2, 5)])
def test_max_wait_is_how_far_a_long_answer_is_overtaken_in_its_own_lengths(max_wait, times):
    # One slot; a short answer takes 10 ticks of the clock (a prompt and 9 steps), and then comes the next. It is put
    # before the long one while its arrival plus 10 times `max_wait` is below 20 times `max_wait`.
    scheduler, _ = make_scheduler("length", 64, max_num_seqs=1, max_wait=max_wait)
    device, overtaken = Device(PAGE), 0
    scheduler.add([long := make_seq(max_tokens=20, predicted=20.0)])
    for _ in range(10):
        scheduler.add([make_seq(max_tokens=10, predicted=10.0)])
        step(scheduler, device)
        if long.pages:
            break
        overtaken += 1
        while scheduler.num_running:
            step(scheduler, device)
    assert overtaken == times


@settings(max_examples=200)
@given(
    predictions=st.tuples(*[st.one_of(st.none(), st.tuples(*[lengths] * 5))] * 2),
    done=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    max_tokens=st.integers(16, 40),
    max_wait=st.floats(0, 100),
    late=st.integers(1, 5),
    early=st.tuples(st.booleans(), st.booleans()),
)
def test_nobody_is_put_behind_one_who_came_after_the_bound(predictions, done, max_tokens, max_wait, late, early):
    policy = make_policy(max_wait=max_wait, max_num_seqs=1)
    arrivals = (0, math.floor(max_wait * max_tokens) + late)
    first, second = (
        held_seq(i, done[i], max_tokens, arrival=arrivals[i], predicted=predictions[i], leaves_early=early[i])
        for i in range(2)
    )
    assert policy.rank(first) < policy.rank(second)
    assert policy.select([second, first], 16).rows == [first]
    assert policy.victim([second, first]) is second
    assert policy.may_join(first, [second])
    assert not policy.may_join(second, [first])


def test_priorities_come_before_lengths():
    policy = make_policy(max_num_seqs=1)
    urgent, short = held_seq(1, 3, predicted=60.0), held_seq(0, 3, predicted=4.0, priority=1)
    assert policy.select([short, urgent], 16).rows == [urgent]
    assert policy.victim([urgent, short]) is short


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("predicted", "rows"), [(8.0, 6), (16.0, 4), (32.0, 2)])
def test_pages_are_reserved_for_what_is_predicted_and_not_for_the_maximum(predicted, rows):
    # A prompt of 4 and an answer of 8, 16 or 32, whose last token needs no room: 3, 5 or 9 pages of 20.
    scheduler, _ = make_scheduler("length", 20, max_num_seqs=16, max_chunk_steps=1)
    scheduler.add([make_seq(4, 40, predicted=predicted) for _ in range(8)])
    assert len(scheduler.schedule().rows) == rows


def test_what_is_reserved_is_the_quantile_of_the_configuration():
    rows = {}
    for quantile in (0.1, 0.5, 0.75, 0.9):
        scheduler, _ = make_scheduler("length", 24, max_num_seqs=16, max_chunk_steps=1, quantile=quantile)
        scheduler.add([make_seq(4, 40, predicted=SPREAD) for _ in range(16)])
        rows[quantile] = len(scheduler.schedule().rows)
    assert rows == {0.1: 12, 0.5: 6, 0.75: 4, 0.9: 3}  # 2, 4, 6 and 8 pages


@settings(max_examples=100)
@given(predicted=st.one_of(st.none(), st.tuples(*[lengths] * 5)), max_tokens=st.integers(2, 60), data=st.data())
def test_a_promise_is_never_behind_the_answer_nor_beyond_its_budget(predicted, max_tokens, data):
    quantile = data.draw(st.sampled_from([0.01, 0.5, 0.99]))
    policy = make_policy(quantile=quantile)
    seq = held_seq(0, 0, max_tokens, predicted=predicted)
    for done in range(max_tokens):
        steps = policy.steps_to_reserve(seq)
        assert 1 <= steps <= max_tokens - done
        assert math.isfinite(policy.rank(seq)[0])
        seq.append(100 + done, DEPTH, None)


def test_who_outlives_the_prediction_gets_the_conditional_tail():
    policy = make_policy(quantile=0.5)
    seq = held_seq(0, 9, predicted=SPREAD)
    assert policy.steps_to_reserve(seq) == math.ceil(seq.estimate.quantile(0.5, longer_than=9)) - 9
    seq = held_seq(0, 3, predicted=(4.0, 4.0, 4.0, 5.0, 6.0))
    key = policy.rank(seq)
    assert policy.steps_to_reserve(seq) == math.ceil(seq.estimate.quantile(0.5, longer_than=3)) - 3
    for i in range(10):
        seq.append(200 + i, DEPTH, None)
    assert policy.steps_to_reserve(seq) == math.ceil(seq.estimate.quantile(0.5, longer_than=13)) - 13
    assert policy.rank(seq) > key  # it falls behind


def test_the_last_in_order_gives_way_and_only_when_pages_run_out():
    # Said to take 4 tokens each, they take 24: 7 pages each in the end, of 12.
    scheduler, allocator = make_scheduler("length", 12, max_num_seqs=4, max_chunk_steps=4)
    seqs = [make_seq(4, 24, predicted=4.0) for _ in range(2)]
    scheduler.add(seqs)
    device = Device(PAGE)
    while scheduler.has_work and not scheduler.num_preemptions:
        free, tokens = allocator.num_free, list(seqs[1].output_token_ids)
        step(scheduler, device)
    assert free < 2  # a page for each would have been enough to go on
    assert [seq.preemptions for seq in seqs] == [0, 1]
    assert (seqs[1].pages, seqs[1].output_token_ids) == ([], tokens)
    run_all(scheduler, device)
    assert [seq.output_token_ids for seq in seqs] == [device.answer(seq) for seq in seqs]


# ------------------------------------------------------------------------------------------------- parking, refilling


def test_who_outlives_its_prediction_is_parked_with_pages_and_tokens_and_goes_on_later():
    scheduler, _ = make_scheduler("length", 64, max_num_seqs=2, max_chunk_steps=8)
    failed = make_seq(4, 60, predicted=(4.0, 4.0, 4.0, 5.0, 40.0))
    others = [make_seq(4, 12, predicted=12.0) for _ in range(5)]
    device = Device(PAGE)
    scheduler.add([failed, *others])
    while scheduler.has_work and not failed.parkings:
        step(scheduler, device)
    pages, tokens = list(failed.pages), list(failed.output_token_ids)
    assert pages
    assert len(tokens) > 4
    while sum(seq.finish_reason is None for seq in others) > 1:  # both slots are wanted
        batch = step(scheduler, device)
        assert failed not in batch.rows
        assert (failed.pages, failed.output_token_ids) == (pages, tokens)
    batches = run_all(scheduler, device)  # the device objects if its KV is not what it was
    assert {batch.kind for batch in batches} == {"decode"}
    assert failed.output_token_ids == device.answer(failed)
    assert (failed.preemptions, scheduler.num_preemptions) == (0, 0)
    assert scheduler.num_parkings == failed.parkings == 1


def test_a_shorter_answer_joins_full_slots_and_the_longest_is_parked():
    scheduler, _ = make_scheduler("length", 64, max_num_seqs=2, max_chunk_steps=4)
    longest, long, short = (make_seq(max_tokens=60, predicted=p) for p in (50.0, 40.0, 3.0))
    device = Device(PAGE, answers={short: [50, 51, STOP]})
    scheduler.add([longest, long])
    for _ in range(2):
        step(scheduler, device)
    scheduler.add([short])
    assert step(scheduler, device).rows == (short,)
    assert set(step(scheduler, device).rows) == {long, short}
    assert (longest.parkings, short.finish_reason) == (1, "stop")
    assert set(step(scheduler, device).rows) == {longest, long}


def test_a_longer_answer_does_not_join_full_slots():
    scheduler, _ = make_scheduler("length", 64, max_num_seqs=2, max_chunk_steps=4)
    scheduler.add([make_seq(max_tokens=60, predicted=10.0) for _ in range(2)])
    device = Device(PAGE)
    step(scheduler, device)
    scheduler.add([make_seq(max_tokens=60, predicted=50.0)])
    assert {step(scheduler, device).kind for _ in range(2)} == {"decode"}
    assert scheduler.num_waiting == 1


def test_a_finished_row_is_replaced_at_once():
    scheduler, _ = make_scheduler("length", 64, max_num_seqs=2, max_chunk_steps=16)
    short, long, waits = (make_seq(max_tokens=20, predicted=20.0) for _ in range(3))
    scheduler.add([short, long, waits])
    device = Device(PAGE, answers={short: [50, 51, 52, 53, 54, STOP]})
    first, second, third = (step(scheduler, device) for _ in range(3))
    assert (set(first.rows), second.n_steps, second.yield_on_free) == ({short, long}, 16, True)
    assert len(long.output_token_ids) == 6  # the chunk ended with the short one
    assert third.rows == (waits,)


def test_a_chunk_ends_where_the_first_prediction_ends_but_not_within_four_steps():
    def steps(*remaining, longest=16):
        policy = make_policy(max_num_seqs=8)
        rows = [held_seq(i, 3, predicted=3.0 + n) for i, n in enumerate(remaining)]
        return policy.select(rows, longest).n_steps

    assert [steps(9, 30), steps(30, 9), steps(40), steps(1, 30), steps(9, longest=2)] == [9, 9, 16, 4, 2]


# ------------------------------------------------------------------------------------------------- rows that cost alike


def test_rows_are_kept_together_until_a_step_is_known_to_cost_by_them():
    rows = [held_seq(0, 2), held_seq(1, 60)]
    assert set(make_policy().select(rows, 16).rows) == set(rows)


def test_a_long_row_runs_apart_when_its_pages_would_make_the_others_dearer():
    by_pages, by_step = StepCost(0.1, 0.0, 1.0), StepCost(10.0, 0.01, 0.01)
    short = [held_seq(i, 4, predicted=40.0) for i in range(4)]
    long = held_seq(9, 60, predicted=64.0)
    for head in (short, [long]):
        # The head of the order goes, and its like with it.
        for row in (*short, long):
            row.arrival = 0 if row in head else 10_000
        chosen = make_policy(cost=by_pages).select([*short, long], 16).rows
        assert set(chosen) == set(head)
    assert set(make_policy(cost=by_step).select([*short, long], 16).rows) == {*short, long}


def test_deep_rows_run_apart_from_those_that_leave_early_when_it_pays():
    early = [held_seq(i, 30, early=29, leaves_early=True) for i in range(4)]
    deep = [held_seq(i, 30, leaves_early=True, arrival=5000) for i in range(4, 8)]
    by_row, by_step = StepCost(0.01, 1.0, 0.0), StepCost(10.0, 0.0, 0.001)
    assert set(make_policy(cost=by_row).select([*deep, *early], 16).rows) == set(early)
    assert set(make_policy(cost=by_step).select([*deep, *early], 16).rows) == {*deep, *early}


def test_the_first_early_exit_request_is_scheduled_before_anything_is_known_of_exits():
    scheduler, _ = make_scheduler("length, rows apart", 16)
    seqs = [make_seq(max_tokens=m, leaves_early=True) for m in (1, 5, 9)]
    scheduler.add(seqs)
    device = Device(PAGE)
    run_all(scheduler, device)
    assert all(seq.output_token_ids == device.answer(seq) for seq in seqs)


def test_the_running_mean_of_exits_makes_requests_that_leave_early_cheaper():
    policy = make_policy(max_wait=1)
    new = make_seq(max_tokens=40, predicted=20.0, leaves_early=True)
    plain = make_seq(max_tokens=40, predicted=20.0)
    assert policy.rank(new)[0] == policy.rank(plain)[0] == pytest.approx(20)
    policy.finished(held_seq(1, 9, leaves_early=True, early=4))  # 4 of 8 decoded tokens at half depth
    assert policy.rank(new)[0] == pytest.approx(20 * 0.75)
    assert policy.rank(plain)[0] == pytest.approx(20)
    policy.finished(held_seq(2, 30))  # one that may not leave says nothing
    assert policy.rank(new)[0] == pytest.approx(20 * 0.75)
    # Its own tokens count for more the more there are: 8 of the others', with a mean of 0.75, beside 24 at half depth.
    own = held_seq(3, 25, 80, predicted=45.0, leaves_early=True, early=24)
    remaining = own.estimate.mean(longer_than=25) - 25
    assert policy.rank(own)[0] == pytest.approx(remaining * (8 * 0.75 + 24 * 0.5) / 32)


@pytest.mark.parametrize("quantiles", [(math.nan,) * 5, (-1.0,) * 5, (math.inf,) * 5, (1.0,)])
def test_predictions_that_are_none_do_not_stall(quantiles):
    config, allocator = SchedulerConfig(max_num_seqs=2, policy="length"), PageAllocator(16)
    scheduler = Scheduler(config, allocator, page_size=PAGE)  # the policy that the configuration names
    seqs = [make_seq(4, 20, predicted=quantiles) for _ in range(6)]
    scheduler.add(seqs)
    device = Device(PAGE)
    run_all(scheduler, device)
    assert all(seq.output_token_ids == device.answer(seq) for seq in seqs)
