"""Row and token counts that programs are compiled for. No jax here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


def bucket_of(count: int, smallest: int = 1) -> int:
    """The power of two that holds `count`, at least `smallest`."""
    return max(smallest, 1 << (count - 1).bit_length())


def batch_size(count: int, most: int, padding_is_free: bool) -> int:
    """Rows of the program that decodes `count` rows: a power of two.

    Args:
        most: rows of the largest batch, apart from wider static ones.
        padding_is_free: kernels leave padding out. Fewer sizes suffice then: 1, 8, 32, 128, ... and the largest.
    """
    size, top = bucket_of(count), bucket_of(most)
    if not padding_is_free or size == 1:
        return size
    coarse = 1 << max(3, (size.bit_length() - 1) | 1)
    return min(coarse, top) if size <= top else coarse


class Piece(NamedTuple):
    """Positions `start .. start + length - 1` of row `row`."""

    row: int
    start: int
    length: int


def cut_prefill(spans: Sequence[tuple[int, int]], chunk: int, max_rows: int) -> list[list[Piece]]:
    """Rows' positions `begin .. end - 1`, one row after another, cut into calls.

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
