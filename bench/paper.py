"""The scheduling of Zheng et al. (arXiv 2305.13144), on our scheduler: what `bench.schedule` compares with.

A group of requests is ordered by predicted length and cut into batches (their section 4). A batch is static: it runs
until its longest answer ends, or until its predicted length, and no sequence joins it meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from eejax.core import LengthEstimate, MicroBatch, SchedulerConfig, Sequence
from eejax.schedule import PageAllocator, Scheduler, Selection, Static

BIN = 50
"""Predicted lengths are rounded up to multiples of this many tokens, as in the paper."""


@dataclass(frozen=True, slots=True)
class PaperOptions:
    """The parts of the paper's method.

    Attributes:
        group: requests, in order of arrival, that are ordered among each other.
        ordered: the group is ordered by predicted length, in bins.
        vbs: variable batch size: as many rows as have pages for prompt and predicted length, at most `max_rows`. The
            paper's table grows a batch up to 16-fold for short answers.
        fcr: failure collection and recomputation. A batch ends at its longest predicted length; answers unfinished then
            are discarded, and come again from their prompts, with their whole budget, at the end of their group.
        max_rows: of a batch with `vbs`; None: the number of slots.
        quantile: of the estimated length, which is the predicted one; the paper takes the longest of several samples.
    """

    group: int = 256
    ordered: bool = False
    vbs: bool = False
    fcr: bool = False
    max_rows: int | None = None
    quantile: float = 0.75


class MicroBatches(Static):
    """Groups of requests in static batches of similar predicted length.

    A batch has a power of two of rows, since the device would compute as many: those that have pages for prompt and
    budget, at most `max_num_seqs`.

    Args:
        max_num_seqs: rows of a batch at most.
        max_chunk_steps: decode steps in one device call at most.
        num_pages, page_size: of the cache.
    """

    def __init__(
        self, max_num_seqs: int, max_chunk_steps: int, *, num_pages: int, page_size: int, options: PaperOptions
    ) -> None:
        super().__init__(max_num_seqs, max_chunk_steps)
        self.window = options.group
        self._options = options
        self._num_pages = num_pages
        self._page_size = page_size
        self._max_rows = (options.vbs and options.max_rows) or max_num_seqs
        self._limit = 0  # answer tokens at which the batch that decodes is cut off

    def rank(self, seq: Sequence) -> tuple[float, ...]:
        """Groups in order of arrival; in a group, those that come again last, the others by bin where `ordered`."""
        return (*self._batch_key(seq), self._predicted(seq) if self._options.ordered else 0, seq.number)

    def may_join(self, seq: Sequence, held: Seq[Sequence]) -> bool:
        """Whether the batch has not begun to decode, is of the same group, and has fewer rows than `seq` allows."""
        if not self._batch.isdisjoint(held) or any(self._batch_key(row) != self._batch_key(seq) for row in held[:1]):
            return False
        return len(held) < min(map(self._rows_beside, (*held, seq)))

    def steps_to_reserve(self, seq: Sequence) -> int:
        """The whole budget, or what the prediction leaves of it."""
        return max(1, self._reserved(seq) - len(seq.output_token_ids))

    def failures(self, held: Seq[Sequence]) -> list[Sequence]:
        """With `fcr`, the rows that have reached the end of their batch unfinished. They are no longer part of it."""
        if not self._options.fcr or self._batch.isdisjoint(held):
            return []
        failed = [seq for seq in held if len(seq.output_token_ids) >= self._limit]
        self._batch = self._batch.difference(failed)
        return failed

    def select(self, held: Seq[Sequence], longest: int) -> Selection:
        """All unfinished rows of the batch, at the batch's width, up to its end."""
        if self._batch.isdisjoint(held):
            self._limit = max(map(self._predicted, held))
        chosen = super().select(held, longest)
        if not self._options.fcr:
            return chosen
        left = self._limit - min(len(seq.output_token_ids) for seq in held)
        return Selection(chosen.rows, max(1, min(longest, left)))

    def victim(self, held: Seq[Sequence]) -> Sequence:
        """The youngest; it comes again in another batch."""
        gone = super().victim(held)
        self._batch = self._batch.difference((gone,))
        return gone

    def _batch_key(self, seq: Sequence) -> tuple[int, int]:
        """Group, and whether the sequence comes again: only those that agree in both share a batch."""
        return seq.number // self.window, int(seq.preemptions > 0)

    def _rows_beside(self, seq: Sequence) -> int:
        """Rows of a batch of sequences like this one."""
        pages = -(-(len(seq.request.prompt_token_ids) + self._reserved(seq)) // self._page_size)
        rows = max(1, min(self._max_rows, self._num_pages // pages))
        return 1 << (rows.bit_length() - 1)

    def _reserved(self, seq: Sequence) -> int:
        """Answer tokens that pages are reserved for."""
        return self._predicted(seq) if self._options.vbs else seq.request.max_tokens

    def _predicted(self, seq: Sequence) -> int:
        """Predicted answer length in tokens, rounded up to a bin; the budget for what comes again."""
        budget = seq.request.max_tokens
        if seq.preemptions:
            return budget
        length = (seq.estimate or LengthEstimate.unknown(budget)).quantile(self._options.quantile)
        return min(budget, BIN * math.ceil(length / BIN))


class PaperScheduler(Scheduler):
    """`Scheduler` with `MicroBatches`, which discards failures before it decides on a batch.

    Args:
        paper: fields of `PaperOptions`.
        others: arguments of `Scheduler`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        allocator: PageAllocator,
        *,
        page_size: int,
        paper: Mapping[str, Any],
        **others: Any,
    ) -> None:
        slots, chunk, num_pages = config.max_num_seqs, config.max_chunk_steps, allocator.num_pages
        self._paper = MicroBatches(
            slots, chunk, num_pages=num_pages, page_size=page_size, options=PaperOptions(**paper)
        )
        super().__init__(config, allocator, page_size=page_size, policy=self._paper, **others)

    def schedule(self, max_steps: int | None = None) -> MicroBatch | None:
        """As `Scheduler.schedule`. Failures lose their pages and their tokens first, and wait again."""
        for seq in self._paper.failures(self._held):
            seq.truncate(0)
            seq.first_token_time = None
            self._preempt(seq)
        return super().schedule(max_steps)
