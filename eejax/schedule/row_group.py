"""Rows that decode together, what a step of theirs costs, and when it pays to run them apart. No jax here.

The device visits as many pages for each row as the longest one has, and runs blocks until the last row has exited: with
a power of two of rows, or, where it compacts, with the rows that are still running. So a long row makes every other
row's token more expensive, and a deep row reads the weights of blocks that the others do not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eejax.core import bucket_of
from eejax.schedule.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that would decode together.

    Attributes:
        count: number of rows.
        pages: of the longest.
        depths: shares of the network after which a row may exit, ascending, the last one 1; the same for all rows.
        resolved: for each of `depths` the probability that all of the rows have exited there.
        left: for each of `depths` how many of the rows are expected to have exited there; `count * resolved` when
            empty, which is right for one row.
    """

    count: int
    pages: int
    depths: tuple[float, ...] = (1.0,)
    resolved: tuple[float, ...] = (1.0,)
    left: tuple[float, ...] = ()

    def join(self, other: RowGroup) -> RowGroup:
        """Both in one batch: it goes as deep as the deeper of the two, which are independent."""
        resolved, left = self.resolved, ()
        if len(resolved) > 1:
            resolved = tuple(a * b for a, b in zip(resolved, other.resolved, strict=True))
            left = tuple(a + b for a, b in zip(self.rows_left, other.rows_left, strict=True))
        return RowGroup(self.count + other.count, max(self.pages, other.pages), self.depths, resolved, left)

    @property
    def rows_left(self) -> tuple[float, ...]:
        """`left`, or its default."""
        return self.left or tuple(self.count * share for share in self.resolved)

    @property
    def expected_depth(self) -> float:
        """Expected share of the blocks that a step runs."""
        total, below = 0.0, 0.0
        for depth, resolved in zip(self.depths, self.resolved, strict=True):
            total += depth * (resolved - below)
            below = resolved
        return total

    def row_depth(self, compacts: bool) -> float:
        """Expected number of rows computed, averaged over all blocks; without compaction it includes padding."""
        if not compacts:
            return bucket_of(self.count) * self.expected_depth
        total, above, resolved, left = 0.0, 0.0, 0.0, 0.0
        for i, depth in enumerate(self.depths):
            if resolved < 1.0:  # some row may go on
                total += (depth - above) * (self.count - left)
            above, resolved, left = depth, self.resolved[i], self.rows_left[i]
        return total

    def seconds(self, cost: StepCost) -> float:
        """Expected time of one step."""
        return cost.seconds(self.expected_depth, self.row_depth(cost.compacts), self.pages)

    def apart(self, cost: StepCost) -> tuple[float, int]:
        """The cheapest way to bring each of these rows one token: seconds, and how many of them to run first.

        All in one bucket, or a full bucket of a lower power of two and the others after it.
        """
        together, low = self.seconds(cost), 1 << (self.count.bit_length() - 1)
        if low == self.count:
            return together, self.count
        first = replace(self, count=low).seconds(cost)
        if first >= together:
            return together, self.count
        rest, _ = replace(self, count=self.count - low).apart(cost)
        return (first + rest, low) if first + rest < together else (together, self.count)


def split(groups: Sequence[RowGroup], cost: StepCost) -> tuple[float, list[range]]:
    """Split groups of rows, which are in some order, into runs of neighbours that decode together.

    Returns:
        The least seconds in which every row gets one token, and the runs, as ranges of indices into `groups`.
    """
    best: list[tuple[float, list[range]]] = [(0.0, [])]
    for end in range(1, len(groups) + 1):
        options = []
        joined = None
        for start in range(end - 1, -1, -1):
            joined = groups[start] if joined is None else groups[start].join(joined)
            seconds, runs = best[start]
            options.append((seconds + joined.apart(cost)[0], [*runs, range(start, end)]))
        best.append(min(options, key=lambda option: (option[0], len(option[1]))))
    return best[-1]
