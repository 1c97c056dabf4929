"""Arrays in transparent huge pages: which pages are asked for, and what becomes of the arrays."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import huge_pages
from pallas_kernels.native.huge_pages import HUGE, spans, use_huge_pages


def huge_bytes(address: int, size: int) -> int:
    """Bytes in huge pages of the mappings that hold some memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(one, 16) for one in found.groups())
            inside = begin < address + size and address < end
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) << 10
    return total


def test_spans_are_whole_huge_pages_and_neighbours_are_joined():
    assert spans([(5 * HUGE + 7, 10), (HUGE, HUGE), (2 * HUGE + 1, HUGE)]) == [(HUGE, 4 * HUGE), (5 * HUGE, 6 * HUGE)]
    assert spans([(HUGE + 1, HUGE - 1), (2 * HUGE, 1)]) == [(HUGE, 3 * HUGE)]
    assert spans([(HUGE, 4 * HUGE), (2 * HUGE, 1)]) == [(HUGE, 5 * HUGE)]  # one within another
    assert spans([]) == []


def test_arrays_move_into_huge_pages_and_stay_what_they_are():
    values = np.random.default_rng(0).standard_normal((6, HUGE // 4), np.float32)
    array = jnp.array(values)
    address = array.unsafe_buffer_pointer()
    thread = use_huge_pages([array, jnp.ones(3)])
    if thread is None:
        pytest.skip("this system has no transparent huge pages, or wants none used")
    thread.join()
    assert array.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(array, values)
    if not (huge := huge_bytes(address, array.nbytes)):
        pytest.skip("this kernel does not collapse pages when asked (it is older than 6.1, or has none left)")
    assert huge >= 4 * HUGE  # all but what may share its page with something else


def test_little_is_left_alone():
    assert use_huge_pages([jnp.ones(1000), jnp.ones((10, 10))]) is None
    assert use_huge_pages([]) is None


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_a_system_without_them_is_left_alone(monkeypatch, tmp_path, setting):
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    monkeypatch.setattr(huge_pages, "SETTING", path)
    assert use_huge_pages([jnp.ones((2, HUGE // 4))]) is None


def test_what_is_not_jax_s_or_not_on_linux_is_left_alone(monkeypatch):
    assert use_huge_pages([np.ones((2, HUGE // 4), np.float32)]) is None
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    assert use_huge_pages([jnp.ones((2, HUGE // 4))]) is None
