"""Pages of the KV cache: which are free, how many sequences refer to each of the others, and how many a sequence needs.

No jax here.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from eejax.core import EejaxError, Sequence, require_positive_int


class OutOfPages(EejaxError, RuntimeError):
    """Fewer pages are free than were asked for."""


class PageError(EejaxError, RuntimeError):
    """Pages were handled wrongly: freed twice, never allocated, or counted differently from what their owners hold."""


def pages_needed(prompt_len: int, max_tokens: int, page_size: int) -> int:
    """Pages that a sequence of this size takes at its longest. The last answer token is never an input: no KV.

    A sequence that needs more pages than the cache has must not be given to a scheduler.
    """
    return -(-(prompt_len + max_tokens - 1) // page_size)


def missing_pages(seq: Sequence, steps: int, page_size: int) -> int:
    """Pages that a sequence lacks to be prefilled and then decode `steps` tokens, or as many as it may."""
    prompt_len, max_tokens = len(seq.request.prompt_token_ids), seq.request.max_tokens
    tokens = min(seq.prefill_length + steps, prompt_len + max_tokens - 1)
    return max(0, -(-tokens // page_size) - len(seq.pages))


def pages_to_share(seq: Sequence, page_size: int) -> list[int]:
    """Pages of another answer to the same prompt that already hold, or will hold in time, this prompt's KV.

    Only pages filled by the prompt alone, and never the page of its last token, which must be run for its logits: so
    shared pages end at position `(P - 1) // page_size * page_size <= P - 1`, and each holder owns at least the page of
    position `P - 1`. They are read-only from the moment a sharer runs: a sharer's prefill starts after them, decoding
    writes at `P` and later, and the leader wrote them in its own prefill. That prefill is over, or comes earlier in the
    very same batch, whose rows the runner executes in order, one after another; the sharer's reference keeps the pages
    even if the leader is preempted or finishes.
    """
    leader = next((other for other in seq.request.sequences if other.pages), None)  # never `seq`: it waits
    if leader is None:
        return []
    return leader.pages[: (len(seq.request.prompt_token_ids) - 1) // page_size]


def greatest_need(rows: Seq[Sequence], steps: Seq[int], page_size: int) -> int:
    """The most pages that rows take at any time to come, shared ones counted once for each row.

    All are taken to decode together, and to give their pages back at their ends; the need is then greatest just before
    one of the ends.

    Args:
        steps: decode steps until each row ends.
    """
    # A fresh sequence's first token comes out of its prefill, and no sequence's last token has KV.
    ends = np.array([left - (not row.output_token_ids) for row, left in zip(rows, steps, strict=True)])
    tokens = np.array([row.prefill_length for row in rows])
    at = np.unique(ends)[:, None]
    pages = -(-(tokens + at) // page_size) * (ends >= at)
    return int(pages.sum(axis=1).max())


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
        """Pages without references."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with references; a shared page counts once."""
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

    def share(self, pages: Seq[int]) -> None:
        """Add one reference to each of these pages.

        Raises:
            PageError: a page is unknown, free, or named twice.
        """
        self._require_used(pages, "share")
        for page in pages:
            self._references[page] += 1

    def free(self, pages: Seq[int]) -> None:
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

    def _require_used(self, pages: Seq[int], what: str) -> None:
        if len(set(pages)) != len(pages):
            raise PageError(f"cannot {what} pages {list(pages)}: one owner refers to a page once")
        for page in pages:
            if not 0 <= page < self.num_pages:
                raise PageError(f"cannot {what} page {page}: pages are 0..{self.num_pages - 1}")
            if self._references[page] == 0:
                raise PageError(f"cannot {what} page {page}: it is free")
