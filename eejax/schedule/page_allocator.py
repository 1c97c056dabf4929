"""Which physical pages of the KV cache are free, and how many sequences refer to each of the others. No jax here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from eejax.core import EejaxError, require_positive_int


class OutOfPages(EejaxError, RuntimeError):
    """Fewer pages are free than were asked for."""


class PageError(EejaxError, RuntimeError):
    """Pages were handled wrongly: freed twice, never allocated, or counted differently from what their owners hold."""


def pages_needed(prompt_len: int, max_tokens: int, page_size: int) -> int:
    """Pages that a sequence of this size takes at its longest. The last answer token is never an input: no KV.

    What needs more pages than the cache has must not be given to a scheduler.
    """
    return -(-(prompt_len + max_tokens - 1) // page_size)


class PageAllocator:
    """Hands out pages `0..num_pages-1`, each with a count of the sequences that refer to it.

    Every operation takes constant time per page, and changes nothing when it raises.
    """

    def __init__(self, num_pages: int) -> None:
        require_positive_int("PageAllocator", num_pages=num_pages)
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is the one used next

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Pages that nobody refers to."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that somebody refers to; a shared page counts once."""
        return self.num_pages - self.num_free

    def allocate(self, n: int) -> list[int]:
        """Take `n` free pages, each with one reference.

        Raises:
            OutOfPages: fewer than `n` pages are free.
            PageError: `n` is negative.
        """
        if n < 0:
            raise PageError(f"cannot allocate {n} pages")
        if n > self.num_free:
            raise OutOfPages(f"{n} pages asked for, {self.num_free} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add one reference to each of these pages.

        Raises:
            PageError: a page is unknown, free, or named twice.
        """
        self._require_used(pages, "share")
        for page in pages:
            self._references[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Drop one reference to each of these pages; a page without references can be allocated again.

        Raises:
            PageError: a page is unknown, already free, or named twice.
        """
        self._require_used(pages, "free")
        # Backwards, so that a sequence's pages are handed out again in the order it held them.
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def _require_used(self, pages: Sequence[int], what: str) -> None:
        if len(set(pages)) != len(pages):
            raise PageError(f"cannot {what} pages {list(pages)}: one owner refers to a page once")
        for page in pages:
            if not 0 <= page < self.num_pages:
                raise PageError(f"cannot {what} page {page}: pages are 0..{self.num_pages - 1}")
            if self._references[page] == 0:
                raise PageError(f"cannot {what} page {page}: nobody holds it")

    def check_integrity(self, owners: Iterable[Sequence[int]] | None = None) -> None:
        """Verify that every page is either free or referred to, and by exactly as many as `owners` says.

        Args:
            owners: the page lists of everyone who holds pages; None checks the allocator's own books only.

        Raises:
            PageError: naming the first page that does not add up.
        """
        times_free = Counter(self._free)
        for page, references in enumerate(self._references):
            if references < 0 or times_free[page] != (references == 0):
                raise PageError(f"page {page} has {references} references and is {times_free[page]} times free")
        if len(times_free) != sum(references == 0 for references in self._references):
            raise PageError(f"the free list names pages that do not exist: {sorted(times_free)}")
        if owners is None:
            return
        held = Counter(page for pages in owners for page in pages)
        for page, references in enumerate(self._references):
            if held.pop(page, 0) != references:
                raise PageError(f"page {page} has {references} references, but its owners do not hold as many")
        if held:
            raise PageError(f"owners hold pages that do not exist: {sorted(held)}")
