"""Scheduling policies: what the scheduler decides by preference rather than by necessity. No jax here.

`FirstComeFirstServed` and `Static` stand here, the one that knows lengths in `eejax.schedule.length_policy`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from eejax.core import Sequence


@dataclass(frozen=True, slots=True)
class Selection:
    """Who decodes next.

    Attributes:
        rows: some of the sequences that hold pages; the others are parked: they keep their pages and wait.
        n_steps: decode steps at the most; the scheduler shortens what pages do not allow.
        width: rows that the device computes at least, whoever is left of them (0: as many as there are).
    """

    rows: list[Sequence]
    n_steps: int
    width: int = 0


class Policy(Protocol):
    """Preferences of a scheduler.

    `held` are the sequences that hold pages, in order of admission, prefilled and ready to decode; it is never empty.
    Pages are the scheduler's affair, and so is progress: whatever a policy prefers, every decode batch brings somebody
    a token.

    Attributes:
        window: waiting requests, in order of arrival, among which `rank` decides.
        fills_first: prefill as long as somebody may join before decoding goes on; otherwise they take turns.
    """

    window: int
    fills_first: bool

    def rank(self, seq: Sequence) -> tuple[float, ...]:
        """Place in the waiting queue, the lowest first. Asked when a sequence begins to wait, fresh or preempted."""
        ...

    def may_join(self, seq: Sequence, held: Seq[Sequence]) -> bool:
        """Whether the first of the waiting may be admitted now, pages permitting."""
        ...

    def steps_to_reserve(self, seq: Sequence) -> int:
        """Decode steps from now on after which `seq` is expected to have ended, and given its pages back.

        Nobody is admitted whom the cache could not hold beside those that are there already, each up to its end. For
        the next chunk, all of them have pages in any case.
        """
        ...

    def drop(self, held: Seq[Sequence]) -> list[Sequence]:
        """Sequences that give up their pages now although memory does not demand it."""
        ...

    def select(self, held: Seq[Sequence], longest: int) -> Selection:
        """Rows of the next chunk, at least one, and its length, from 1 to `longest` steps."""
        ...

    def victim(self, held: Seq[Sequence]) -> Sequence:
        """Who gives up its pages when they run out; there are at least two."""
        ...

    def finished(self, seq: Sequence) -> None:
        """A sequence has ended, for whatever reason."""
        ...


class FirstComeFirstServed:
    """Continuous batching in order of arrival: every row decodes, the youngest gives way (Orca, vLLM)."""

    window = 1
    fills_first = False

    def __init__(self, max_num_seqs: int, max_chunk_steps: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._chunk = max_chunk_steps

    def rank(self, seq: Sequence) -> tuple[float, ...]:
        """Order of arrival."""
        return (seq.number,)

    def may_join(self, seq: Sequence, held: Seq[Sequence]) -> bool:
        """Whether a slot is free."""
        return len(held) < self._max_num_seqs

    def steps_to_reserve(self, seq: Sequence) -> int:
        """The next chunk: nothing is known of what follows."""
        return self._chunk

    def drop(self, held: Seq[Sequence]) -> list[Sequence]:
        """Nobody."""
        return []

    def select(self, held: Seq[Sequence], longest: int) -> Selection:
        """All of them."""
        return Selection(list(held), longest)

    def victim(self, held: Seq[Sequence]) -> Sequence:
        """The youngest, of the lowest priority."""
        return max(held, key=lambda seq: (seq.request.priority, seq.number))

    def finished(self, seq: Sequence) -> None:
        """Nothing is learnt from it."""


class Static(FirstComeFirstServed):
    """A batch runs until its longest answer ends, rows that are done computed along; then comes the next batch.

    Pages are reserved for the longest answer that a request allows. The baseline of Zheng et al. (arXiv 2305.13144).
    """

    fills_first = True

    def __init__(self, max_num_seqs: int, max_chunk_steps: int) -> None:
        super().__init__(max_num_seqs, max_chunk_steps)
        self._batch: frozenset[Sequence] = frozenset()  # that decodes, those who are done included

    def may_join(self, seq: Sequence, held: Seq[Sequence]) -> bool:
        """Whether the batch has not begun to decode, and is not full."""
        return self._batch.isdisjoint(held) and len(held) < self._max_num_seqs

    def steps_to_reserve(self, seq: Sequence) -> int:
        """The whole budget."""
        return seq.remaining

    def select(self, held: Seq[Sequence], longest: int) -> Selection:
        """All that are left of the batch, at the batch's width."""
        if self._batch.isdisjoint(held):
            self._batch = frozenset(held)
        return Selection(list(held), longest, len(self._batch))
