"""The scheduler against a device that keeps no KV, but remembers what was written where, and objects to misreads."""

import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax.core import SamplingParams, SchedulerConfig
from eejax.core.errors import ConfigError
from eejax.core.request import MicroBatch, Request, RowResult, StepResult
from eejax.schedule.integrity import check_integrity
from eejax.schedule.page_allocator import OutOfPages, PageAllocator, pages_needed
from eejax.schedule.scheduler import Scheduler

STOP = 1
_ids = itertools.count()


def make_request(prompt_len, max_tokens, *, n=1):
    number = next(_ids)
    return Request(
        request_id=f"r{number}",
        prompt=None,
        prompt_token_ids=tuple(1000 * number + i + 10 for i in range(prompt_len)),
        params=SamplingParams(n=n, max_tokens=max_tokens),
        max_tokens=max_tokens,
        thresholds=(),
        stop_token_ids=frozenset({STOP}),
        seed=0,
    )


def make_scheduler(num_pages, *, page_size=4, **config):
    allocator = PageAllocator(num_pages)
    return Scheduler(SchedulerConfig(**config), allocator, page_size=page_size), allocator


@dataclass
class FakeDevice:
    """Runs micro-batches. KV of a position is the tuple of all tokens up to it; each answer is known beforehand."""

    page_size: int
    answers: dict = field(default_factory=dict)  # sequence -> its tokens
    memory: dict = field(default_factory=dict)  # (page, slot) -> tokens up to this position
    rng: random.Random | None = None  # makes chunks end early

    def answer(self, seq):
        if seq not in self.answers:
            self.answers[seq] = [100_000 + i for i in range(seq.request.max_tokens)]
        return self.answers[seq]

    def run(self, batch: MicroBatch) -> StepResult:
        if batch.kind == "prefill":
            assert batch.n_steps == 0
            return StepResult(tuple(self._prefill(seq) for seq in batch.rows))
        tokens = {seq: [] for seq in batch.rows}
        for _ in range(batch.n_steps):
            active = [seq for seq in batch.rows if not self._ended(seq, tokens[seq])]
            for seq in active:
                tokens[seq].append(self._decode(seq, tokens[seq]))
            freed = any(self._ended(seq, tokens[seq]) for seq in active)
            if (freed and batch.yield_on_free) or (self.rng and self.rng.random() < 0.1):
                break
        return StepResult(tuple(RowResult(tuple(t), (4,) * len(t)) for t in tokens.values()))

    def _ended(self, seq, new):
        done = seq.output_token_ids + new
        return len(done) >= seq.request.max_tokens or done[-1] == STOP

    def _slot(self, seq, position):
        return seq.pages[position // self.page_size], position % self.page_size

    def _read(self, seq, tokens):
        for position in range(len(tokens)):
            assert self.memory.get(self._slot(seq, position)) == tuple(tokens[: position + 1])

    def _prefill(self, seq):
        tokens, depths = seq.prefill_tokens(0, seq.prefill_length, 4)
        assert len(tokens) == len(depths) == seq.prefill_length
        assert 0 <= seq.num_cached < seq.prefill_length
        self._read(seq, tokens[: seq.num_cached])
        for position in range(seq.num_cached, seq.prefill_length):
            self.memory[self._slot(seq, position)] = tuple(tokens[: position + 1])
        first = () if seq.output_token_ids else (self.answer(seq)[0],)
        return RowResult(first, (4,) * len(first))

    def _decode(self, seq, new):
        tokens = [*seq.request.prompt_token_ids, *seq.output_token_ids, *new]
        assert seq.num_cached == seq.num_tokens - 1
        self.memory[self._slot(seq, len(tokens) - 1)] = tuple(tokens)
        self._read(seq, tokens)
        return self.answer(seq)[len(seq.output_token_ids) + len(new)]


def step(scheduler, device):
    batch = scheduler.schedule()
    if batch is not None:
        scheduler.update(batch, device.run(batch))
    return batch


def run_all(scheduler, device, limit=1000):
    batches = []
    while scheduler.has_work:
        batches.append(step(scheduler, device))
        assert len(batches) <= limit
    assert scheduler.schedule() is None
    return batches


def kinds(batches):
    return "".join(batch.kind[0] for batch in batches)


# ------------------------------------------------------------------------------------------------------- one at a time


def test_one_request_from_prompt_to_last_token():
    scheduler, allocator = make_scheduler(8, max_chunk_steps=4)
    (seq,) = (request := make_request(5, 10)).sequences
    assert not scheduler.has_work
    assert scheduler.schedule() is None
    scheduler.add(request.sequences)
    assert (scheduler.has_work, scheduler.num_waiting, scheduler.num_running) == (True, 1, 0)
    batch = scheduler.schedule()
    assert batch == MicroBatch("prefill", (seq,))
    assert (seq.num_cached, scheduler.num_waiting, scheduler.num_running) == (0, 0, 1)
    device = FakeDevice(page_size=4)
    scheduler.update(batch, device.run(batch))
    assert (seq.num_cached, len(seq.output_token_ids)) == (5, 1)
    batches = run_all(scheduler, device)
    assert [(b.kind, b.n_steps, b.yield_on_free) for b in batches] == [
        ("decode", 4, False),
        ("decode", 4, False),
        ("decode", 1, False),
    ]
    assert seq.output_token_ids == device.answer(seq)
    assert (seq.finish_reason, seq.pages, allocator.num_used) == ("length", [], 0)


def test_pages_needed_is_what_a_sequence_takes_at_its_longest():
    for prompt_len, max_tokens in [(1, 1), (4, 1), (5, 1), (3, 2), (4, 2), (7, 9)]:
        needed = pages_needed(prompt_len, max_tokens, 4)
        scheduler, allocator = make_scheduler(needed, max_chunk_steps=3)
        most = 0
        scheduler.add(make_request(prompt_len, max_tokens).sequences)
        device = FakeDevice(page_size=4)
        while scheduler.has_work:
            batch = scheduler.schedule()
            most = max(most, allocator.num_used)
            scheduler.update(batch, device.run(batch))
        assert most == needed == -(-(prompt_len + max_tokens - 1) // 4)


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(9, 1), (1, 20)])
def test_what_can_never_fit_raises_instead_of_waiting_forever(prompt_len, max_tokens):
    scheduler, _ = make_scheduler(2, max_chunk_steps=4)
    scheduler.add(make_request(prompt_len, max_tokens).sequences)
    with pytest.raises(OutOfPages, match=r"pages"):
        run_all(scheduler, FakeDevice(page_size=4))


def test_prefill_and_decode_take_turns():
    scheduler, _ = make_scheduler(64, max_num_seqs=8, max_prefill_tokens=10, max_chunk_steps=2)
    requests = [make_request(5, 6) for _ in range(6)]
    for request in requests:
        scheduler.add(request.sequences)
    device = FakeDevice(page_size=4)
    batches = run_all(scheduler, device)
    assert kinds(batches).startswith("pdpdpd")
    assert [len(b.rows) for b in batches[:6]] == [2, 2, 2, 4, 2, 6]


def test_prefill_follows_prefill_when_nothing_is_left_to_decode():
    scheduler, _ = make_scheduler(64, max_prefill_tokens=5)
    for _ in range(3):
        scheduler.add(make_request(5, 1).sequences)
    assert kinds(run_all(scheduler, FakeDevice(page_size=4))) == "ppp"


def test_a_prompt_longer_than_the_prefill_budget_is_taken_alone():
    scheduler, _ = make_scheduler(64, max_prefill_tokens=4)
    for prompt_len in (9, 2, 2):
        scheduler.add(make_request(prompt_len, 2).sequences)
    batches = run_all(scheduler, FakeDevice(page_size=4))
    assert [len(b.rows) for b in batches if b.kind == "prefill"] == [1, 2]


def test_slots_limit_admission_and_somebody_waits_for_one():
    scheduler, _ = make_scheduler(64, max_num_seqs=2, max_chunk_steps=8)
    requests = [make_request(3, m) for m in (3, 8, 4)]
    for request in requests:
        scheduler.add(request.sequences)
    device = FakeDevice(page_size=4)
    first, second = step(scheduler, device), step(scheduler, device)
    assert (len(first.rows), second.kind, second.n_steps, second.yield_on_free) == (2, "decode", 7, True)
    assert [r.finished for r in requests] == [True, False, False]
    assert len(requests[1].sequences[0].output_token_ids) == 3  # the chunk was cut short
    third, fourth = step(scheduler, device), step(scheduler, device)
    assert third.rows == tuple(requests[2].sequences)
    assert not fourth.yield_on_free


def test_no_yield_for_somebody_whom_no_freed_row_could_make_room():
    scheduler, _ = make_scheduler(8, max_chunk_steps=4)
    small = [make_request(3, 9) for _ in range(3)]
    for request in [*small, make_request(28, 4)]:
        scheduler.add(request.sequences)
    device = FakeDevice(page_size=4)
    step(scheduler, device)
    batch = step(scheduler, device)
    assert (batch.kind, len(batch.rows), scheduler.num_waiting, batch.yield_on_free) == ("decode", 3, 1, False)


def test_nobody_overtakes_the_head_of_the_queue():
    scheduler, _ = make_scheduler(8, max_chunk_steps=4)
    big, huge, tiny = make_request(20, 4), make_request(24, 4), make_request(1, 2)
    for request in (big, huge, tiny):
        scheduler.add(request.sequences)
    batches = run_all(scheduler, FakeDevice(page_size=4))
    admitted = [row.request for b in batches if b.kind == "prefill" for row in b.rows]
    assert admitted == [big, huge, tiny]


# ------------------------------------------------------------------------------------------------------ page pressure


def test_fewer_steps_before_anybody_is_preempted():
    scheduler, _ = make_scheduler(7, max_chunk_steps=8)
    old, young = make_request(2, 14), make_request(3, 14)
    scheduler.add([*old.sequences, *young.sequences])
    device = FakeDevice(page_size=4)
    batches = [step(scheduler, device) for _ in range(3)]
    # Five tokens are left to each in the end, which take a page each where one is free; with two, one page will do.
    assert [(len(b.rows), b.n_steps) for b in batches] == [(2, 0), (2, 8), (2, 2)]
    assert scheduler.num_preemptions == 0


def test_the_youngest_gives_way_and_comes_back_with_the_same_tokens():
    scheduler, allocator = make_scheduler(6, max_chunk_steps=4)
    seqs = [make_request(4, 21).sequences[0] for _ in range(2)]
    old, young = seqs
    (late,) = make_request(17, 3).sequences
    scheduler.add([*seqs, late])
    device = FakeDevice(page_size=4)
    while not scheduler.num_preemptions:
        batch = step(scheduler, device)
    assert batch.rows == (old,)
    assert (young.preemptions, young.pages, young.num_cached, young.finish_reason) == (1, [], 0, None)
    assert (old.preemptions, bool(old.pages)) == (0, True)
    batches = run_all(scheduler, device)
    resumed = [row for b in batches if b.kind == "prefill" for row in b.rows]
    assert resumed == [young, late]  # before those that came later
    assert [seq.output_token_ids for seq in seqs] == [device.answer(seq) for seq in seqs]
    assert young.exit_layers == [4] * 21
    assert scheduler.num_preemptions == young.preemptions
    check_integrity(allocator, [])


def test_several_preempted_sequences_return_in_order_of_arrival():
    scheduler, _ = make_scheduler(12, page_size=2, max_chunk_steps=1, max_num_seqs=4)
    requests = [make_request(2, 20) for _ in range(4)]
    for request in requests:
        scheduler.add(request.sequences)
    device = FakeDevice(page_size=2)
    while scheduler.num_preemptions < 3:
        step(scheduler, device)
        order = [seq.request for seq in [*scheduler._held, *scheduler._waiting]]
        assert order == [r for r in requests if not r.finished]
    run_all(scheduler, device)
    assert all(device.answer(r.sequences[0]) == r.sequences[0].output_token_ids for r in requests)


def test_two_sequences_do_not_evict_each_other_for_nothing():
    # Each needs the whole cache in the end: the younger must not be prefilled again and again meanwhile.
    scheduler, _ = make_scheduler(8, max_chunk_steps=4)
    requests = [make_request(4, 29) for _ in range(2)]
    for request in requests:
        scheduler.add(request.sequences)
    batches = run_all(scheduler, FakeDevice(page_size=4))
    assert scheduler.num_preemptions == 1
    assert kinds(batches).count("p") == 2


# ------------------------------------------------------------------------------------------------------ shared prompts


def test_siblings_share_the_full_pages_of_their_prompt():
    scheduler, allocator = make_scheduler(64, max_num_seqs=2, max_chunk_steps=4)
    request = make_request(11, 6, n=3)
    first, second, third = request.sequences
    scheduler.add(request.sequences)
    device = FakeDevice(page_size=4)
    batch = scheduler.schedule()
    assert batch.rows == (first, second)
    assert (first.num_cached, second.num_cached) == (0, 8)  # in one batch: the leader's row runs before
    assert first.pages[:2] == second.pages[:2]
    assert not set(first.pages[2:]) & set(second.pages[2:])
    scheduler.update(batch, device.run(batch))
    assert (first.num_cached, second.num_cached) == (11, 11)
    scheduler.finish(first, "abort")  # the leader goes, its prompt stays
    step(scheduler, device)
    scheduler.schedule()
    assert third.num_cached == 8
    assert third.pages[:2] == second.pages[:2]
    check_integrity(allocator, [second.pages, third.pages])


@pytest.mark.parametrize(("prompt_len", "shared"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_the_page_of_the_last_prompt_token_is_never_shared(prompt_len, shared):
    scheduler, allocator = make_scheduler(64)
    request = make_request(prompt_len, 3, n=2)
    scheduler.add(request.sequences)
    batch = scheduler.schedule()
    assert [seq.num_cached for seq in batch.rows] == [0, shared * 4]
    assert allocator.num_used == sum(len(seq.pages) for seq in batch.rows) - shared
    scheduler.update(batch, FakeDevice(page_size=4).run(batch))


def test_shared_tokens_do_not_count_as_prefill_nor_as_pages():
    scheduler, _ = make_scheduler(8, max_prefill_tokens=20, max_chunk_steps=1)
    request = make_request(17, 3, n=4)  # five pages alone; four of them are shared
    scheduler.add(request.sequences)
    assert len(scheduler.schedule().rows) == 4


def test_a_preempted_sibling_shares_again():
    scheduler, _ = make_scheduler(10, max_chunk_steps=4)
    request = make_request(9, 20, n=3)
    first, second, third = request.sequences
    device = FakeDevice(page_size=4, answers={second: [*range(50, 60), STOP]})
    scheduler.add(request.sequences)
    while not scheduler.num_preemptions:
        step(scheduler, device)
    while scheduler.num_waiting:
        batch = step(scheduler, device)
    assert (batch.kind, batch.rows) == ("prefill", (third,))
    assert third.pages[:2] == first.pages[:2]
    run_all(scheduler, device)
    assert all(seq.output_token_ids == device.answer(seq) for seq in request.sequences)


# ------------------------------------------------------------------------------------------------------ finish, misuse


def test_finish_in_every_state():
    scheduler, allocator = make_scheduler(64, max_num_seqs=2, max_chunk_steps=2)
    seqs = [make_request(3, m).sequences[0] for m in (3, 9, 9, 9)]
    scheduler.add(seqs)
    done, running, waiting, never = seqs
    device = FakeDevice(page_size=4)
    step(scheduler, device), step(scheduler, device)
    scheduler.finish(waiting, "abort")
    assert (waiting.finish_reason, scheduler.num_waiting) == ("abort", 1)
    scheduler.finish(running, "stop")
    assert (running.finish_reason, running.pages, len(running.output_token_ids)) == ("stop", [], 3)
    assert done.finish_reason == "length"
    assert allocator.num_used == 0
    for seq in (running, waiting, done):
        before, at = seq.finish_reason, seq.finish_time
        scheduler.finish(seq, "abort")
        assert (seq.finish_reason, seq.finish_time) == (before, at)
    scheduler.finish(done, "stop")  # the stop string was in the chunk that used up the budget
    assert done.finish_reason == "stop"
    scheduler.finish(waiting, "stop")
    assert waiting.finish_reason == "abort"
    run_all(scheduler, device)
    assert never.output_token_ids == device.answer(never)
    check_integrity(allocator, [])
    with pytest.raises(ValueError, match="does not wait"):
        scheduler.finish(make_request(1, 1).sequences[0], "abort")


@pytest.mark.parametrize("batches_before", [0, 1])
def test_a_row_aborted_on_the_device_ignores_its_result(batches_before):
    scheduler, allocator = make_scheduler(64)
    gone, stays = (make_request(6, 9).sequences[0] for _ in range(2))
    scheduler.add([gone, stays])
    device = FakeDevice(page_size=4)
    for _ in range(batches_before):
        step(scheduler, device)
    batch = scheduler.schedule()
    result = device.run(batch)
    tokens = list(gone.output_token_ids)
    scheduler.finish(gone, "abort")
    scheduler.update(batch, result)
    assert (gone.output_token_ids, gone.finish_reason) == (tokens, "abort")
    check_integrity(allocator, [stays.pages])
    run_all(scheduler, device)
    assert stays.output_token_ids == device.answer(stays)


def test_a_stop_token_ends_a_row_inside_its_chunk():
    scheduler, allocator = make_scheduler(64, max_chunk_steps=8)
    (seq,) = make_request(3, 9).sequences
    device = FakeDevice(page_size=4, answers={seq: [50, 51, STOP]})
    scheduler.add([seq])
    run_all(scheduler, device)
    assert (seq.output_token_ids, seq.finish_reason, allocator.num_used) == ([50, 51, STOP], "stop", 0)


def test_logprobs_go_with_their_tokens():
    scheduler, _ = make_scheduler(8)
    (seq,) = make_request(3, 2).sequences
    scheduler.add([seq])
    scheduler.update(scheduler.schedule(), StepResult((RowResult((7,), (4,), ({7: 0.5},)),)))
    scheduler.update(scheduler.schedule(), StepResult((RowResult((8,), (2,), ({8: 0.25},)),)))
    assert (seq.logprobs, seq.exit_layers) == ([{7: 0.5}, {8: 0.25}], [4, 2])


def test_results_that_cannot_be_are_refused():
    def scheduled(batches, **config):
        scheduler, _ = make_scheduler(8, **config)
        (seq,) = make_request(3, 9).sequences
        scheduler.add([seq])
        for _ in range(batches):
            step(scheduler, FakeDevice(page_size=4))
        return scheduler, scheduler.schedule(), seq

    def result(*tokens):
        return StepResult((RowResult(tokens, (4,) * len(tokens)),))

    scheduler, batch, _ = scheduled(0)
    with pytest.raises(RuntimeError, match=r"prefill row of request r\d+ returned 0 tokens, 1 to 1"):
        scheduler.update(batch, result())
    scheduler, batch, _ = scheduled(1, max_chunk_steps=2)
    with pytest.raises(RuntimeError, match=r"decode row of request r\d+ returned 3 tokens, 0 to 2"):
        scheduler.update(batch, result(5, 6, 7))
    scheduler, batch, _ = scheduled(1)
    with pytest.raises(ValueError, match="zip"):
        scheduler.update(batch, StepResult(()))
    with pytest.raises(ConfigError, match="page_size"):
        Scheduler(SchedulerConfig(), PageAllocator(1), page_size=0)


def test_a_batch_is_updated_once_and_before_the_next():
    scheduler, allocator = make_scheduler(8)
    (seq,) = make_request(3, 9).sequences
    scheduler.add([seq])
    device = FakeDevice(page_size=4)
    batch = scheduler.schedule()
    with pytest.raises(RuntimeError, match="has not been updated"):
        scheduler.schedule()
    result = device.run(batch)
    scheduler.update(batch, result)
    with pytest.raises(RuntimeError, match="once"):
        scheduler.update(batch, result)
    # A device call that failed leaves its batch behind; with its rows aborted the scheduler goes on.
    scheduler.schedule()
    scheduler.finish(seq, "abort")
    (other,) = make_request(3, 9).sequences
    scheduler.add([other])
    run_all(scheduler, device)
    assert other.output_token_ids == device.answer(other)
    check_integrity(allocator, [])


# ------------------------------------------------------------------------------------------------------- anything goes

request_shapes = st.tuples(
    st.integers(1, 14),  # prompt
    st.integers(1, 14),  # answer at the most
    st.sampled_from([1, 1, 1, 2, 3]),  # answers to the prompt
    st.integers(0, 12),  # micro-batches before it arrives, after the one before
)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(request_shapes, min_size=1, max_size=9),
    page_size=st.integers(1, 5),
    spare_pages=st.integers(0, 8),
    slots=st.integers(1, 5),
    chunk=st.integers(1, 7),
    max_prefill_tokens=st.integers(1, 30),
    abort_rate=st.sampled_from([0.0, 0.0, 0.1]),
    stop_rate=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_is_lost_doubled_leaked_overtaken_or_starved(
    shapes, page_size, spare_pages, slots, chunk, max_prefill_tokens, abort_rate, stop_rate, seed
):
    rng = random.Random(seed)
    requests = [make_request(prompt_len, max_tokens, n=n) for prompt_len, max_tokens, n, _ in shapes]
    num_pages = max(-(-(p + m - 1) // page_size) for p, m, _, _ in shapes) + spare_pages
    scheduler, allocator = make_scheduler(
        num_pages,
        page_size=page_size,
        max_num_seqs=slots,
        max_chunk_steps=chunk,
        max_prefill_tokens=max_prefill_tokens,
    )
    device = FakeDevice(page_size, rng=rng)
    seqs = [seq for request in requests for seq in request.sequences]
    for seq in seqs:
        length = rng.randint(1, seq.request.max_tokens)
        device.answers[seq] = [100_000 + i for i in range(length)]
        if length < seq.request.max_tokens:
            device.answers[seq][-1] = STOP
    arrivals = list(zip(requests, itertools.accumulate(gap for *_, gap in shapes), strict=True))
    added, admitted, finished_early, tokens_at_admission = [], [], set(), {}
    previous_kind, batches = None, 0

    def finish_any(reason, candidates):
        seq = rng.choice(candidates)
        if seq.finish_reason is None:
            finished_early.add(seq)
        scheduler.finish(seq, reason)

    # Each decode batch brings a token; prefill batches alternate with them, but for those after which nobody decodes.
    limit = 2 * sum(len(answer) for answer in device.answers.values()) + len(seqs)
    clock = 0
    while arrivals or scheduler.has_work:
        while arrivals and arrivals[0][1] <= clock:
            request, _ = arrivals.pop(0)
            scheduler.add(request.sequences)
            added += request.sequences
        clock += 1
        if added and rng.random() < abort_rate:
            finish_any("abort", added)
        running_before = scheduler.num_running
        preempted_before = {seq: seq.preemptions for seq in added}
        had_work = scheduler.has_work
        batch = scheduler.schedule()
        assert (batch is not None) == had_work
        check_integrity(allocator, [seq.pages for seq in seqs])
        for seq in added:
            if seq.preemptions > preempted_before[seq]:
                assert len(seq.output_token_ids) > tokens_at_admission[seq]  # being admitted was worth it
        if batch is None:
            previous_kind = None
            continue
        batches += 1
        assert batches <= limit
        assert 1 <= len(batch.rows) <= slots
        assert scheduler.num_running <= slots
        if batch.kind == "prefill":
            assert not (previous_kind == "prefill" and running_before)
            assert sum(seq.prefill_length - seq.num_cached for seq in batch.rows[:-1]) <= max_prefill_tokens
            for seq in batch.rows:
                tokens_at_admission[seq] = len(seq.output_token_ids)
                if seq not in admitted:
                    admitted.append(seq)
        else:
            assert 1 <= batch.n_steps <= chunk
            assert len(batch.rows) == scheduler.num_running
            assert not batch.yield_on_free or scheduler.num_waiting
        previous_kind = batch.kind
        result = device.run(batch)
        if rng.random() < abort_rate:
            finish_any("abort", added)
        scheduler.update(batch, result)
        if rng.random() < stop_rate:
            finish_any("stop", batch.rows)
        check_integrity(allocator, [seq.pages for seq in seqs])
        assert all(bool(seq.pages) <= (seq.finish_reason is None) for seq in seqs)
        unfinished = [seq for seq in added if seq.finish_reason is None]
        assert [*scheduler._held, *scheduler._waiting] == unfinished  # the order of arrival, always

    assert allocator.num_used == 0
    assert admitted == [seq for seq in seqs if seq in tokens_at_admission]
    assert scheduler.num_preemptions == sum(seq.preemptions for seq in seqs)
    for seq in seqs:
        answer = device.answers[seq]
        if seq in finished_early:
            assert seq.output_token_ids == answer[: len(seq.output_token_ids)]
        else:
            assert seq.output_token_ids == answer
            assert len(seq.exit_layers) == len(answer)
            assert seq.finish_reason in (("stop",) if answer[-1] == STOP else ("length", "stop"))


def test_tokens_behind_a_stop_id_that_the_device_did_not_know_are_dropped():
    scheduler, allocator = make_scheduler(8)
    (seq,) = make_request(3, 9).sequences
    scheduler.add([seq])
    step(scheduler, FakeDevice(page_size=4))
    batch = scheduler.schedule()
    scheduler.update(batch, StepResult((RowResult((STOP, 6), (4, 4)),)))
    assert (seq.output_token_ids[-1], seq.finish_reason, allocator.num_used) == (STOP, "stop", 0)
