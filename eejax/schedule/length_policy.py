"""Continuous batching by predicted length: short answers first, in micro-batches of rows of similar cost. No jax here.

Order. A sequence's key is `arrival + max_wait * cost`, the lowest first: `arrival` on the scheduler's clock, and `cost`
the decode steps that its answer is still expected to take, weighed by the share of the network that its tokens run. In
a burst that is the shortest remaining answer first; a sequence that has waited long enough is no longer overtaken.

Bound. `cost` lies between 0 and the request's `max_tokens`, whatever a predictor says. So a sequence that arrived at
clock `a` never waits for one of the same priority that arrived after `a + max_wait * max_tokens`: only sequences that
came earlier can go ahead of it, and they are finitely many. The clock advances by one for each decode step and each
prefilled prompt.

Memory. A sequence is admitted when the cache will hold it beside all others, each of them up to the predicted quantile
of its answer, where it gives its pages back: what counts is the greatest need to come and not the sum of the greatest
needs. When a sequence outlives that prediction, the conditional tail replaces the prediction and its key rises. It is
parked where others want its slot, or where it would make their steps more expensive: it keeps its pages, and decodes on
with similar rows when its turn comes (arXiv 2305.13144 recomputes such answers from the prompt). Only when pages run
out does the last in order give up its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from functools import reduce

from eejax.core import LengthEstimate, SchedulerConfig, Sequence
from eejax.schedule.policy import Policy, Selection
from eejax.schedule.row_group import RowGroup, split
from eejax.schedule.step_cost import StepCost

MIN_STEPS = 4
"""A chunk that ends where a row's prediction ends has at least this many steps."""
DEPTH_CLASSES = 8
PRIOR_TOKENS = 8
"""Tokens that the experience with other requests counts for."""


class LengthPolicy(Policy):
    """Shortest expected remaining cost first, with a bound on overtaking; expensive rows run apart.

    Args:
        config: slots, chunk, window, quantile and `max_wait`.
        page_size: tokens of one page.
        cost: what steps cost; the scheduler teaches it.
    """

    def __init__(self, config: SchedulerConfig, *, page_size: int, cost: StepCost) -> None:
        self.window = config.window
        self._config = config
        self._page_size = page_size
        self._cost = cost
        self._exits: Counter[int] = Counter()  # of all tokens of requests that may exit early

    def rank(self, seq: Sequence) -> tuple[float, ...]:
        """The key, which does not change while a sequence waits."""
        return (self._key(seq), seq.number)

    def may_join(self, seq: Sequence, held: Seq[Sequence]) -> bool:
        """Whether a slot is free, or held by a sequence that comes after this one."""
        slots, mine = self._config.max_num_seqs, self._order(seq)
        return len(held) < slots or sum(self._order(other) < mine for other in held) < slots

    def steps_to_reserve(self, seq: Sequence) -> int:
        """Up to the predicted quantile."""
        return self._promise(seq) - len(seq.output_token_ids)

    def select(self, held: Seq[Sequence], longest: int) -> Selection:
        """The first in order, and those of the first `max_num_seqs` that are worth running with it."""
        rows = self._together(sorted(held, key=self._order)[: self._config.max_num_seqs])
        ends = min(self._promise(seq) - len(seq.output_token_ids) for seq in rows)
        return Selection(rows, min(longest, max(ends, MIN_STEPS)))

    def victim(self, held: Seq[Sequence]) -> Sequence:
        """The last in order."""
        return max(held, key=self._order)

    def finished(self, seq: Sequence) -> None:
        """Where its tokens exited is what to expect of the next request that may exit early."""
        if seq.request.may_exit:
            self._exits.update(seq.exit_counts)

    def _order(self, seq: Sequence) -> tuple[float, ...]:
        return (seq.request.priority, self._key(seq), seq.number)

    def _key(self, seq: Sequence) -> float:
        done = len(seq.output_token_ids)
        self._promise(seq)
        remaining = min(max(seq.expected_tokens - done, 1.0), seq.remaining)
        return seq.arrival + self._config.max_wait * remaining * self._mean_depth(seq)

    def _promise(self, seq: Sequence) -> int:
        """Answer tokens that the sequence is expected not to exceed; refreshed when it has."""
        done = len(seq.output_token_ids)
        if seq.promised_tokens <= done and done < seq.request.max_tokens:
            estimate = seq.estimate or LengthEstimate.unknown(seq.request.max_tokens)
            seq.promised_tokens = int(estimate.quantile(self._config.quantile, longer_than=done) + 0.999)
            seq.expected_tokens = estimate.mean(longer_than=done)
        return seq.promised_tokens

    def _together(self, rows: list[Sequence]) -> list[Sequence]:
        """The first of `rows`, which are in order, and those that make a step cheaper than two separate steps.

        Rows are grouped by their length in pages, or by the depth that they run to, whichever saves more.
        """
        if len(rows) == 1 or not self._cost.tells_rows_apart:
            return rows
        pages = [_rounded_pages(-(-seq.num_tokens // self._page_size)) for seq in rows]
        if not any(seq.request.may_exit for seq in rows):
            return self._split(rows, [RowGroup(1, p) for p in pages], list(map(float, pages)))[1]
        depths, resolved = self._depths(rows)
        each = [RowGroup(1, p, depths, r) for p, r in zip(pages, resolved, strict=True)]
        by_depth = [float(round(DEPTH_CLASSES * row.expected_depth)) for row in each]
        axes = (list(map(float, pages)), by_depth)
        return min((self._split(rows, each, axis) for axis in axes), key=lambda found: found[0])[1]

    def _split(self, rows: list[Sequence], each: list[RowGroup], axis: list[float]) -> tuple[float, list[Sequence]]:
        """Seconds to bring all rows one token if neighbours along an axis decode together; the first row's batch."""
        groups: dict[float, RowGroup] = {}
        for row, at in zip(each, axis, strict=True):
            groups[at] = groups[at].join(row) if at in groups else row
        classes = sorted(groups)
        seconds, runs = split([groups[at] for at in classes], self._cost)
        run = next(run for run in runs if classes.index(axis[0]) in run)
        chosen = {classes[i] for i in run}
        _, count = reduce(RowGroup.join, (groups[at] for at in chosen)).apart(self._cost)
        return seconds, [seq for seq, at in zip(rows, axis, strict=True) if at in chosen][:count]

    def _depths(self, rows: list[Sequence]) -> tuple[tuple[float, ...], list[tuple[float, ...]]]:
        """Depths at which any of the rows was seen to exit, and each row's probabilities of having exited there."""
        counts = [self._counts(seq) for seq in rows]
        full = max(seq.exit_layers[0] for seq in rows)  # a prompt runs at full depth
        layers = sorted({layer for one in counts for layer in one} | {full})
        resolved = []
        for one in counts:
            total, below = sum(one.values()), 0.0
            shares = []
            for layer in layers:
                below += one.get(layer, 0)
                shares.append(below / total if total else float(layer == full))
            resolved.append(tuple(shares))
        return tuple(layer / full for layer in layers), resolved

    def _counts(self, seq: Sequence) -> dict[int, float]:
        """Its tokens by exit layer, with a few of other requests' tokens added."""
        if not seq.request.may_exit:
            return {}
        counts: dict[int, float] = dict(seq.exit_counts)
        prior = self._exits.total()
        for layer, count in self._exits.items():
            counts[layer] = counts.get(layer, 0) + PRIOR_TOKENS * count / prior
        return counts

    def _mean_depth(self, seq: Sequence) -> float:
        """Expected share of the network that a token of this sequence runs; all of it before any was seen."""
        counts = self._counts(seq)
        if not counts:
            return 1.0
        full = max((*counts, *seq.exit_layers[:1]))
        return sum(layer * count for layer, count in counts.items()) / (full * sum(counts.values()))


def _rounded_pages(pages: int) -> int:
    """Up to 1, 2, 3, 4, 6, 8, 12, 16, ...: few enough classes to try all ways of joining neighbours."""
    power = 1 << (pages - 1).bit_length()
    return power * 3 // 4 if power >= 4 and pages <= power * 3 // 4 else power
