import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax.core.errors import ConfigError
from eejax.schedule.integrity import check_integrity
from eejax.schedule.page_allocator import OutOfPages, PageAllocator, PageError


def test_allocates_every_page_once_and_takes_them_back():
    allocator = PageAllocator(5)
    first, second = allocator.allocate(2), allocator.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (allocator.num_pages, allocator.num_free, allocator.num_used) == (5, 0, 5)
    check_integrity(allocator, [first, second])
    allocator.free(second)
    assert (allocator.num_free, allocator.num_used) == (3, 2)
    assert sorted(allocator.allocate(3)) == sorted(second)


def test_allocation_is_all_or_nothing():
    allocator = PageAllocator(3)
    held = allocator.allocate(1)
    with pytest.raises(OutOfPages, match=r"3 pages asked for, 2 of 3 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2
    check_integrity(allocator, [held])
    assert allocator.allocate(0) == []
    with pytest.raises(PageError, match="-1"):
        allocator.allocate(-1)
    with pytest.raises(ConfigError, match="0"):
        PageAllocator(0)


def test_a_shared_page_is_free_when_the_last_reference_is_gone():
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    allocator.share(pages[:1])
    check_integrity(allocator, [pages, pages[:1]])
    allocator.free(pages)
    assert allocator.num_used == 1
    check_integrity(allocator, [pages[:1]])
    allocator.free(pages[:1])
    assert allocator.num_used == 0
    check_integrity(allocator, [])


@pytest.mark.parametrize("operation", ["free", "share"])
@pytest.mark.parametrize("unheld", [[1], [0, 1], [3], [-1], [0, 7], [0, 0]], ids=str)
def test_pages_that_nobody_holds_are_refused_and_nothing_changes(operation, unheld):
    allocator = PageAllocator(3)
    held = allocator.allocate(3)
    allocator.free([held.pop(1)])
    assert held == [0, 2]
    with pytest.raises(PageError, match=f"cannot {operation} page"):
        getattr(allocator, operation)(unheld)
    check_integrity(allocator, [held])


def test_double_free_is_refused():
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    allocator.free(pages)
    with pytest.raises(PageError, match="it is free"):
        allocator.free(pages)
    check_integrity(allocator, [])


def test_check_integrity_names_the_page_that_does_not_add_up():
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    for owners in ([], [pages[:1]], [pages, pages[:1]], [[*pages, 3]]):
        with pytest.raises(PageError, match=r"page \d has"):
            check_integrity(allocator, owners)
    with pytest.raises(PageError, match="do not exist"):
        check_integrity(allocator, [pages, [9]])
    allocator._free.append(pages[0])  # free and held at once
    with pytest.raises(PageError, match=f"page {pages[0]} has 1 references and is 1 times free"):
        check_integrity(allocator)


@settings(max_examples=50, deadline=None)
@given(num_pages=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_books_agree_with_the_owners_after_any_operations(num_pages, seed):
    rng, allocator, owners = random.Random(seed), PageAllocator(num_pages), []
    for _ in range(60):
        match rng.choice(["allocate", "share", "free"]):
            case "allocate":
                n = rng.randint(0, num_pages)
                if n <= allocator.num_free:
                    owners.append(allocator.allocate(n))
                else:
                    with pytest.raises(OutOfPages):
                        allocator.allocate(n)
            case "share" if owners:
                pages = rng.choice(owners)
                owners.append(rng.sample(pages, rng.randint(0, len(pages))))
                allocator.share(owners[-1])
            case "free" if owners:
                allocator.free(owners.pop(rng.randrange(len(owners))))
        check_integrity(allocator, owners)
        assert allocator.num_used == len({page for pages in owners for page in pages})
