"""Dynamic rebatching: how many rows to gather at an exit before those that did not exit go on. No jax here.

Rows that exited go on to their next token meanwhile (DREX, arXiv 2512.15705). Gathering saves reading the blocks after
the exit for a few rows in every step, and costs passes in which those few rows do not move. The better of the two is
computed from the costs that `StepCost` has learnt and from where the rows' tokens have exited so far.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Seq
from itertools import pairwise

from eejax.core import Sequence, bucket_of
from eejax.schedule.step_cost import StepCost

MIN_TOKENS = 64
"""Tokens of these rows that must have been decoded before anything is concluded from their exits."""
MIN_GAIN = 1.05
"""Ratio of tokens a second from which on rows are gathered."""


def rows_to_gather(rows: Seq[Sequence], cost: StepCost, page_size: int) -> int:
    """The number that promises most tokens a second, a power of two; 1, no gathering, unless that gains `MIN_GAIN`."""
    seen: Counter[int] = Counter()
    for row in rows:
        seen.update(row.exit_counts)
    if seen.total() < MIN_TOKENS or len(seen) < 2 or not cost.tells_rows_apart:
        return 1
    n_layers = rows[0].exit_layers[0]  # a prompt runs at full depth
    pages = -(-max(row.num_tokens for row in rows) // page_size)
    layers = sorted({*seen, n_layers})
    shares = [seen[layer] / seen.total() for layer in layers]
    depths = [layer / n_layers for layer in layers]
    powers = [1, *(1 << i for i in range(1, (len(rows) // 2).bit_length()))]
    rates = {hold: tokens_per_second(len(rows), hold, depths, shares, cost, pages) for hold in powers}
    best = max(powers, key=lambda hold: rates[hold])
    return best if rates[best] >= MIN_GAIN * rates[1] else 1


def tokens_per_second(
    count: int, hold: int, depths: Seq[float], shares: Seq[float], cost: StepCost, pages: int
) -> float:
    """Throughput of `count` rows, numbers of rows taken as continuous.

    Args:
        hold: rows that are gathered, or passes that one waits at most, as in `eejax.device.decode.run_pass`.
        depths: shares of the network after which tokens leave, ascending, the last one 1.
        shares: of the tokens that leave there.
        pages: of the longest row.
    """
    segments = len(depths)
    present, waited = [0.0] * segments, [0] * segments
    reach = [1.0 - sum(shares[:i]) for i in range(segments)]
    tokens = seconds = 0.0
    for _ in range(8 * hold + 8):
        present[0] = count - sum(present[1:])
        hurry = present[0] < 0.5
        for i, (above, depth) in enumerate(pairwise((0.0, *depths))):
            rows = present[i]
            if rows <= 0:
                continue
            if i and hold > 1 and not (hurry or rows >= hold or waited[i] >= hold):
                waited[i] += 1
                continue
            # A fraction of a row means a row that is there now and then.
            there = 1.0 if rows >= 1 else -math.expm1(-rows)
            width = rows / there if cost.compacts else bucket_of(count)
            seconds += there * cost.seconds(depth - above, (depth - above) * width, pages)
            exiting = rows * (shares[i] / reach[i] if i + 1 < segments and reach[i] > 0 else 1.0)
            tokens += exiting
            present[i], waited[i] = 0.0, 0
            if i + 1 < segments:
                present[i + 1] += rows - exiting
    return tokens / seconds
