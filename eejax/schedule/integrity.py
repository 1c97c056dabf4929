"""A check of a page allocator's books, for tests and simulations. No jax here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from eejax.schedule.page_allocator import PageAllocator, PageError


def check_integrity(allocator: PageAllocator, owners: Iterable[Sequence[int]] | None = None) -> None:
    """Verify that every page is either free or referred to, and by exactly as many as `owners` says.

    Args:
        owners: the page lists of all sequences that hold pages; None checks the allocator's own books only.

    Raises:
        PageError: naming the first page that does not add up.
    """
    times_free = Counter(allocator._free)
    for page, references in enumerate(allocator._references):
        if references < 0 or times_free[page] != (references == 0):
            raise PageError(f"page {page} has {references} references and is {times_free[page]} times free")
    if len(times_free) != sum(references == 0 for references in allocator._references):
        raise PageError(f"the free list names pages that do not exist: {sorted(times_free)}")
    if owners is None:
        return
    held = Counter(page for pages in owners for page in pages)
    for page, references in enumerate(allocator._references):
        if held.pop(page, 0) != references:
            raise PageError(f"page {page} has {references} references, but its owners do not hold as many")
    if held:
        raise PageError(f"owners hold pages that do not exist: {sorted(held)}")
