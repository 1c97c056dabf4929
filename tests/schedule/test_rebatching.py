"""When rows are held at an exit until more have gathered: what the cost of steps says, and what follows."""

from __future__ import annotations

import math

import pytest

from eejax.core import EarlyExitParams, SamplingParams, SchedulerConfig
from eejax.core.request import MicroBatch, Request, RowResult, Sequence, StepResult
from eejax.schedule.page_allocator import PageAllocator
from eejax.schedule.rebatching import MIN_TOKENS, rows_to_gather, tokens_per_second
from eejax.schedule.scheduler import Scheduler
from eejax.schedule.step_cost import StepCost

READS_WEIGHTS = StepCost(1.0, 1e-4, 0.0, compacts=True)
"""A block costs what its weights cost, however many rows it computes."""
COMPUTES = StepCost(0.0, 1e-2, 0.0, compacts=True)
"""A block costs what its rows cost."""
DEPTH, EXIT = 12, 3


def running(count: int, early: int = 90, late: int = 10, max_tokens: int = 500) -> list[Sequence]:
    """Rows that have left `early` times after block 3 and run all of them `late` times."""
    params = SamplingParams(max_tokens=max_tokens, early_exit=EarlyExitParams())
    rows = []
    for number in range(count):
        [row] = Request(f"r{number}", None, (1, 2, 3), params, max_tokens, (0.9,), frozenset(), 0).sequences
        for layer in [DEPTH, *[EXIT] * early, *[DEPTH] * late]:
            row.append(0, layer, None)
        rows.append(row)
    return rows


def test_rows_are_gathered_where_the_weights_are_what_a_block_costs():
    found = rows_to_gather(running(16), READS_WEIGHTS, page_size=64)
    assert found > 1 and found & (found - 1) == 0 and found <= 8


@pytest.mark.parametrize(
    ("rows", "cost"),
    [
        (running(16), COMPUTES),
        (running(16), StepCost(compacts=True)),  # it has not seen enough steps to tell
        (running(16, early=3, late=0), READS_WEIGHTS),  # nor enough tokens
        (running(16, early=100, late=0), READS_WEIGHTS),  # all leave at once: nobody could be held
        (running(16, early=0, late=100), READS_WEIGHTS),
        (running(1), READS_WEIGHTS),
    ],
    ids=["rows cost", "cost unknown", "few tokens", "all early", "all late", "one row"],
)
def test_nobody_is_held_where_it_does_not_pay(rows, cost):
    assert rows_to_gather(rows, cost, page_size=64) == 1


def test_enough_tokens_are_those_of_all_rows():
    few = running(16, early=2, late=1)
    assert sum(row.exit_counts.total() for row in few) < MIN_TOKENS
    assert rows_to_gather(few, READS_WEIGHTS, page_size=64) == 1
    some = running(16, early=6, late=1)
    assert sum(row.exit_counts.total() for row in some) > MIN_TOKENS
    assert rows_to_gather(some, READS_WEIGHTS, page_size=64) > 1


def test_the_rate_without_holding_is_that_of_a_step():
    """Every row gets a token a step; 16 rows of which a quarter goes on: the second half is read in every step."""
    rate = tokens_per_second(16, 1, (0.5, 1.0), (0.75, 0.25), READS_WEIGHTS, pages=1)
    assert rate == pytest.approx(16 / (1.0 + 1e-4 * (0.5 * 16 + 0.5 * 4)), rel=1e-6)
    # One row in 16 now and then: the probability that there is one counts.
    rare = tokens_per_second(16, 1, (0.5, 1.0), (1 - 1 / 32, 1 / 32), READS_WEIGHTS, pages=1)
    there = 1 - math.exp(-0.5)
    assert rare == pytest.approx(16 / (0.5 + 0.5 * there + 1e-4 * (0.5 * 16 + 0.5 * there * 2)), rel=1e-2)


def test_gathering_reads_the_second_half_less_often():
    one, four = (tokens_per_second(16, hold, (0.25, 1.0), (0.9, 0.1), READS_WEIGHTS, 1) for hold in (1, 4))
    assert four > 1.3 * one
    one, four = (tokens_per_second(16, hold, (0.25, 1.0), (0.9, 0.1), COMPUTES, 1) for hold in (1, 4))
    assert four < 1.05 * one


# ---------------------------------------------------------------------------------------------------------- scheduler


def scheduled(rebatching: str, *, slots: int, waiting: int, cost: StepCost = READS_WEIGHTS) -> MicroBatch:
    """The decode batch of full or half-full slots, with requests waiting or not."""
    scheduler = Scheduler(SchedulerConfig(slots), PageAllocator(200), page_size=64, cost=cost, rebatching=rebatching)
    rows = running(8)
    for row in rows:
        del row.output_token_ids[:], row.exit_layers[:]  # as if it had been decoded here
    scheduler.add(rows)
    batch = scheduler.schedule()
    assert batch is not None and batch.kind == "prefill"
    scheduler.update(batch, StepResult(tuple(RowResult((0,), (DEPTH,)) for _ in batch.rows)))
    scheduler.add(running(waiting, 0, 0))
    batch = scheduler.schedule()
    while batch is not None and batch.kind == "prefill":
        scheduler.update(batch, StepResult(tuple(RowResult((0,), (DEPTH,)) for _ in batch.rows)))
        batch = scheduler.schedule()
    assert batch is not None
    return batch


def test_rows_are_held_only_while_slots_are_full_and_others_wait():
    assert scheduled("auto", slots=8, waiting=3).hold > 1
    assert scheduled("auto", slots=8, waiting=0).hold == 1
    assert scheduled("auto", slots=16, waiting=3).hold == 1
    assert scheduled("auto", slots=8, waiting=3, cost=COMPUTES).hold == 1


def test_holding_can_be_asked_for_or_forbidden():
    assert scheduled("always", slots=8, waiting=0, cost=COMPUTES).hold == 2
    assert scheduled("never", slots=8, waiting=3).hold == 1
