"""The paper's scheduling on our scheduler: who shares a batch, where it is cut off, and that nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.paper import PaperScheduler
from eejax.core import SchedulerConfig
from eejax.core.lengths import LengthEstimate
from eejax.schedule.integrity import check_integrity
from eejax.schedule.page_allocator import PageAllocator
from tests.schedule.test_scheduler import STOP, FakeDevice, kinds, make_request, run_all, step

PAGE = 4


def make(num_pages=400, slots=4, chunk=16, **options):
    allocator = PageAllocator(num_pages)
    config = SchedulerConfig(max_num_seqs=slots, max_chunk_steps=chunk)
    return PaperScheduler(config, allocator, page_size=PAGE, paper=options), allocator


def submit(scheduler, device, lengths, *, prompt=3, budget=200, predicted=None):
    """Requests with answers of these lengths; `predicted` are what a predictor says, the truth by default."""
    rows = []
    for length, guess in zip(lengths, predicted or lengths, strict=True):
        (row,) = make_request(prompt, budget).sequences
        row.estimate = LengthEstimate.exactly(guess, budget)
        device.answers[row] = [7 + i for i in range(length - 1)] + [STOP if length < budget else 7]
        rows.append(row)
        scheduler.add([row])
    return rows


def batches_of(batches):
    """Rows of each static batch, by the numbers of its sequences: who was prefilled before it decoded."""
    found, filling = [], False
    for batch in batches:
        if batch.kind == "prefill":
            found = found if filling else [*found, []]
            found[-1] += [row.number for row in batch.rows]
        filling = batch.kind == "prefill"
    return found


def test_without_options_batches_are_cut_in_order_of_arrival_and_nobody_joins() -> None:
    scheduler, _ = make()
    device = FakeDevice(PAGE)
    rows = submit(scheduler, device, [150, 10, 60, 20, 120, 30])
    batches = run_all(scheduler, device)
    assert batches_of(batches) == [[0, 1, 2, 3], [4, 5]]
    assert [len(row.output_token_ids) for row in rows] == [150, 10, 60, 20, 120, 30]
    widths = [batch.width for batch in batches if batch.kind == "decode"]
    assert set(widths) == {4, 2} and widths == sorted(widths, reverse=True)


def test_ordered_batches_go_by_bin_then_arrival_and_groups_are_kept_apart() -> None:
    scheduler, _ = make(ordered=True, group=8)
    device = FakeDevice(PAGE)
    submit(scheduler, device, [150, 10, 60, 20, 120, 30, 55, 99, 5, 6])
    # 10, 20 and 30 share a bin, so do 120 and 150; the ninth and tenth, though shortest, come after their group.
    assert batches_of(run_all(scheduler, device)) == [[1, 3, 5, 2], [6, 7, 0, 4], [8, 9]]


@pytest.mark.parametrize(("quantile", "first"), [(0.75, 0), (0.1, 1)])
def test_the_predicted_length_is_the_quantile_asked_for(quantile: float, first: int) -> None:
    scheduler, _ = make(ordered=True, slots=1, quantile=quantile)
    rows = [make_request(3, 200).sequences[0] for _ in range(2)]
    rows[0].estimate = LengthEstimate.of((80, 80, 80, 80, 80), 200)
    rows[1].estimate = LengthEstimate.of((10, 60, 110, 120, 130), 200)
    scheduler.add(rows)
    batch = scheduler.schedule()
    assert batch is not None and batch.rows == (rows[first],)


def test_a_batch_is_as_large_as_pages_allow_and_a_power_of_two() -> None:
    # Prompt and budget are 203 tokens, 51 pages: 7 would fit, so 4 go.
    scheduler, allocator = make(num_pages=7 * 51, slots=16)
    device = FakeDevice(PAGE)
    submit(scheduler, device, [20] * 9)
    assert [len(one) for one in batches_of(run_all(scheduler, device))] == [4, 4, 1]
    assert allocator.num_used == 0


def test_variable_batch_size_grows_with_short_predictions_up_to_its_own_limit() -> None:
    for max_rows, sizes in ((16, [16, 4]), (8, [8, 8, 4])):
        scheduler, _ = make(num_pages=7 * 51, slots=4, ordered=True, vbs=True, max_rows=max_rows)
        device = FakeDevice(PAGE)
        # Bins of 50: 53 tokens are 14 pages, 25 rows would fit. The long ones take 51 pages each.
        submit(scheduler, device, [20] * 16 + [180] * 4)
        assert [len(one) for one in batches_of(run_all(scheduler, device))] == sizes


def test_without_vbs_the_batch_size_does_not_grow() -> None:
    scheduler, _ = make(num_pages=20 * 51, slots=4, ordered=True, max_rows=16)
    device = FakeDevice(PAGE)
    submit(scheduler, device, [20] * 8)
    assert [len(one) for one in batches_of(run_all(scheduler, device))] == [4, 4]


def test_fcr_cuts_the_batch_off_and_answers_failures_again_from_their_prompts() -> None:
    scheduler, allocator = make(ordered=True, fcr=True)
    device = FakeDevice(PAGE)
    rows = submit(scheduler, device, [40, 120, 30, 50, 20, 90], predicted=[40, 45, 30, 50, 90, 60])
    seen = []
    while scheduler.has_work:
        batch = step(scheduler, device)
        assert batch is not None
        seen.append(batch)
        if batch.kind == "decode" and rows[1].number in {row.number for row in batch.rows} and not rows[1].preemptions:
            assert len(rows[1].output_token_ids) <= 50
    # The first batch is cut at 50 tokens, where the second answer was to end; it returns when its group is through.
    assert batches_of(seen) == [[0, 1, 2, 3], [4, 5], [1]]
    assert rows[1].preemptions == 1 and [row.preemptions for row in rows[2:]] == [0, 0, 0, 0]
    again = next(batch for batch in seen[::-1] if batch.kind == "prefill")
    assert again.rows == (rows[1],) and rows[1].finish_reason == "stop"
    assert [row.output_token_ids for row in rows] == [device.answers[row] for row in rows]
    assert all(len(row.exit_layers) == len(row.output_token_ids) for row in rows)
    assert allocator.num_used == 0


def test_fcr_recomputes_tokens_and_their_times() -> None:
    scheduler, _ = make(slots=1, ordered=True, fcr=True)
    device = FakeDevice(PAGE)
    (row,) = submit(scheduler, device, [60], predicted=[20])
    while not row.preemptions:
        step(scheduler, device)
    # The drop and the second prefill came in one call: one token again, of a prompt that was run again.
    assert (len(row.output_token_ids), row.exit_layers, row.num_cached) == (1, [4], 3)
    run_all(scheduler, device)
    assert row.output_token_ids == device.answers[row]


def test_nobody_is_cut_off_without_fcr() -> None:
    scheduler, _ = make(ordered=True)
    device = FakeDevice(PAGE)
    rows = submit(scheduler, device, [120, 30], predicted=[20, 20])
    batches = run_all(scheduler, device)
    assert kinds(batches).startswith("pd") and "p" not in kinds(batches)[1:]
    assert [row.preemptions for row in rows] == [0, 0]


def test_failures_come_again_in_batches_of_their_own() -> None:
    scheduler, _ = make(ordered=True, fcr=True, group=8)
    device = FakeDevice(PAGE)
    rows = submit(scheduler, device, [120, 130, 10, 110, 20, 100, 10, 10], predicted=[10] * 8)
    assert batches_of(run_all(scheduler, device)) == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 3, 5]]
    assert [row.preemptions for row in rows] == [1, 1, 0, 1, 0, 1, 0, 0]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 120), st.integers(1, 120), st.integers(0, 6)),
        min_size=1,
        max_size=24,
    ),
    st.integers(0, 7),
    st.integers(36, 90),
    st.sampled_from([1, 2, 4, 16]),
)
def test_everything_is_answered_once_whatever_is_predicted(requests, options, num_pages, chunk) -> None:
    flags = {name: bool(options >> i & 1) for i, name in enumerate(("ordered", "vbs", "fcr"))}
    scheduler, allocator = make(num_pages, chunk=chunk, group=5, max_rows=8, **flags)
    device = FakeDevice(PAGE)
    rows, steps = [], 0
    for prompt, length, predicted, wait in requests:
        rows += submit(scheduler, device, [length], prompt=prompt, budget=120, predicted=[predicted])
        for _ in range(wait):
            step(scheduler, device)
            check_integrity(allocator, [row.pages for row in rows])
    while scheduler.has_work:
        step(scheduler, device)
        check_integrity(allocator, [row.pages for row in rows])
        steps += 1
        assert steps < 10_000
    assert [row.output_token_ids for row in rows] == [device.answers[row] for row in rows]
    assert allocator.num_used == 0
