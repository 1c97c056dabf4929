"""What a decode step costs, learnt from the steps that were run. No jax here."""

from __future__ import annotations

import math

import numpy as np

FORGET = 0.995
"""Weight of the past against each new observation: machines and loads change."""
MIN_OBSERVATIONS = 12


class StepCost:
    """Seconds of a decode step: `fixed * depth + (per_row + per_page * pages) * row_depth`.

    `depth` is the share of the network's blocks that run, and `row_depth` the number of rows computed, averaged over
    all blocks: `B * depth` for a program of B rows without compaction. `pages` are those of the longest row, since the
    device visits as many pages for each row as the longest one has.

    Until enough steps of different shapes were observed, every step is taken to cost the same.

    Args:
        compacts: rows that have exited are not computed any further.
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
        """Learn from one step. The fit is least squares of relative errors, in which old steps fade slowly."""
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

    def seconds(self, depth: float, row_depth: float, pages: int) -> float:
        """Expected time of one step, see the class."""
        self._refresh()
        fixed, per_row, per_page = self._cost
        return float(fixed * depth + (per_row + per_page * pages) * row_depth)

    def _refresh(self) -> None:
        """Solve for costs of at least 0."""
        if not self._stale or self._observations < MIN_OBSERVATIONS:
            return
        from scipy.optimize import nnls  # takes a tenth of a second, and most engines never need a fit

        self._stale = False
        scale = np.sqrt(np.diag(self._squares))  # the terms differ by orders of magnitude
        # |Lᵀx - L⁻¹p|² is xᵀ(LLᵀ)x - 2pᵀx but for a constant: the factor stands for all the observations.
        lower = np.linalg.cholesky(self._squares / np.outer(scale, scale) + 1e-6 * np.eye(3))
        self._cost = nnls(lower.T, np.linalg.solve(lower, self._products / scale))[0] / scale
