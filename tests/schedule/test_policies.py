"""Every policy on one scheduler: nothing lost, doubled, leaked or starved, the same tokens, whatever is predicted."""

import dataclasses
import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.paper import PaperScheduler
from eejax.core import SchedulerConfig
from eejax.core.lengths import LengthEstimate
from eejax.core.request import Counts, MicroBatch, RowResult, StepResult
from eejax.schedule.integrity import check_integrity
from eejax.schedule.length_policy import LengthPolicy
from eejax.schedule.page_allocator import PageAllocator
from eejax.schedule.policy import FirstComeFirstServed
from eejax.schedule.scheduler import Scheduler
from eejax.schedule.static_policy import Static
from eejax.schedule.step_cost import StepCost
from tests.schedule.test_scheduler import STOP, FakeDevice, make_request, run_all, step

DEPTH = 4


def make_policy(name, config, *, page_size):
    if name.startswith("length"):
        cost = StepCost(1.0, 0.2, 0.1) if name == "length, rows apart" else StepCost()
        return LengthPolicy(config, page_size=page_size, cost=cost)
    return {"fcfs": FirstComeFirstServed, "static": Static}[name](config.max_num_seqs, config.max_chunk_steps)


POLICIES = ("fcfs", "static", "length", "length, rows apart", "paper", "paper, whole")


def make_scheduler(name, num_pages, *, page_size=4, **options):
    config, allocator = SchedulerConfig(**options), PageAllocator(num_pages)
    if name.startswith("paper"):
        whole = name == "paper, whole"
        paper = {"group": 4, "ordered": True, "quantile": 0.5, "vbs": whole, "fcr": whole}
        return PaperScheduler(config, allocator, page_size=page_size, paper=paper), allocator
    policy = make_policy(name, config, page_size=page_size)
    return Scheduler(config, allocator, page_size=page_size, policy=policy), allocator


def make_seqs(prompt_len, max_tokens, *, n=1, predicted=None, priority=0, leaves_early=False):
    """The answers to one request; `predicted` is a length that the estimate is sure of, or its quantiles."""
    request = make_request(prompt_len, max_tokens, n=n)
    request = dataclasses.replace(request, priority=priority, thresholds=(0.5 if leaves_early else math.inf,))
    if predicted is not None:
        quantiles = predicted if isinstance(predicted, tuple) else (predicted,) * 5
        for seq in request.sequences:
            seq.estimate = LengthEstimate.of(quantiles, max_tokens)
    return request.sequences


def make_seq(prompt_len=4, max_tokens=16, **options):
    return make_seqs(prompt_len, max_tokens, **options)[0]


@dataclass
class Device(FakeDevice):
    """`FakeDevice` that counts its steps; requests that may leave early do so now and then."""

    def run(self, batch: MicroBatch) -> StepResult:
        result = super().run(batch)
        steps = max(len(row.token_ids) for row in result.rows) if batch.kind == "decode" else 0
        rows = tuple(
            dataclasses.replace(row, exit_layers=tuple(self._layers(seq, len(row.token_ids))))
            for seq, row in zip(batch.rows, result.rows, strict=True)
        )
        return StepResult(rows, Counts(steps))

    def _layers(self, seq, count):
        done = len(seq.output_token_ids)
        early = [seq.request.may_exit and i > 0 and i % 3 != 0 for i in range(done, done + count)]
        return [DEPTH // 2 if leaves else DEPTH for leaves in early]


def admitted(batches):
    return [row for batch in batches if batch.kind == "prefill" for row in batch.rows]


# ------------------------------------------------------------------------------------------------------- anything goes

lengths = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.floats(-5, 20), st.sampled_from([1e30, -1e30, 0])
)


@dataclass(frozen=True)
class Job:
    """A request as drawn: what is known of it, what is not, and when somebody gives it up."""

    prompt_len: int
    max_tokens: int
    length: int  # of the answer, at most `max_tokens`
    predicted: tuple[float, ...] | float | None
    answers: int
    gap: int  # micro-batches after the arrival of the one before
    priority: int
    leaves_early: bool
    abort_after: int | None  # micro-batches after its arrival


@st.composite
def jobs(draw):
    max_tokens = draw(st.integers(1, 14))
    length = draw(st.integers(1, max_tokens))
    predicted = draw(st.one_of(st.none(), st.just(float(length)), st.just(7.0), lengths, st.tuples(*[lengths] * 5)))
    return Job(
        draw(st.integers(1, 14)),
        max_tokens,
        length,
        predicted,
        draw(st.sampled_from([1, 1, 1, 2, 3])),
        draw(st.integers(0, 8)),
        draw(st.sampled_from([0, 0, 0, 1, -1])),
        draw(st.booleans()),
        draw(st.one_of(st.none(), st.none(), st.integers(0, 20))),
    )


def serve(name, drawn, *, page_size, num_pages, slots, chunk, window, max_wait, quantile, seed):
    """Run all jobs under one policy, asserting on the way; the tokens of every answer."""
    scheduler, allocator = make_scheduler(
        name,
        num_pages,
        page_size=page_size,
        max_num_seqs=slots,
        max_chunk_steps=chunk,
        max_prefill_tokens=20,
        window=window,
        max_wait=max_wait,
        quantile=quantile,
    )
    device = Device(page_size, rng=random.Random(seed))
    seqs, aborts, coming, due = [], {}, [], 0
    for job in drawn:
        due += job.gap
        answers = make_seqs(
            job.prompt_len,
            job.max_tokens,
            n=job.answers,
            predicted=job.predicted,
            priority=job.priority,
            leaves_early=job.leaves_early,
        )
        coming.append((due, answers))
        seqs += answers
        for seq in answers:
            device.answers[seq] = [100_000 + i for i in range(job.length)]
            if job.length < job.max_tokens:
                device.answers[seq][-1] = STOP
            if job.abort_after is not None:
                aborts.setdefault(due + job.abort_after, []).append(seq)
    # A decode batch brings a token, which the paper's method may discard once; prefill batches stand between them.
    limit = due + 21 + 4 * sum(map(len, device.answers.values())) + 4 * len(seqs)
    finished_at, given_up = {}, set()
    for now in range(limit):
        while coming and coming[0][0] <= now:
            scheduler.add(coming.pop(0)[1])
        for seq in aborts.pop(now, ()):
            given_up |= {seq} if seq.finish_reason is None else set()
            scheduler.finish(seq, "abort")
        if not scheduler.has_work:
            assert scheduler.schedule() is None
            if not coming:
                break
            continue
        batch = scheduler.schedule()
        assert batch is not None
        assert all(seq.finish_reason is None for seq in batch.rows)  # nobody is answered twice
        assert 1 <= len(batch.rows) == len(set(batch.rows))
        if batch.kind == "decode":
            assert len(batch.rows) <= slots
            assert 1 <= batch.n_steps <= chunk
        check_integrity(allocator, [seq.pages for seq in seqs])
        scheduler.update(batch, device.run(batch))
        check_integrity(allocator, [seq.pages for seq in seqs])
        finished_at.update((seq, now) for seq in batch.rows if seq.finish_reason is not None)
    else:
        pytest.fail(f"{name} has not finished after {limit} micro-batches")
    assert allocator.num_used == 0
    assert scheduler.num_preemptions == sum(seq.preemptions for seq in seqs)
    assert scheduler.num_parkings == sum(seq.parkings for seq in seqs)
    assert set(finished_at) | given_up == set(seqs)
    for seq in seqs:
        answer = device.answers[seq]
        assert seq.output_token_ids == (answer[: len(seq.output_token_ids)] if seq in given_up else answer)
        assert len(seq.exit_layers) == len(seq.output_token_ids)
    return [None if seq in given_up else seq.output_token_ids for seq in seqs]


@settings(max_examples=60, deadline=None)
@given(
    drawn=st.lists(jobs(), min_size=1, max_size=8),
    page_size=st.integers(1, 5),
    spare_pages=st.integers(0, 8),
    slots=st.integers(1, 5),
    chunk=st.integers(1, 7),
    window=st.integers(1, 6),
    max_wait=st.sampled_from([0, 0.5, 3, 1e6]),
    quantile=st.sampled_from([0.01, 0.5, 0.75, 0.99]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_policy_gives_every_request_the_same_tokens_once(drawn, page_size, spare_pages, seed, **options):
    num_pages = max(-(-(job.prompt_len + job.max_tokens - 1) // page_size) for job in drawn) + spare_pages
    tokens = [serve(name, drawn, page_size=page_size, num_pages=num_pages, seed=seed, **options) for name in POLICIES]
    for answers in zip(*tokens, strict=True):
        assert len({tuple(answer) for answer in answers if answer is not None}) <= 1


# ----------------------------------------------------------------------------------------------------- ten thousand

BUDGET = 48
MAX_WAIT = 3.0


@dataclass
class Counting:
    """A device that counts tokens and nothing else; `lengths` are those of the answers."""

    lengths: dict = field(default_factory=dict)

    def run(self, batch: MicroBatch) -> StepResult:
        if batch.kind == "prefill":
            return StepResult(tuple(self._tokens(seq, 0 if seq.output_token_ids else 1) for seq in batch.rows))
        left = [self.lengths[seq] - len(seq.output_token_ids) for seq in batch.rows]
        steps = min(batch.n_steps, min(left) if batch.yield_on_free else max(left))
        rows = [self._tokens(seq, min(steps, more)) for seq, more in zip(batch.rows, left, strict=True)]
        return StepResult(tuple(rows), Counts(steps))

    def _tokens(self, seq, count):
        tokens = self.answer(seq)[len(seq.output_token_ids) :][:count]
        return RowResult(tokens, (DEPTH,) * len(tokens))

    def answer(self, seq):
        tokens = tuple(1000 * seq.number + i + 10 for i in range(self.lengths[seq]))
        return tokens if len(tokens) == BUDGET else (*tokens[:-1], STOP)


def adversary(rng):
    """True length and what is predicted of it, a thousand of a kind; the last kind is all of them by turns."""
    short, long = lambda: rng.randint(1, 4), lambda: rng.randint(BUDGET // 2, BUDGET)
    kinds = [
        lambda i: (short(), 1e9),  # short, said to be long: those that a scheduler would put off for good
        lambda i: (long(), 1.0),
        lambda i: (short(), math.nan),
        lambda i: (long(), -math.inf) if i % 8 == 0 else (short(), -7.0),
        lambda i: (short(), math.inf),
        lambda i: (rng.randint(1, BUDGET), 1e30),
        lambda i: (rng.randint(1, BUDGET) if i % 4 == 0 else 2, 9.0),
        lambda i: (long(), 2.0) if i % 6 == 0 else (short(), 40.0),
        lambda i: (2, 2.0) if i % 50 else (BUDGET, float(BUDGET)),  # a few long ones, known as such
    ]
    for i in range(9000):
        yield kinds[i // 1000](i)
    for i in range(1000):
        yield kinds[i % 9](i)


@pytest.mark.parametrize("name", ["fcfs", "static", "length", "length, rows apart", "paper, whole"])
def test_ten_thousand_requests_of_adversarial_lengths_and_predictions(name):
    """And, with `length`, nobody waits longer than `eejax.schedule.length_policy` says.

    Its bound: a sequence that arrived at `a` is put behind none that arrived after `a + max_wait * max_tokens`. So no
    such one is admitted while it waits, kept at its expense when pages run out, or decoded without one that is not; and
    the decode steps from its arrival to its end are at most the tokens of all who had come by then.
    """
    rng = random.Random(name)
    page_size, num_pages, slots, chunk = 8, 60, 8, 8
    scheduler, allocator = make_scheduler(
        name,
        num_pages,
        page_size=page_size,
        max_num_seqs=slots,
        max_chunk_steps=chunk,
        max_prefill_tokens=64,
        window=256,
        max_wait=MAX_WAIT,
    )
    device = Counting()
    coming = []
    for length, predicted in adversary(rng):
        seq = make_seq(rng.randint(1, 12), BUDGET, predicted=predicted)
        device.lengths[seq] = length
        coming.append(seq)
    coming.reverse()
    bounded = name.startswith("length")
    latest = BUDGET * MAX_WAIT
    unfinished, finished = {}, []  # in order of arrival; in order of their ends
    steps, produced, at_arrival, at_end = 0, 0, {}, {}
    while coming or scheduler.has_work:
        # At first twice what the slots can take, then less: the queue grows to hundreds and is worked off.
        n = rng.choice([0, 1, 2, 5, 10] if len(coming) % 2500 > 1200 else [0, 0, 0, 1])
        arrivals = [coming.pop() for _ in range(min(n, len(coming)))]
        scheduler.add(arrivals)
        unfinished.update(dict.fromkeys(arrivals))
        at_arrival.update((seq, (steps, produced)) for seq in arrivals)
        held_before = [seq for seq in unfinished if seq.pages] if bounded else []
        preempted_before = scheduler.num_preemptions
        batch = scheduler.schedule()
        assert (batch is not None) == scheduler.has_work
        if batch is None:
            continue
        if bounded:
            if batch.kind == "prefill":
                oldest = next((seq for seq in unfinished if not seq.pages), None)
                assert oldest is None or max(row.arrival for row in batch.rows) <= oldest.arrival + latest
            else:
                oldest = next(seq for seq in unfinished if seq.pages)
                assert min(row.arrival for row in batch.rows) <= oldest.arrival + latest
            if scheduler.num_preemptions > preempted_before:
                gone = min(seq.arrival for seq in held_before if not seq.pages)
                assert max(seq.arrival for seq in held_before if seq.pages) <= gone + latest
        before = sum(len(row.output_token_ids) for row in batch.rows)
        result = device.run(batch)
        scheduler.update(batch, result)
        steps += result.counts.steps
        produced += sum(len(row.output_token_ids) for row in batch.rows) - before
        ended = [row for row in batch.rows if row.finish_reason is not None]
        finished += ended
        for row in ended:
            del unfinished[row]  # raises if it had ended before
            at_end[row] = steps
        if len(finished) % 50 == 0:
            check_integrity(allocator, [seq.pages for seq in unfinished])
    assert len(finished) == len(set(finished)) == 10_000
    assert all(tuple(seq.output_token_ids) == device.answer(seq) for seq in finished)
    assert allocator.num_used == 0
    check_integrity(allocator, [])
    assert scheduler.num_preemptions == sum(seq.preemptions for seq in finished)
    if bounded:
        assert scheduler.num_preemptions > 0
        assert_nobody_starved(finished, device.lengths, at_arrival, at_end, latest)


def assert_nobody_starved(seqs, lengths, at_arrival, at_end, latest):
    order = sorted(seqs, key=lambda seq: seq.number)
    tokens, upto = 0, 0
    for seq in order:
        while upto < len(order) and order[upto].arrival <= seq.arrival + latest:
            tokens += lengths[order[upto]]
            upto += 1
        steps, produced = at_arrival[seq]
        assert at_end[seq] - steps <= tokens - produced


# ------------------------------------------------------------------------------------------ static, fcfs, priorities


def test_static_admits_nobody_into_a_batch_that_decodes_and_keeps_its_width():
    scheduler, allocator = make_scheduler("static", 64, max_num_seqs=3, max_chunk_steps=4, max_prefill_tokens=4)
    first = [make_seq(max_tokens=m) for m in (3, 9, 14)]
    late = [make_seq(max_tokens=5) for _ in range(2)]
    device = Device(page_size=4)
    scheduler.add(first)
    assert [step(scheduler, device).kind for _ in range(3)] == ["prefill"] * 3  # it fills before it decodes
    scheduler.add(late)
    widths = []
    while any(seq.finish_reason is None for seq in first):
        batch = step(scheduler, device)
        assert batch.kind == "decode"
        assert set(batch.rows) <= set(first)
        widths.append((len(batch.rows), batch.width))
    assert widths[0] == (3, 3)
    assert widths[-1] == (1, 3)
    assert {width for _, width in widths} == {3}
    batches = run_all(scheduler, device)
    assert admitted(batches) == late
    assert {batch.width for batch in batches if batch.kind == "decode"} == {2}
    assert allocator.num_used == 0


def test_static_begins_a_new_batch_when_the_whole_batch_was_aborted():
    scheduler, _ = make_scheduler("static", 64, max_num_seqs=2, max_chunk_steps=2)
    gone = [make_seq(), make_seq()]
    scheduler.add(gone)
    device = Device(page_size=4)
    for _ in range(2):
        step(scheduler, device)
    for seq in gone:
        scheduler.finish(seq, "abort")
    scheduler.add([stays := make_seq()])
    batches = run_all(scheduler, device)
    assert stays.output_token_ids == device.answer(stays)
    assert {batch.width for batch in batches if batch.kind == "decode"} == {1}


def test_static_reserves_the_whole_budget_and_fcfs_one_chunk():
    # 12 pages of 4 tokens: four prompts with a chunk each, or two with all that they may answer.
    for name, together, preempted in (("static", 2, False), ("fcfs", 4, True)):
        scheduler, _ = make_scheduler(name, 12, max_num_seqs=8, max_chunk_steps=4)
        seqs = [make_seq(4, 21) for _ in range(4)]
        scheduler.add(seqs)
        batches = run_all(scheduler, Device(page_size=4))
        assert len(batches[0].rows) == together
        assert (scheduler.num_preemptions > 0) == preempted


@pytest.mark.parametrize("name", ["fcfs", "static", "length"])
def test_lower_priority_numbers_are_admitted_first(name):
    scheduler, _ = make_scheduler(name, 64, max_num_seqs=1)
    last, middle, first = (make_seq(predicted=p, priority=n) for p, n in ((1.0, 2), (4.0, 0), (9.0, -3)))
    scheduler.add([last, middle, first])
    assert admitted(run_all(scheduler, Device(page_size=4))) == [first, middle, last]


@pytest.mark.parametrize("name", ["fcfs", "length"])
def test_the_lowest_priority_gives_way_when_pages_run_out(name):
    scheduler, _ = make_scheduler(name, 8, max_num_seqs=4, max_chunk_steps=4)
    behind, before = make_seq(4, 24, predicted=2.0, priority=1), make_seq(4, 24, predicted=2.0)
    scheduler.add([behind])
    device = Device(page_size=4)
    step(scheduler, device)
    scheduler.add([before])  # younger, but ahead
    run_all(scheduler, device)
    assert (behind.preemptions > 0, before.preemptions) == (True, 0)


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_gives_way_while_there_is_memory(name):
    scheduler, _ = make_scheduler(name, 200, max_num_seqs=3, max_chunk_steps=4)
    seqs = [make_seq(3, 20, predicted=20.0) for _ in range(9)]
    scheduler.add(seqs)
    run_all(scheduler, Device(page_size=4))
    assert scheduler.num_preemptions == 0
