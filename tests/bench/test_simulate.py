"""The simulator's clock and counts against cases computed by hand, and what it refuses to overlook."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import simulator
from bench.paper import PaperScheduler
from bench.schedule_rows import figures, with_ratios
from bench.simulator import SimulatedRequest, simulate
from bench.step_model import DecodeCall, PrefillCall, StepModel, pages_visited
from eejax.core import CacheConfig, SchedulerConfig
from eejax.core.errors import ConfigError
from eejax.core.lengths import LengthEstimate
from eejax.schedule.page_allocator import PageAllocator, PageError
from eejax.schedule.scheduler import Scheduler
from eejax.schedule.step_cost import StepCost

STEPS = StepModel(
    call=0.0, step=1.0, blocks=0.0, row=0.0, page=0.0, head=0.0, prefill_call=10.0, prefill_token=0.0
)  # a second for each step, ten for each prompt
COST = StepModel(
    call=0.5, step=1.0, blocks=2.0, row=0.25, page=0.125, head=0.0625, prefill_call=3.0, prefill_token=0.01
)


def run(requests, cost=STEPS, *, num_pages=100, exits=(12,), **config):
    return simulate(requests, SchedulerConfig(**config), cache=CacheConfig(num_pages, 4), cost=cost, exits=exits)


def asked(length, *, prompt=4, limit=50, **options):
    return SimulatedRequest(prompt, length, limit, **options)


def test_all_at_once() -> None:
    one = run([asked(3), asked(5)])
    # Two prompts, 20 s; nobody waits for a slot, so one call of 4 steps brings the rest of both.
    assert one.first_tokens == (20, 20)
    assert one.latencies == (24, 24)
    assert (one.seconds, one.steps, one.row_steps) == (24, 4, 8)
    assert (one.prompt_tokens, one.prefilled, one.answer_tokens, one.produced) == (8, 8, 8, 8)
    assert one.wasted == pytest.approx(1 - 6 / 8)
    # A page of four tokens each for the prompt, and as many more as a chunk of 16 steps may take, while both run.
    assert one.page_seconds == 20 * 2 * 5 + 4 * 2 * 5


def test_one_slot() -> None:
    one = run([asked(3), asked(5)], max_num_seqs=1)
    assert one.first_tokens == (10, 22)
    assert one.latencies == (12, 26)
    assert (one.steps, one.row_steps, one.wasted) == (6, 6, 0)


def test_a_row_that_ends_gives_its_slot_to_the_next() -> None:
    one = run([asked(3), asked(9), asked(2)], max_num_seqs=2)
    # 20 s of prompts, 2 steps to the first end, 10 s for the third prompt, then nobody waits: 6 steps in one call.
    assert one.latencies == (22, 38, 38)
    assert (one.steps, one.row_steps) == (8, 2 * 2 + 2 * 6)


def test_arrivals_count_from_when_they_come_and_an_idle_device_waits() -> None:
    one = run([asked(2, arrival=105.5), asked(2, arrival=5.0), asked(2, arrival=7.0)])
    assert one.latencies == (11, 11, 20)
    assert one.seconds == 116.5 - 5  # from the first arrival on


def test_memory_that_runs_out_is_prefilled_again() -> None:
    one = run([asked(9, limit=9), asked(9, limit=9)], num_pages=4, max_chunk_steps=4)
    assert one.preemptions == 1
    assert one.recomputed == one.prefilled - 8 > 0
    assert one.produced == one.answer_tokens == 18


def test_a_static_batch_computes_what_is_done_and_rows_in_powers_of_two() -> None:
    requests = [asked(2), asked(2), asked(31)]
    one = simulate(requests, SchedulerConfig(policy="static"), cache=CacheConfig(100, 4), cost=STEPS)
    assert (one.steps, one.row_steps) == (30, 4 * 30)  # in two calls, the second with one row left
    assert one.wasted == pytest.approx(1 - 32 / 120)


def test_a_call_costs_what_its_rows_pages_and_depth_say() -> None:
    call = DecodeCall(steps=2, row_pages=6, depth=1.5, row_depth=6.0, row_heads=20)
    assert COST.decode_seconds(call) == 0.5 + 2 * 1 + 1.5 * 2 + 6 * 0.25 + 6 * 3 * 0.125 + 20 * 0.0625
    assert COST.prefill_seconds(PrefillCall(2, 80)) == pytest.approx(6.8)
    assert PrefillCall.of([3, 17, 70], chunk=64) == PrefillCall(4, 16 + 32 + 64 + 16)
    # Contexts 4 and 7: pages of 4 tokens of the longest live row, at 7, 8 and, the first alone, 6 tokens.
    assert pages_visited([4, 7], [3, 2], page_size=4) == 2 + 2 + 2
    assert pages_visited([4, 9], [3, 1], page_size=4) == 3 + 2 + 2


def test_the_simulated_device_charges_for_pages_and_rows() -> None:
    [latency] = run([asked(6, prompt=7)], COST).latencies
    # One call of five steps at contexts 8 to 12: 2 pages at 8, 3 from 9 on.
    decode = 0.5 + 5 * (1 + 2 + 0.25 + 0.0625) + (2 + 3 + 3 + 3 + 3) * 0.125
    assert latency == pytest.approx(3.16 + decode)


def test_a_step_is_as_deep_as_its_deepest_row() -> None:
    depth = StepModel(
        call=0.0, step=0.0, blocks=4.0, row=0.0, page=0.0, head=100.0, prefill_call=0.0, prefill_token=0.0
    )
    early = asked(4, exit_layers=(4, 1, 2, 1))
    [alone] = run([early], depth, exits=(1, 2, 4)).latencies
    assert alone == (1 + 2 + 1) + 100 * (1 + 2 + 1)
    first, second = run([early, asked(3, exit_layers=(4, 2, 4))], depth, exits=(1, 2, 4)).latencies
    assert first == second == (2 + 4 + 1) + 100 * 2 * (2 + 3 + 1)
    [plain] = run([asked(4)], depth, exits=(1, 2, 4)).latencies
    assert plain == 12 + 100 * 3


def test_with_compaction_a_block_computes_the_rows_that_enter_it() -> None:
    rows = StepModel(call=0.0, step=0.0, blocks=0.0, row=4.0, page=0.0, head=0.0, prefill_call=0.0, prefill_token=0.0)
    requests = [asked(2, exit_layers=(4, layer)) for layer in (1, 1, 1, 2, 2, 2, 2, 4)]
    for compacts, computed in ((False, 4 * 8), (True, 1 * 8 + 1 * 5 + 2 * 1)):  # five of eight go on, then one
        one = simulate(
            requests,
            SchedulerConfig(),
            cache=CacheConfig(100, 4),
            cost=rows,
            exits=(1, 2, 4),
            learnt=StepCost(compacts=compacts),
        )
        assert max(one.latencies) == computed


def test_the_fit_finds_the_costs_that_made_the_calls() -> None:
    rng = random.Random(0)
    bare = []
    for steps in (1, 4, 16) * 20:
        depth, rows = steps * rng.choice((0.5, 0.75, 1)), 2 ** rng.randrange(6)
        pages, heads = steps * rng.randint(1, 9), steps * rng.randint(1, 3)
        bare.append(DecodeCall(steps, pages, depth, depth * rows, heads * rows))
    calls = [replace(one, seconds=COST.decode_seconds(one)) for one in bare]
    prefills = [PrefillCall(n, tokens, 3.0 * n + 0.01 * tokens) for n, tokens in ((1, 16), (2, 96), (1, 512))]
    found = StepModel.fit(calls, prefills)
    assert list(found.to_dict().values()) == pytest.approx(list(COST.to_dict().values()), rel=1e-6)
    assert found.errors(calls) == pytest.approx([0.0] * len(calls), abs=1e-9)
    twice = [replace(one, seconds=2 * one.seconds) for one in calls]
    assert found.errors(twice) == pytest.approx([-0.5] * len(calls))
    with pytest.raises(ConfigError, match=r"at least 6 decode and 2 prefill calls, got 5 and 3"):
        StepModel.fit(calls[:5], prefills)
    with pytest.raises(ConfigError, match=r"took 0.0 s"):
        StepModel.fit(bare, prefills)


def adversarial(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        length, limit = rng.randint(1, 40), 40
        guess = rng.choice((1, 5, length, 40, 1e30))
        yield SimulatedRequest(
            rng.randint(1, 30), length, limit, LengthEstimate.exactly(guess, limit), rng.random() * 900
        )


@pytest.mark.parametrize("name", ["fcfs", "static", "length", "paper"])
def test_it_is_deterministic_and_answers_everything(name: str) -> None:
    requests = list(adversarial(150))

    def once():
        paper = partial(PaperScheduler, paper={"ordered": True, "vbs": True, "fcr": True, "max_rows": 16})
        scheduler = paper if name == "paper" else None
        config = SchedulerConfig(max_num_seqs=8, policy="fcfs" if name == "paper" else name)
        return simulate(requests, config, cache=CacheConfig(60, 4), cost=COST, scheduler=scheduler)

    one = once()
    assert one == once()
    assert len(one.latencies) == 150 and min(one.latencies) > 0
    assert all(first <= last for first, last in zip(one.first_tokens, one.latencies, strict=True))
    assert one.answer_tokens == sum(request.length for request in requests)
    assert 0 <= one.wasted < 1 and 0 < one.page_seconds <= one.seconds * 60


class Forgets(Scheduler):
    def add(self, sequences):
        super().add(list(sequences)[:-1])


class Repeats(Scheduler):
    ended = ()

    def schedule(self, max_steps=None):
        for row in self.ended:
            row.finish_reason = None
            row.truncate(0)
        self.add(self.ended)
        self.ended = ()
        return super().schedule(max_steps)

    def update(self, batch, result, seconds=None):
        super().update(batch, result)
        self.ended = [row for row in batch.rows if row.finish_reason is not None]


def test_what_is_lost_answered_twice_or_leaked_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [asked(3), asked(5)]
    for kind, message in ((Forgets, r"request-1 has 0 of 5 tokens"), (Repeats, r"request-. was answered twice")):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=message):
            patch.setattr(simulator, "Scheduler", kind)
            run(requests)
    monkeypatch.setattr(PageAllocator, "free", lambda *_: None)
    with pytest.raises(PageError):
        run(requests)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (asked(0), r"an answer has 1\.\.50 tokens, got a length of 0"),
        (asked(51), r"an answer has 1\.\.50 tokens, got a length of 51"),
        (asked(3, exit_layers=(4, 4)), r"3 answer tokens have 2 exit layers"),
    ],
)
def test_impossible_requests_are_refused(request_: SimulatedRequest, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run([request_])


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), max_size=12), st.integers(13, 40))
def test_time_and_tokens_add_up(sizes, num_pages) -> None:
    one = run([asked(length, prompt=prompt, limit=30) for prompt, length in sizes], num_pages=num_pages)
    assert one.seconds == max(one.latencies, default=0)
    assert one.produced == one.answer_tokens == sum(length for _, length in sizes)
    assert one.row_steps >= one.answer_tokens - len(sizes)


def test_figures_and_ratios_by_hand() -> None:
    fast, slow = run([asked(3), asked(5)]), run([asked(3), asked(5)], max_num_seqs=1)
    rows = {"static": figures([slow]), "fcfs": figures([fast, fast, slow])}
    assert rows["static"]["requests_per_s"] == 2 / 26
    assert (rows["fcfs"]["requests_per_s"], rows["fcfs"]["tokens_per_s"]) == (2 / 24, 8 / 24)
    assert (rows["static"]["latency_mean_s"], rows["static"]["latency_p50_s"]) == (19, 19)
    assert rows["static"]["latency_p99_s"] == pytest.approx(12 + 0.99 * 14)
    assert rows["static"]["first_token_mean_s"] == 16
    assert rows["fcfs"]["rounds_s"] == [24, 24, 26]
    with_ratios(rows)
    assert rows["fcfs"]["requests_per_s_over_static"] == pytest.approx(26 / 24)
    assert rows["static"]["latency_mean_over_fcfs"] == pytest.approx(19 / 24)
    assert rows["fcfs"]["latency_mean_over_fcfs"] == 1
