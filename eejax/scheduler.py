"""Who is prefilled and who decodes next, and where their KV lies. No jax here.

Continuous batching at the level of iterations: sequences join and leave between any two device calls. Two things are
kept true between calls, and everything else follows from them:

* `running` followed by `waiting` is the order of arrival. Running sequences hold pages and a slot, waiting
  ones neither.
* A running sequence has all its tokens but the last in the cache; the last is the input of its next decode step.

Progress. The youngest running sequence gives way first, so the oldest gives way only to itself, that is never: alone it
fits, for the engine refuses what could not. So every decode batch brings the oldest sequence at least one token, a
prefill batch is followed by a decode batch unless nothing is left to decode, and tokens are finite: all work ends.
Moreover a sequence is admitted only when every running row, and itself, has pages for a whole chunk, and that chunk
comes next: nobody is prefilled and thrown out again without a token, so two sequences cannot take turns evicting each
other for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from eejax.config import SchedulerConfig, require_positive_int
from eejax.page_allocator import OutOfPages, PageAllocator
from eejax.request import FinishReason, MicroBatch, RowResult, Sequence, StepResult


class FirstComeFirstServed:
    """The policy: everything the scheduler decides by preference rather than by necessity."""

    def next_admission(self, waiting: deque[Sequence]) -> Sequence:
        """Who is admitted before all others; while it does not fit, nobody is."""
        return waiting[0]

    def decode_rows(self, running: list[Sequence]) -> list[Sequence]:
        """Who decodes in the next chunk; the others keep their pages."""
        return list(running)

    def victim(self, running: list[Sequence]) -> Sequence:
        """Who gives up its pages when they run out."""
        return running[-1]


class Scheduler:
    """Turns sequences into micro-batches, and takes in what the device made of them.

    Call `schedule`, run the batch, call `update` with its result, and so on. Not thread-safe. `finish` may be called at
    any time except while the runner is still reading the batch that `schedule` returned.

    Args:
        config: slots, steps of a chunk, tokens of a prefill batch.
        allocator: pages of the KV cache; no one else may allocate from it.
        page_size: tokens of one page.
    """

    def __init__(self, config: SchedulerConfig, allocator: PageAllocator, *, page_size: int) -> None:
        require_positive_int("Scheduler", page_size=page_size)
        self._config = config
        self._allocator = allocator
        self._page_size = page_size
        self._policy = FirstComeFirstServed()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._in_flight: MicroBatch | None = None
        self._prefilled_last = False
        self._num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot and pages."""
        return len(self._running)

    @property
    def num_preemptions(self) -> int:
        """How often a sequence lost its pages, since the beginning."""
        return self._num_preemptions

    def pages_needed(self, prompt_len: int, max_tokens: int) -> int:
        """Pages that a sequence of this size takes at its longest. The last answer token is never an input: no KV.

        What needs more pages than the cache has must not be added.
        """
        return self._pages_for(prompt_len + max_tokens - 1)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue fresh sequences behind all others."""
        self._waiting.extend(sequences)

    def schedule(self, max_steps: int | None = None) -> MicroBatch | None:
        """Decide the next micro-batch and give its rows their pages; None when there is no work.

        Args:
            max_steps: keep a decode chunk this short, for somebody who watches the tokens come.

        Prefill and decode take turns while there is work for both, so running rows wait for one prefill batch at most.

        Raises:
            RuntimeError: the last batch has unfinished rows and was not given to `update`.
            OutOfPages: a sequence does not fit in the whole cache, see `pages_needed`.
        """
        if self._in_flight is not None and any(row.finish_reason is None for row in self._in_flight.rows):
            raise RuntimeError("the last micro-batch has not been updated: its rows' KV is unknown")
        batch = None
        if self._waiting and not (self._running and self._prefilled_last):
            batch = self._prefill_batch()
        if batch is None and self._running:
            batch = self._decode_batch(min(max_steps or self._config.max_chunk_steps, self._config.max_chunk_steps))
        self._in_flight = batch
        self._prefilled_last = batch is not None and batch.kind == "prefill"
        return batch

    def update(self, batch: MicroBatch, result: StepResult) -> None:
        """Take in the result of the batch that `schedule` returned last; finished sequences lose slot and pages.

        Rows that were finished in between by `finish` ignore their results.

        Raises:
            RuntimeError: the batch is not the last one, or a row holds more or fewer tokens than it can.
        """
        if batch is not self._in_flight:
            raise RuntimeError("update must be given the micro-batch that schedule returned last, once")
        self._in_flight = None
        for seq, row in zip(batch.rows, result.rows, strict=True):
            if seq.finish_reason is not None:
                continue
            self._append(seq, row, batch)
            if seq.finish_reason is None:
                seq.num_cached = seq.num_tokens - 1
            else:
                self._release(seq)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence for a reason that its token ids do not tell: an abort, or a stop string in its text.

        Of a finished sequence only the reason can change, and only from `length` to `stop`: the stop string stood in
        the text when the budget ran out, and whether both came out of one chunk must not be seen.

        Raises:
            ValueError: the sequence was never added.
        """
        if seq.finish_reason is None:
            if seq.pages:
                self._release(seq)
            else:
                self._waiting.remove(seq)
            seq.finish(reason)
        elif seq.finish_reason == "length" and reason == "stop":
            seq.finish_reason = reason

    def _prefill_batch(self) -> MicroBatch | None:
        """Admit waiting sequences while slots, pages and the token budget allow."""
        config, chunk = self._config, self._config.max_chunk_steps
        # What the running rows need for their next chunk is not to be given away.
        free = self._allocator.num_free - sum(self._missing(row, chunk) for row in self._running)
        rows: list[Sequence] = []
        tokens = 0
        while self._waiting and len(self._running) < config.max_num_seqs:
            seq = self._policy.next_admission(self._waiting)
            shared = self._pages_to_share(seq)
            length = seq.prefill_length - len(shared) * self._page_size
            if rows and tokens + length > config.max_prefill_tokens:
                break
            need = self._missing(seq, chunk) - len(shared)
            if need > free and self._running:
                break
            own = self._allocator.allocate(need)  # with nobody running this raises if the sequence can never fit
            self._allocator.share(shared)
            free -= need
            seq.pages = shared + own
            seq.num_cached = len(shared) * self._page_size
            self._waiting.remove(seq)
            self._running.append(seq)
            rows.append(seq)
            tokens += length
        return MicroBatch("prefill", tuple(rows)) if rows else None

    def _pages_to_share(self, seq: Sequence) -> list[int]:
        """Pages of another answer to the same prompt that already hold, or will hold in time, this prompt's KV.

        Only pages filled by the prompt alone, and never the page of its last token, which must be run for its logits:
        so shared pages end at position `(P - 1) // page_size * page_size <= P - 1`, and each holder owns at least the
        page of position `P - 1`. They are read-only from the moment a sharer runs: a sharer's prefill starts behind
        them, decoding writes at `P` and later, and the leader wrote them in its own prefill. That prefill is over, or
        it stands earlier in the very same batch, whose rows the runner executes in order, one after another; the pages
        live on by the sharer's reference even if the leader is preempted or finishes.
        """
        leader = next((other for other in seq.request.sequences if other.pages), None)  # never `seq`: it waits
        if leader is None:
            return []
        return leader.pages[: (len(seq.request.prompt_token_ids) - 1) // self._page_size]

    def _decode_batch(self, longest: int) -> MicroBatch:
        """Give the rows pages for as long a chunk as fits; when not even one step does, the policy's victim goes."""
        rows = self._policy.decode_rows(self._running)
        while not (n_steps := self._steps_that_fit(rows, longest)):
            if len(self._running) == 1:
                raise OutOfPages(f"a sequence of {rows[0].num_tokens} tokens fills {self._allocator.num_pages} pages")
            self._preempt(self._policy.victim(self._running))
            rows = self._policy.decode_rows(self._running)
        for row in rows:
            row.pages += self._allocator.allocate(self._missing(row, n_steps))
        return MicroBatch("decode", tuple(rows), n_steps, yield_on_free=self._someone_could_follow(rows))

    def _steps_that_fit(self, rows: list[Sequence], longest: int) -> int:
        """The longest chunk that all rows have pages for, of `longest` and its halvings; 0 if there is none."""
        steps = min(longest, max(row.remaining for row in rows))
        while steps and sum(self._missing(row, steps) for row in rows) > self._allocator.num_free:
            steps //= 2
        return steps

    def _someone_could_follow(self, rows: list[Sequence]) -> bool:
        """Whether the next to be admitted might fit once one of these rows has left."""
        if not self._waiting:
            return False
        seq = self._policy.next_admission(self._waiting)
        need = self._missing(seq, self._config.max_chunk_steps) - len(self._pages_to_share(seq))
        return need <= self._allocator.num_free + max(len(row.pages) for row in rows)

    def _preempt(self, seq: Sequence) -> None:
        """Take a running sequence's slot and pages; it keeps its tokens and waits before those that came later."""
        self._release(seq)
        seq.preemptions += 1
        self._num_preemptions += 1
        self._waiting.appendleft(seq)

    def _release(self, seq: Sequence) -> None:
        self._running.remove(seq)
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
                break  # the device knows only some of a request's stop ids, and may have gone on behind another
            seq.append(token, exit_layer, logprob)

    def _missing(self, seq: Sequence, steps: int) -> int:
        """Pages that a sequence lacks to be prefilled and then decode `steps` tokens, or as many as it may."""
        prompt_len, max_tokens = len(seq.request.prompt_token_ids), seq.request.max_tokens
        tokens = min(seq.prefill_length + steps, prompt_len + max_tokens - 1)
        return max(0, self._pages_for(tokens) - len(seq.pages))

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)
