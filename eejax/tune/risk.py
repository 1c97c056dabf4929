"""Which thresholds a calibration set can certify: Learn-then-Test by fixed-sequence testing. No jax here.

A threshold's risk is its expected loss on a request, a loss being a number in [0, 1]. To each threshold belongs the
hypothesis that its risk is above the bound, and a p-value for it from the losses of independent requests. Thresholds
are tested from the most cautious one down, and testing stops at the first whose hypothesis cannot be rejected, so the
chance that any accepted threshold breaks the bound is at most `1 - confidence`, however many there are (Angelopoulos et
al., arXiv 2110.01052; CALM, arXiv 2207.07061, sec. 3.2). The order has to be fixed before the losses are seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eejax.core import is_number, require


@dataclass(frozen=True, slots=True)
class Tested:
    """One threshold's test.

    Attributes:
        risk: mean loss over the calibration set.
        p_value: of the hypothesis that the expected loss is above the bound.
        accepted: the hypothesis was rejected: this threshold keeps the promise.
    """

    risk: float
    p_value: float
    accepted: bool


def check_bound(max_risk: float, confidence: float) -> None:
    """Refuse a bound or a confidence outside (0, 1) with a `ConfigError`."""
    for name, value in (("max_risk", max_risk), ("confidence", confidence)):
        require(is_number(value) and 0 < value < 1, f"{name} must be a number between 0 and 1, got {value!r}")


def p_value(losses: Sequence[float], max_risk: float) -> float:
    """Hoeffding-Bentkus p-value of the hypothesis that the expected loss is above `max_risk`.

    `min(exp(-n h(min(R, a), a)), e P(Bin(n, a) <= ceil(n R)))` with `R` the mean of the `n` losses, `a = max_risk` and
    `h` the relative entropy of two coins (Bates et al., arXiv 2101.02703; arXiv 2110.01052).

    Raises:
        ConfigError: there is no loss, or one lies outside [0, 1].
    """
    n = len(losses)
    require(n > 0, "a p-value needs losses, got none")
    for loss in losses:
        require(is_number(loss) and 0 <= loss <= 1, f"a loss must lie in [0, 1], got {loss!r}")
    return _p_value(math.fsum(losses), n, max_risk)


def _p_value(total: float, n: int, max_risk: float) -> float:
    """From the sum of the losses: it is rounded once, where `n` times a rounded mean might pass an integer."""
    if total >= n * max_risk:
        return 1.0
    hoeffding = math.exp(-n * _relative_entropy(total / n, max_risk))
    return min(1.0, hoeffding, math.e * _binomial_tail(math.ceil(total), n, max_risk))


def _relative_entropy(a: float, b: float) -> float:
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + (1 - a) * math.log((1 - a) / (1 - b))


def _binomial_tail(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= k), summed in logarithms: powers of `p` alone would underflow."""
    log_n = math.lgamma(n + 1)
    terms = (
        log_n - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(min(k, n) + 1)
    )
    return math.fsum(map(math.exp, terms))


def fixed_sequence(columns: Iterable[Sequence[float]], max_risk: float, confidence: float) -> list[Tested]:
    """Test thresholds in the order given, up to and including the first that cannot be accepted.

    Args:
        columns: each threshold's losses over the calibration set, most cautious threshold first. What follows the
            first failure is not requested, so an iterator need not measure it.

    Raises:
        ConfigError: the bound, the confidence or a loss is not allowed.
    """
    check_bound(max_risk, confidence)
    tested: list[Tested] = []
    for losses in columns:
        p = p_value(losses, max_risk)
        tested.append(Tested(math.fsum(losses) / len(losses), p, p <= 1 - confidence))
        if not tested[-1].accepted:
            break
    return tested


def requests_needed(max_risk: float, confidence: float) -> int:
    """The smallest calibration set that can certify anything: all its losses may be zero, and it just suffices.

    At zero loss the p-value is `(1 - max_risk)^n`.
    """
    check_bound(max_risk, confidence)
    n = max(1, math.floor(math.log(1 - confidence) / math.log1p(-max_risk)))
    while _p_value(0.0, n, max_risk) > 1 - confidence:
        n += 1
    return n
