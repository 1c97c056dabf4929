"""Sequences without pages, in the order in which they are to be admitted. No jax here."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from eejax.core import Sequence

type Rank = tuple[float, ...]


@dataclass(slots=True)
class _Class:
    """Waiting sequences of one priority: candidates by rank, and those that came after all of them, by number."""

    window: list[tuple[Rank, int, Sequence]] = field(default_factory=list)
    later: list[tuple[int, Rank, Sequence]] = field(default_factory=list)


class WaitingQueue:
    """Strictly by priority, the lowest number first; within one, the best rank among the `window` that came first.

    Every operation finds its place by bisection.
    """

    def __init__(self, window: int) -> None:
        self._size = window
        self._classes: dict[int, _Class] = {}
        self._ranks: dict[Sequence, Rank] = {}

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[Sequence]:
        """By priority; within one, the candidates by rank, then the later ones by number."""
        for priority in sorted(self._classes):
            yield from (seq for _, _, seq in self._classes[priority].window)
            yield from (seq for _, _, seq in self._classes[priority].later)

    def add(self, seq: Sequence, rank: Rank) -> None:
        """Queue a sequence; `seq.number`, which is unique, says when it came."""
        self._ranks[seq] = rank
        one = self._classes.setdefault(seq.request.priority, _Class())
        insort(one.later, (seq.number, rank, seq))
        if len(one.window) < self._size or self._was_before(seq, one):
            number, rank, first = one.later.pop(0)
            insort(one.window, (rank, number, first))

    @staticmethod
    def _was_before(seq: Sequence, one: _Class) -> bool:
        """Whether a preempted sequence came before one in the window."""
        return one.later[0][2] is seq and seq.number < max(number for _, number, _ in one.window)

    def first(self) -> Sequence:
        """The sequence that is to be admitted before all others.

        Raises:
            IndexError: no sequence waits.
        """
        if not self._classes:
            raise IndexError("no sequence waits")
        return self._classes[min(self._classes)].window[0][2]

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is in the queue.

        Raises:
            ValueError: it does not wait.
        """
        if seq not in self._ranks:
            raise ValueError(f"a sequence of request {seq.request.request_id} does not wait")
        rank, priority = self._ranks.pop(seq), seq.request.priority
        one = self._classes[priority]
        at = bisect_left(one.window, (rank, seq.number))
        if at < len(one.window) and one.window[at][2] is seq:
            del one.window[at]
            if one.later and len(one.window) < self._size:
                number, rank, first = one.later.pop(0)
                insort(one.window, (rank, number, first))
        else:
            del one.later[bisect_left(one.later, (seq.number,))]
        if not one.window:
            del self._classes[priority]
