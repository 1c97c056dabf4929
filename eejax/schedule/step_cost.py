"""What a decode step costs, learnt from the steps that were run, and when it pays to run rows apart. No jax here.

The device visits as many pages for each row as the longest one has, and runs blocks until the last row is resolved:
with a power of two of rows, or, where it compacts, with those that are left. So a long row makes every other row's
token dearer, and a deep one reads the weights of blocks that others need not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from eejax.core import bucket_of

FORGET = 0.995
"""Weight of the past against each new observation: machines and loads change."""
MIN_OBSERVATIONS = 12


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that would decode together.

    Attributes:
        count: of them.
        pages: of the longest.
        depths: shares of the network after which a row may leave, ascending, the last one 1; the same for all rows.
        resolved: for each of `depths` the probability that all of the rows have left there.
        left: for each of `depths` how many of the rows are expected to have left there; `count * resolved` when empty,
            which is right for one row.
    """

    count: int
    pages: int
    depths: tuple[float, ...] = (1.0,)
    resolved: tuple[float, ...] = (1.0,)
    left: tuple[float, ...] = ()

    def join(self, other: Rows) -> Rows:
        """Both in one batch: it goes as deep as the deeper of the two, which are independent."""
        resolved, left = self.resolved, ()
        if len(resolved) > 1:
            resolved = tuple(a * b for a, b in zip(resolved, other.resolved, strict=True))
            left = tuple(a + b for a, b in zip(self.rows_left, other.rows_left, strict=True))
        return Rows(self.count + other.count, max(self.pages, other.pages), self.depths, resolved, left)

    @property
    def rows_left(self) -> tuple[float, ...]:
        """`left`, or what stands for it."""
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
        """Expected rows computed, mean over all blocks; without compaction padding is computed, too."""
        if not compacts:
            return bucket_of(self.count) * self.expected_depth
        total, above, resolved, left = 0.0, 0.0, 0.0, 0.0
        for i, depth in enumerate(self.depths):
            if resolved < 1.0:  # somebody may go on
                total += (depth - above) * (self.count - left)
            above, resolved, left = depth, self.resolved[i], self.rows_left[i]
        return total


class StepCost:
    """Seconds of a decode step: `fixed * depth + (per_row + per_page * pages) * row_depth`.

    `depth` is the share of the network's blocks that run, `row_depth` the rows computed, mean over all blocks: `B *
    depth` without compaction, where B is the bucket.

    Until enough steps of different shapes were observed, a step costs the same whatever it holds, so that nothing is
    run apart.

    Args:
        compacts: rows that have left are not computed any further.
    """

    def __init__(
        self, fixed: float = 1.0, per_row: float = 0.0, per_page: float = 0.0, *, compacts: bool = False
    ) -> None:
        self.compacts = compacts
        self._cost = np.array([fixed, per_row, per_page])
        self._squares = np.zeros((3, 3))
        self._products = np.zeros(3)
        self._observations = 0
        self._stale = False

    def observe(self, depth: float, row_depth: float, pages: int, seconds: float) -> None:
        """Learn from one step: a least-squares fit of relative errors, the past forgotten slowly.

        Args:
            depth, row_depth: as counted, see the class.
            pages: of the longest row.
        """
        if not 0 < seconds < math.inf:
            return
        x = np.array([depth, row_depth, row_depth * pages]) / seconds
        self._squares = FORGET * self._squares + np.outer(x, x)
        self._products = FORGET * self._products + x
        self._observations += 1
        self._stale = True

    @property
    def tells_rows_apart(self) -> bool:
        """Whether the cost of a step is known to depend on the rows in it."""
        self._refresh()
        return bool(self._cost[1:].any())

    def seconds(self, rows: Rows) -> float:
        """Expected time of one step."""
        return self.seconds_of(rows.expected_depth, rows.row_depth(self.compacts), rows.pages)

    def seconds_of(self, depth: float, row_depth: float, pages: int) -> float:
        """Expected time of what counts so much, see the class."""
        self._refresh()
        fixed, per_row, per_page = self._cost
        return float(fixed * depth + (per_row + per_page * pages) * row_depth)

    def apart(self, rows: Rows) -> tuple[float, int]:
        """The cheapest way to bring each of these rows one token: seconds, and how many of them to run first.

        All in one bucket, or a full bucket of a lower power of two and the others after it.
        """
        together, low = self.seconds(rows), 1 << (rows.count.bit_length() - 1)
        if low == rows.count:
            return together, rows.count
        first = self.seconds(replace(rows, count=low))
        if first >= together:
            return together, rows.count
        rest, _ = self.apart(replace(rows, count=rows.count - low))
        return (first + rest, low) if first + rest < together else (together, rows.count)

    def split(self, kinds: Sequence[Rows]) -> tuple[float, list[range]]:
        """Split kinds of rows, which are in some order, into runs of neighbours that decode together.

        Returns:
            The least seconds in which every row gets one token, and the runs, as ranges of indices into `kinds`.
        """
        best: list[tuple[float, list[range]]] = [(0.0, [])]
        for end in range(1, len(kinds) + 1):
            options = []
            joined = None
            for start in range(end - 1, -1, -1):
                joined = kinds[start] if joined is None else kinds[start].join(joined)
                seconds, runs = best[start]
                options.append((seconds + self.apart(joined)[0], [*runs, range(start, end)]))
            best.append(min(options, key=lambda option: (option[0], len(option[1]))))
        return best[-1]

    def _refresh(self) -> None:
        """Solve for costs of at least 0, leaving out terms that would fall below."""
        if not self._stale or self._observations < MIN_OBSERVATIONS:
            return
        self._stale = False
        used = [0, 1, 2]
        scale = np.sqrt(np.diag(self._squares))  # the terms differ by orders of magnitude
        while used:
            part = np.ix_(used, used)
            matrix = self._squares[part] / np.outer(scale[used], scale[used]) + 1e-6 * np.eye(len(used))
            found = np.linalg.solve(matrix, self._products[used] / scale[used]) / scale[used]
            negative = [index for index, value in zip(used, found, strict=True) if value < 0]
            if not negative:
                self._cost = np.zeros(3)
                self._cost[used] = found
                return
            used = [index for index in used if index not in negative]
