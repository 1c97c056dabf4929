"""Scheduling policies: what the scheduler decides by preference rather than by necessity. No jax here.

`FirstComeFirstServed` is here; `static_policy.py` has a baseline, `length_policy.py` the policy that knows lengths.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

from eejax.core import Sequence


class Selection(NamedTuple):
    """The next decode batch.

    Attributes:
        rows: some of the sequences that hold pages. The others are parked: they keep their pages and wait.
        n_steps: decode steps at most; the scheduler runs fewer where pages do not suffice.
    """

    rows: list[Sequence]
    n_steps: int


class Policy(Protocol):
    """Preferences of a scheduler.

    `held` are the sequences that hold pages, in order of admission, prefilled and ready to decode; it is never empty.
    Pages are up to the scheduler, and so is progress: whatever a policy prefers, every decode batch brings some row a
    token.

    Attributes:
        window: waiting requests, in order of arrival, among which `rank` decides.
        fills_first: prefill goes on for as long as sequences may join. By default prefill and decode take turns.
        width: rows that a decode batch has at least, padding included.
    """

    window: int = 1
    fills_first: bool = False
    width: int = 0

    def rank(self, seq: Sequence) -> tuple[float, ...]:
        """Place in the waiting queue, the lowest first. Asked when a sequence begins to wait, fresh or preempted."""
        ...

    def may_join(self, seq: Sequence, held: Seq[Sequence]) -> bool:
        """Whether the first of the waiting sequences may be admitted now, if there are pages for it."""
        ...

    def steps_to_reserve(self, seq: Sequence) -> int:
        """Decode steps from now on after which `seq` is expected to have ended and given its pages back.

        A sequence is admitted only if the cache can hold it beside those that are held already, each up to its end.
        Pages for the next chunk are reserved for all of them in any case.
        """
        ...

    def select(self, held: Seq[Sequence], longest: int) -> Selection:
        """Rows of the next chunk, at least one, and its length, from 1 to `longest` steps."""
        ...

    def victim(self, held: Seq[Sequence]) -> Sequence:
        """The sequence that gives up its pages when they run out; there are at least two."""
        ...

    def finished(self, seq: Sequence) -> None:
        """A sequence has ended, for whatever reason."""


class FirstComeFirstServed(Policy):
    """Continuous batching in order of arrival: every row decodes, and the youngest is preempted (Orca, vLLM)."""

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

    def select(self, held: Seq[Sequence], longest: int) -> Selection:
        """All of them."""
        return Selection(list(held), longest)

    def victim(self, held: Seq[Sequence]) -> Sequence:
        """The youngest, of the lowest priority."""
        return max(held, key=lambda seq: (seq.request.priority, seq.number))
