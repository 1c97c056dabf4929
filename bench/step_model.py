"""What a device call costs, as a linear model of what the call does, fitted to measured calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from eejax.core import MIN_PREFILL_BUCKET, ConfigError

FIT_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class DecodeCall:
    """One decode call: what it did, and the seconds it took where it was measured.

    Attributes:
        row_pages: pages that a row visits, summed over steps: every row visits as many as the longest has.
        depth: blocks run for the whole batch over the model's blocks, summed over steps.
        row_depth: the same, each block counted once for each row that it computes, padding included.
        row_heads: vocabulary projections, one for each row that they compute.
    """

    steps: int
    row_pages: int
    depth: float
    row_depth: float
    row_heads: int
    seconds: float = 0.0

    def features(self) -> tuple[float, ...]:
        """What the coefficients of `StepModel` multiply, in their order."""
        return (
            1.0,
            float(self.steps),
            self.depth,
            self.row_depth,
            self.row_depth * self.row_pages / max(1, self.steps),
            float(self.row_heads),
        )


@dataclass(frozen=True, slots=True)
class PrefillCall:
    """A prefill batch: `calls` to the device, over `tokens` in all, padding included."""

    calls: int
    tokens: int
    seconds: float = 0.0

    @classmethod
    def of(cls, lengths: Iterable[int], chunk: int, seconds: float = 0.0) -> PrefillCall:
        """Prefill of sequences of these lengths, in calls of at most `chunk` tokens, as the runner makes them."""
        sizes = [min(chunk, length - start) for length in lengths for start in range(0, length, chunk)]
        return cls(len(sizes), sum(max(MIN_PREFILL_BUCKET, 1 << (size - 1).bit_length()) for size in sizes), seconds)


def pages_visited(contexts: Sequence[int], taken: Sequence[int], page_size: int) -> int:
    """Pages of the longest live row, summed over the steps of a decode call.

    Args:
        contexts: tokens of each row before the call, the next step's input included.
        taken: steps that each row took part in.
    """
    total = 0
    for step in range(max(taken)):
        longest = max(tokens for tokens, count in zip(contexts, taken, strict=True) if count > step)
        total += -(-(longest + step) // page_size)
    return total


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds of decode and prefill calls.

    Decoding: `call` per call; in each step `step`; times the share of the blocks that it runs, `blocks`, `row` for each
    row computed and `page` for each page that a row visits; `head` for each row and head asked. Prefill: `prefill_call`
    per call and `prefill_token` per token, padding included.
    """

    call: float
    step: float
    blocks: float
    row: float
    page: float
    head: float
    prefill_call: float
    prefill_token: float

    def decode_seconds(self, call: DecodeCall) -> float:
        """Seconds of one decode call."""
        weights = (self.call, self.step, self.blocks, self.row, self.page, self.head)
        return sum(weight * feature for weight, feature in zip(weights, call.features(), strict=True))

    def prefill_seconds(self, call: PrefillCall) -> float:
        """Seconds of a prefill batch."""
        return self.prefill_call * call.calls + self.prefill_token * call.tokens

    def to_dict(self) -> dict[str, float]:
        """The coefficients, in seconds."""
        return asdict(self)

    @classmethod
    def fit(cls, decodes: Sequence[DecodeCall], prefills: Sequence[PrefillCall]) -> StepModel:
        """Least squares of the error relative to the prediction, no coefficient negative.

        Args:
            decodes: measured calls.
            prefills: measured prefill batches.

        Raises:
            ConfigError: there are too few calls, or one took no time.
        """
        if len(decodes) < 6 or len(prefills) < 2:
            raise ConfigError(
                f"fitting takes at least 6 decode and 2 prefill calls, got {len(decodes)} and {len(prefills)}"
            )
        decode = _relative_least_squares([one.features() for one in decodes], [one.seconds for one in decodes])
        prefill = _relative_least_squares(
            [(float(one.calls), float(one.tokens)) for one in prefills], [one.seconds for one in prefills]
        )
        return cls(*decode, *prefill)

    def errors(self, decodes: Sequence[DecodeCall]) -> list[float]:
        """Predicted over measured seconds, less one, for each call."""
        return [self.decode_seconds(one) / one.seconds - 1 for one in decodes]


def _relative_least_squares(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients of at least 0 that minimise the sum of squares of `seconds / prediction - 1`.

    Relative to the prediction, which takes a few rounds: relative to the measured time, a call that was held up would
    count for less than one that was not, and the sum of all calls would come out too low.
    """
    from scipy.optimize import nnls

    if min(seconds) <= 0:
        raise ConfigError(f"a measured call took {min(seconds)} s; it must have taken some")
    matrix, measured = np.asarray(features), np.asarray(seconds)
    predicted, found = measured, np.zeros(matrix.shape[1])
    for _ in range(FIT_ROUNDS):
        scaled = matrix / predicted[:, None]
        size = scaled.max(axis=0)
        size[size == 0] = 1.0
        found = nnls(scaled / size, measured / predicted)[0] / size
        predicted = np.maximum(matrix @ found, 1e-3 * measured)
    return found.tolist()
