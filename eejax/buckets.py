"""Row and token counts that programs are compiled for. No jax here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple


def bucket_of(count: int, smallest: int = 1) -> int:
    """The power of two that holds `count`, at least `smallest`."""
    return max(smallest, 1 << (count - 1).bit_length())


@cache
def segment_buckets(bucket: int, compacts: bool) -> tuple[int, ...]:
    """Row counts that a segment may run with in a batch of `bucket` rows, ascending: `bucket` alone without compaction.

    Halves down to an eighth. Below that the weights decide what a block costs, not the rows (`python -m bench
    buckets`), and every bucket is compiled for every block.
    """
    if not compacts:
        return (bucket,)
    return tuple(sorted({max(1, bucket >> shift) for shift in range(4)}))


def segment_bucket(bucket: int, compacts: bool, count: int) -> int:
    """The one of these that `count` rows run in."""
    return next(size for size in segment_buckets(bucket, compacts) if size >= count)


class Piece(NamedTuple):
    """Positions `start .. start + length - 1` of row `row`."""

    row: int
    start: int
    length: int


def cut_prefill(spans: Sequence[tuple[int, int]], chunk: int, max_rows: int) -> list[list[Piece]]:
    """Rows' positions `begin .. end - 1`, one row behind another, cut into calls.

    A row that does not fit into what is left of a call goes on in the next one.

    Args:
        spans: each row's `begin` and `end`.
        chunk: tokens of a call at most.
        max_rows: rows of a call at most.
    """
    calls: list[list[Piece]] = []
    room = 0
    for row, (begin, end) in enumerate(spans):
        start = begin
        while start < end:
            if not room or len(calls[-1]) == max_rows:
                calls.append([])
                room = chunk
            length = min(room, end - start)
            calls[-1].append(Piece(row, start, length))
            start, room = start + length, room - length
    return calls
