"""The distribution of an answer's length: predictors make it and the scheduler reads it. No jax here."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Probabilities at which predictors give a length, the same for all of them."""


@dataclass(frozen=True, slots=True)
class LengthEstimate:
    """The distribution of one answer's length, in tokens.

    Between the given quantiles, and beyond them down to one token and up to `max_tokens`, the logarithm of the length
    is linear in the probability, so a row that outlives every quantile still has a tail.

    Attributes:
        quantiles: lengths at `LEVELS`, ascending, within `1..max_tokens`.
        max_tokens: where the answer is cut off.
    """

    quantiles: tuple[float, ...]
    max_tokens: int

    @classmethod
    def of(cls, quantiles: Sequence[float], max_tokens: int) -> LengthEstimate:
        """An estimate from a predictor's numbers, cut to `1..max_tokens` and sorted.

        If one of them is NaN, or there are not as many as `LEVELS`, the estimate is `unknown`.
        """
        values = [float(value) for value in quantiles]
        if len(values) != len(LEVELS) or any(math.isnan(value) for value in values):
            return cls.unknown(max_tokens)
        return cls(tuple(sorted(min(max(value, 1.0), float(max_tokens)) for value in values)), max_tokens)

    @classmethod
    def exactly(cls, length: float, max_tokens: int) -> LengthEstimate:
        """An estimate that is sure of one length."""
        return cls.of((length,) * len(LEVELS), max_tokens)

    @classmethod
    def unknown(cls, max_tokens: int) -> LengthEstimate:
        """Only the limit is known: the logarithm of the length is uniform up to it."""
        return cls(tuple(float(max_tokens) ** level for level in LEVELS), max_tokens)

    def quantile(self, probability: float, longer_than: int = 0) -> float:
        """The length that the answer does not exceed with this probability, given that it exceeds `longer_than`.

        Args:
            probability: in [0, 1].
            longer_than: tokens that the answer has already; the rest of the distribution is the conditional tail.
        """
        if longer_than >= self.max_tokens - 1:
            return float(self.max_tokens)
        if longer_than <= 0:
            return self._at(probability)
        survived = self._below(longer_than)
        value = self._at(survived + probability * (1 - survived))
        return min(max(value, longer_than + 1.0), float(self.max_tokens))

    def mean(self, longer_than: int = 0) -> float:
        """Expected length, given that it exceeds `longer_than` tokens: the mean of nine quantiles of that tail."""
        return sum(self.quantile(i / 10, longer_than) for i in range(1, 10)) / 9

    def _points(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0, *LEVELS, 1.0), (1.0, *self.quantiles, float(self.max_tokens))

    def _at(self, probability: float) -> float:
        levels, lengths = self._points()
        i = min(bisect_right(levels, probability), len(levels) - 1)
        low, high = lengths[i - 1], lengths[i]
        share = (probability - levels[i - 1]) / (levels[i] - levels[i - 1])
        return low * (high / low) ** share

    def _below(self, length: float) -> float:
        """Probability of an answer of at most `length` tokens, which lies in `1..max_tokens - 1`."""
        levels, lengths = self._points()
        i = bisect_right(lengths, length)
        low, high = lengths[i - 1], lengths[i]
        share = math.log(length / low) / math.log(high / low)
        return levels[i - 1] + share * (levels[i] - levels[i - 1])
