"""Which sequences are prefilled and decoded next, and on which pages. No jax here.

Scheduling at the level of iterations: sequences join and end between any two device calls. Two things are kept true
between calls, and everything else follows from them:

* Held sequences have pages, waiting ones have none.
* A held sequence has all its tokens but the last in the cache; the last is the input of its next decode step.

Which sequence comes first, may join, decodes or is preempted is decided by the policy (`eejax.schedule.policy`).

Progress. Every decode batch brings at least one row a token, a prefill batch is followed by a decode batch unless
nothing is left to decode (or, where the policy fills first, until no sequence may join any more), and tokens are
finite: all work ends. A sequence alone fits, for the engine refuses what could not. Moreover a sequence is admitted
only when all held rows, and itself, have pages for a whole chunk: none is prefilled and preempted again without a
chance of a token, so two sequences cannot take turns evicting each other for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from eejax.core import (
    Choice,
    FinishReason,
    MicroBatch,
    RowResult,
    SchedulerConfig,
    Sequence,
    StepResult,
    require_positive_int,
)
from eejax.schedule.length_predictor import LengthPredictor
from eejax.schedule.page_allocator import (
    OutOfPages,
    PageAllocator,
    greatest_need,
    missing_pages,
    pages_to_share,
)
from eejax.schedule.policy import FirstComeFirstServed, Policy
from eejax.schedule.step_cost import StepCost
from eejax.schedule.waiting_queue import WaitingQueue


def make_policy(config: SchedulerConfig, *, page_size: int, cost: StepCost) -> Policy:
    """The policy that a configuration names."""
    if config.policy == "length":
        from eejax.schedule.length_policy import LengthPolicy

        return LengthPolicy(config, page_size=page_size, cost=cost)
    if config.policy == "static":
        from eejax.schedule.static_policy import Static

        return Static(config.max_num_seqs, config.max_chunk_steps)
    return FirstComeFirstServed(config.max_num_seqs, config.max_chunk_steps)


class Scheduler:
    """Turns sequences into micro-batches, and takes in their results.

    Call `schedule`, run the batch, call `update` with its result, and so on. Not thread-safe. `finish` may be called at
    any time except while the runner is still reading the batch that `schedule` returned.

    Args:
        config: slots, steps of a chunk, tokens of a prefill batch, policy.
        allocator: pages of the KV cache; only the scheduler allocates from it.
        page_size: tokens of one page.
        policy: instead of the one that `config` names.
        predictor: estimates the lengths of answers; without one sequences keep the estimates that they come with.
        cost: what decode steps cost, for policies that need it; `update` teaches it.
        rebatching: as in `DecodeConfig`.

    Attributes:
        num_preemptions: how often a sequence lost its pages.
        num_parkings: how often a sequence was left out of a chunk after having been in one.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        allocator: PageAllocator,
        *,
        page_size: int,
        policy: Policy | None = None,
        predictor: LengthPredictor | None = None,
        cost: StepCost | None = None,
        rebatching: Choice = "never",
    ) -> None:
        require_positive_int("Scheduler", page_size=page_size)
        self.num_preemptions = 0
        self.num_parkings = 0
        self._config = config
        self._allocator = allocator
        self._page_size = page_size
        self._predictor = predictor
        self._cost = cost or StepCost()
        self._rebatching = rebatching
        self._policy = policy or make_policy(config, page_size=page_size, cost=self._cost)
        self._waiting = WaitingQueue(self._policy.window)
        self._held: list[Sequence] = []
        self._in_flight: MicroBatch | None = None
        self._decoded_last: frozenset[Sequence] = frozenset()  # by identity
        self._prefilled_last = False
        self._clock = 0  # decode steps and prefilled prompts so far
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._waiting or self._held)

    @property
    def num_waiting(self) -> int:
        """Sequences without pages, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages, parked ones included."""
        return len(self._held)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue fresh sequences."""
        for seq in sequences:
            seq.number, seq.arrival = self._arrivals, self._clock
            self._arrivals += 1
            if self._predictor is not None and seq.estimate is None:
                request = seq.request
                seq.take_estimate(self._predictor.predict(request.prompt_token_ids, request.max_tokens))
            self._waiting.add(seq, self._policy.rank(seq))

    def schedule(self, max_steps: int | None = None) -> MicroBatch | None:
        """Decide the next micro-batch and give its rows their pages; None when there is no work.

        Prefill and decode take turns while there is work for both, unless the policy fills first, so rows that decode
        wait for one prefill batch at most.

        Args:
            max_steps: keep a decode chunk this short, for a reader who watches the tokens come.

        Raises:
            RuntimeError: the last batch has unfinished rows and was not given to `update`.
            OutOfPages: a sequence does not fit in the whole cache, see `eejax.schedule.page_allocator.pages_needed`.
        """
        if self._in_flight is not None and any(row.finish_reason is None for row in self._in_flight.rows):
            raise RuntimeError("the last micro-batch has not been updated: its rows' KV is unknown")
        batch = None
        if self._waiting and not (self._held and self._prefilled_last and not self._policy.fills_first):
            batch = self._prefill_batch()
        if batch is None and self._held:
            batch = self._decode_batch(min(max_steps or self._config.max_chunk_steps, self._config.max_chunk_steps))
        self._in_flight = batch
        self._prefilled_last = batch is not None and batch.kind == "prefill"
        return batch

    def update(self, batch: MicroBatch, result: StepResult, seconds: float | None = None) -> None:
        """Take in the result of the batch that `schedule` returned last; finished sequences lose their pages.

        Rows that `finish` ended in between ignore their results.

        Args:
            seconds: that the device call took, for `StepCost` to learn from.

        Raises:
            RuntimeError: the batch is not the last one, or a row holds more or fewer tokens than it can.
        """
        if batch is not self._in_flight:
            raise RuntimeError("update must be given the micro-batch that schedule returned last, once")
        self._in_flight = None
        self._clock += len(batch.rows) if batch.kind == "prefill" else result.counts.steps
        for seq, row in zip(batch.rows, result.rows, strict=True):
            if seq.finish_reason is not None:
                continue
            self._append(seq, row, batch)
            if seq.finish_reason is not None:
                self._release(seq)
                self._policy.finished(seq)
                continue
            seq.num_cached = seq.num_tokens - 1
            if row.hidden is not None and self._predictor is not None and seq.estimate is not None:
                seq.take_estimate(self._predictor.refine(seq.estimate, row.hidden, seq.request.max_tokens))
        if seconds is not None and (steps := result.counts.steps):
            blocks = steps * batch.rows[0].exit_layers[0]  # of the network: prompts run at full depth
            pages = -(-max(seq.num_tokens for seq in batch.rows) // self._page_size)
            ran, computed = result.counts.blocks_run / blocks, result.counts.row_blocks / blocks
            self._cost.observe(ran, computed, pages, seconds / steps)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence for a reason that its token ids do not tell: an abort, or a stop string in its text.

        Of a finished sequence only the reason can change, and only from `length` to `stop`: the text held the stop
        string when the budget ran out, and whether both came out of one chunk must not be seen.

        Raises:
            ValueError: the sequence was never added.
        """
        if seq.finish_reason is None:
            if seq.pages:
                self._release(seq)
            else:
                self._waiting.remove(seq)
            seq.finish(reason)
            self._policy.finished(seq)
        elif seq.finish_reason == "length" and reason == "stop":
            seq.finish_reason = reason

    def _prefill_batch(self) -> MicroBatch | None:
        """Admit waiting sequences while the policy, pages and the token budget allow."""
        chunk = self._config.max_chunk_steps
        # What the held rows need for their next chunk is not to be given away.
        free = self._allocator.num_free - sum(self._missing(row, chunk) for row in self._held)
        rows: list[Sequence] = []
        tokens = 0
        while self._waiting:
            seq = self._waiting.first()
            if not self._policy.may_join(seq, self._held):
                break
            shared = pages_to_share(seq, self._page_size)
            length = seq.prefill_length - len(shared) * self._page_size
            if rows and tokens + length > self._config.max_prefill_tokens:
                break
            need = self._missing(seq, chunk) - len(shared)
            if self._held and (need > free or not self._will_fit([*self._held, seq], len(shared))):
                break
            own = self._allocator.allocate(need)  # with none held this raises if the sequence can never fit
            self._allocator.share(shared)
            free -= need
            seq.pages = shared + own
            seq.num_cached = len(shared) * self._page_size
            self._waiting.remove(seq)
            self._held.append(seq)
            rows.append(seq)
            tokens += length
        return MicroBatch("prefill", tuple(rows)) if rows else None

    def _will_fit(self, rows: list[Sequence], shared: int) -> bool:
        """Whether the cache holds these rows at every time to come, if each ends when the policy expects it to.

        `shared` pages of the last row are allocated already.
        """
        steps = [min(self._policy.steps_to_reserve(row), row.remaining) for row in rows]
        in_common = sum(len(row.pages) for row in rows) - self._allocator.num_used + shared
        return greatest_need(rows, steps, self._page_size) - in_common <= self._allocator.num_pages

    def _decode_batch(self, longest: int) -> MicroBatch:
        """Give the rows pages for as long a chunk as fits; if not one step fits, the policy's victim is preempted."""
        chosen = self._policy.select(self._held, longest)
        while not (n_steps := self._steps_that_fit(chosen.rows, chosen.n_steps)):
            if len(self._held) == 1:
                seq = self._held[0]
                raise OutOfPages(f"a sequence of {seq.num_tokens} tokens fills {self._allocator.num_pages} pages")
            self._preempt(self._policy.victim(self._held))
            chosen = self._policy.select(self._held, longest)
        for row in chosen.rows:
            row.pages += self._allocator.allocate(self._missing(row, n_steps))
        decoding = frozenset(chosen.rows)
        for seq in self._held:
            if seq in self._decoded_last and seq not in decoding:
                seq.parkings += 1
                self.num_parkings += 1
        self._decoded_last = decoding
        yields = len(chosen.rows) < len(self._held) or self._next_could_join(chosen.rows)
        return MicroBatch(
            "decode", tuple(chosen.rows), n_steps, yields, self._policy.width, hold=self._hold(chosen.rows)
        )

    def _hold(self, rows: list[Sequence]) -> int:
        """Rows to gather at an exit: by default only while slots are full and others wait, so throughput counts."""
        if self._rebatching == "always":
            return max(2, len(rows) // 4)
        if self._rebatching == "never" or len(rows) < self._config.max_num_seqs or not self._waiting:
            return 1
        from eejax.schedule.rebatching import rows_to_gather

        return rows_to_gather(rows, self._cost, self._page_size)

    def _steps_that_fit(self, rows: list[Sequence], longest: int) -> int:
        """The longest chunk that all rows have pages for, of `longest` and its halvings; 0 if there is none."""
        steps = min(longest, max(row.remaining for row in rows))
        while steps and sum(self._missing(row, steps) for row in rows) > self._allocator.num_free:
            steps //= 2
        return steps

    def _next_could_join(self, rows: list[Sequence]) -> bool:
        """Whether the first of the waiting sequences might join once one of these rows has ended."""
        if not self._waiting:
            return False
        seq = self._waiting.first()
        # If it lacks a slot, then any row's will do, and the first row is the hardest to outrank.
        if not self._policy.may_join(seq, [other for other in self._held if other is not rows[0]]):
            return False
        need = self._missing(seq, self._config.max_chunk_steps) - len(pages_to_share(seq, self._page_size))
        return need <= self._allocator.num_free + max(len(row.pages) for row in rows)

    def _preempt(self, seq: Sequence) -> None:
        """Take a held sequence's pages; it keeps its tokens and waits where its rank puts it."""
        self._release(seq)
        self._decoded_last -= {seq}
        seq.preemptions += 1
        self.num_preemptions += 1
        self._waiting.add(seq, self._policy.rank(seq))

    def _release(self, seq: Sequence) -> None:
        self._held.remove(seq)
        self._allocator.free(seq.pages)
        seq.pages = []
        seq.num_cached = 0

    def _append(self, seq: Sequence, row: RowResult, batch: MicroBatch) -> None:
        if batch.kind == "decode":
            allowed = range(batch.n_steps + 1)
        else:  # the prefill of a resumed sequence repeats what is known
            allowed = range(0, 1) if seq.output_token_ids else range(1, 2)
        if len(row.token_ids) not in allowed:
            raise RuntimeError(
                f"a {batch.kind} row of request {seq.request.request_id} returned {len(row.token_ids)} tokens, "
                f"{allowed.start} to {allowed.stop - 1} are possible"
            )
        logprobs = row.logprobs or (None,) * len(row.token_ids)
        for token, exit_layer, logprob in zip(row.token_ids, row.exit_layers, logprobs, strict=True):
            if seq.finish_reason is not None:
                break  # the device knows only some of a request's stop ids, and may have gone on after another
            seq.append(token, exit_layer, logprob)

    def _missing(self, seq: Sequence, steps: int) -> int:
        return missing_pages(seq, steps, self._page_size)
