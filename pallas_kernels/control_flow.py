"""Control flow that XLA compiles well."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def run_if[T](predicate: Array, body: Callable[[T], T], carry: T) -> T:
    """`body(carry)` if `predicate` else `carry`, as a loop of at most one trip.

    `lax.cond` would copy what both branches carry, the whole KV cache for instance; a loop updates it in place.
    """

    def once(state: tuple[Array, T]) -> tuple[Array, T]:
        return jnp.zeros((), bool), body(state[1])

    return jax.lax.while_loop(lambda state: state[0], once, (predicate, carry))[1]
