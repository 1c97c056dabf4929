"""ROUGE-L and agreement: by hand, and against the plain recursion."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eejax.tune.answer_losses import agreement, rouge_l


def test_rouge_l_by_hand():
    assert rouge_l("the cat sat", "the cat sat") == 1.0
    assert rouge_l("the cat  sat\n", "the cat sat") == 1.0  # blanks do not count
    assert rouge_l("a b c d", "a x c") == pytest.approx(2 * 2 / 7)
    assert rouge_l("c b a", "a b c") == pytest.approx(2 / 6)  # order counts
    assert rouge_l([1, 2, 3], (2, 3, 4, 5)) == pytest.approx(4 / 7)
    assert (rouge_l("", ""), rouge_l("a", ""), rouge_l([], [1])) == (1.0, 0.0, 0.0)


@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
def test_rouge_l_is_that_of_the_longest_common_subsequence(a, b):
    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    want = 2 * longest(0, 0) / (len(a) + len(b)) if a or b else 1.0
    assert rouge_l(a, b) == pytest.approx(want)
    assert rouge_l(" ".join(map(str, a)), " ".join(map(str, b))) == pytest.approx(want)


def test_agreement_leaves_out_the_token_that_prefill_made():
    assert agreement((1, 2, 3, 4), (9, 2, 3, 5)) == pytest.approx(2 / 3)
    assert agreement((1,), (2,)) == 1.0
    assert agreement((), ()) == 1.0
    with pytest.raises(ValueError, match="shorter"):
        agreement((1, 2, 3), (1, 2))
