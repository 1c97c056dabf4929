"""Static batches, the baseline of continuous batching. No jax here."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from eejax.core import Sequence
from eejax.schedule.policy import FirstComeFirstServed, Selection


class Static(FirstComeFirstServed):
    """A batch runs until its longest answer ends, finished rows computed along; then the next batch begins.

    Pages are reserved for the longest answer that a request allows. The baseline of Zheng et al. (arXiv 2305.13144).
    """

    fills_first = True

    def __init__(self, max_num_seqs: int, max_chunk_steps: int) -> None:
        super().__init__(max_num_seqs, max_chunk_steps)
        self._batch: frozenset[Sequence] = frozenset()  # that decodes, finished rows included

    def may_join(self, seq: Sequence, held: Seq[Sequence]) -> bool:
        """Whether the batch has not begun to decode, and is not full."""
        return self._batch.isdisjoint(held) and len(held) < self._max_num_seqs

    def steps_to_reserve(self, seq: Sequence) -> int:
        """The whole budget."""
        return seq.remaining

    def select(self, held: Seq[Sequence], longest: int) -> Selection:
        """All unfinished rows of the batch, at the batch's width."""
        if self._batch.isdisjoint(held):
            self._batch = frozenset(held)
        self.width = len(self._batch)
        return Selection(list(held), longest)
