"""What confidence and greedy choice need of logits, taken while the vocabulary's matrix goes by."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.implementation import Implementation, resolve
from pallas_kernels.native import ops as native
from pallas_kernels.projection import dot


class Best(NamedTuple):
    """What N columns of logits come to, where a NaN is no candidate and counts for nothing.

    The likeliest token's probability is `1 / total`, and another's `exp(logit - top) / total`.

    Attributes:
        top: the largest.
        token: the lowest row that has it.
        second: the largest of the others, equal to `top` where two are.
        total: sum of the exponentials of all logits, each less the largest.
    """

    top: Float[Array, " N"]
    token: Int[Array, " N"]
    second: Float[Array, " N"]
    total: Float[Array, " N"]

    @classmethod
    def of(cls, logits: Float[Array, "V N"]) -> Best:
        """By XLA: the specification."""
        rows = logits.shape[0]
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        known = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
        top = jnp.max(known, axis=0)
        # Two plain reductions: XLA:CPU vectorises them, unlike its own argmax.
        token = jnp.min(jnp.where(known == top, ids, rows), axis=0)
        second = jnp.max(jnp.where(ids == token, -jnp.inf, known), axis=0)
        return cls(top, token, second, jnp.sum(jnp.exp(known - top), axis=0))

    @classmethod
    def unknown(cls, count: int) -> Best:
        """Of columns that nobody has looked at."""
        zeros = jnp.zeros((count,), jnp.float32)
        return cls(zeros, zeros.astype(jnp.int32), zeros, zeros)


def head(
    weight: Float[Array, "V D"],
    x: Float[Array, "D N"],
    *,
    active: Bool[Array, " N"] | None = None,
    logits: Float[Array, "V N"] | None = None,
    wanted: Bool[Array, " N"] | None = None,
    confidence: bool = True,
    implementation: Implementation = "auto",
) -> tuple[Best, Float[Array, "V N"] | None]:
    """`Best` of the logits `weight @ x`, and `logits` with those of the wanted columns in their places.

    Args:
        active: columns that are looked at, all when None. What is found of others may be anything.
        logits: None where no column's are wanted: then they are nowhere in memory. In place when donated.
        wanted: those columns, of the active ones; all of these when None.
        confidence: whether `second` and `total` are needed; they may be anything otherwise.

    Raises:
        ValueError: `implementation` is unknown, or refuses these arguments: the message says why.
    """
    x = x.astype(weight.dtype)
    if resolve(implementation, {"native": lambda: native.head_refusal(weight, x)}) == "native":
        wanted = jnp.ones(x.shape[1], bool) if wanted is None else wanted
        top, token, second, total, written = native.head(weight, x, active, logits, wanted, confidence)
        return Best(top, token, second, total), None if logits is None else written
    found = dot(weight, x)
    if logits is not None:
        places = jnp.ones(x.shape[1], bool)
        for some in (active, wanted):
            places = places if some is None else places & some
        logits = jnp.where(places, found, logits)
    return Best.of(found), logits
