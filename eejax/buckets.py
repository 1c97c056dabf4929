"""Row and token counts that programs are compiled for. No jax here."""

from __future__ import annotations

from functools import cache


def bucket_of(count: int, smallest: int = 1) -> int:
    """The power of two that holds `count`, at least `smallest`."""
    return max(smallest, 1 << (count - 1).bit_length())


@cache
def segment_buckets(bucket: int, compacts: bool) -> tuple[int, ...]:
    """Row counts that a segment may run with in a batch of `bucket` rows, ascending: `bucket` alone without compaction.

    Halves down to an eighth, and three quarters of a large batch. Below an eighth the weights decide what a block
    costs, not the rows (`python -m bench buckets`), and every bucket is compiled for every block.
    """
    if not compacts:
        return (bucket,)
    sizes = {max(1, bucket >> shift) for shift in range(4)}
    return tuple(sorted(sizes | ({bucket * 3 // 4} if bucket >= 32 else set())))


def segment_bucket(bucket: int, compacts: bool, count: int) -> int:
    """The one of these that `count` rows run in."""
    return next(size for size in segment_buckets(bucket, compacts) if size >= count)
