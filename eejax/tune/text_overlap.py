"""How alike two answers are. No jax here."""

from __future__ import annotations

from collections.abc import Sequence


def rouge_l(answer: str | Sequence[int], reference: str | Sequence[int]) -> float:
    """ROUGE-L: F1 of the longest common subsequence (Lin 2004), of words between blanks, or of ids.

    Returns:
        A number in [0, 1]; 1 where both are empty, 0 where one of them is.
    """
    a, b = (text.split() if isinstance(text, str) else list(text) for text in (answer, reference))
    if not a or not b:
        return float(a == b)
    # Row by row: longest[j] is the length of the longest common subsequence of a[:i] and b[:j].
    longest = [0] * (len(b) + 1)
    for one in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = longest[j]
            longest[j] = diagonal + 1 if one == other else max(above, longest[j - 1])
            diagonal = above
    return 2 * longest[-1] / (len(a) + len(b))


def agreement(answer: Sequence[int], choices: Sequence[int]) -> float:
    """Share of an answer's decoded tokens that equal the full-depth model's greedy choice after the same text.

    The first token is left out, since prefill makes it at full depth. 1 where there is no other.

    Args:
        answer: token ids of the answer.
        choices: for each of them, what the full-depth model would have chosen in its place.
    """
    pairs = list(zip(answer, choices, strict=True))[1:]
    return sum(mine == full for mine, full in pairs) / len(pairs) if pairs else 1.0
