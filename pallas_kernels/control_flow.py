"""Control flow that XLA compiles well."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.implementation import default_platform

VARIABLE = "EEJAX_BRANCHES"
"""Environment variable that chooses the form of branches, `cond` or `while`; read when a program is traced."""
FORMS = ("auto", "cond", "while")


def branch_form() -> str:
    """`cond` or `while`, as `run_if` compiles a branch for the device that JAX computes on by default.

    On a CPU `lax.cond` copies what both branches carry, the whole KV cache for instance, and a loop updates it in
    place. On a GPU `cond` copies nothing, and XLA makes it part of a CUDA graph, where the device reads the predicate
    itself; for a loop the device would wait for the host at each predicate.

    Raises:
        ValueError: `EEJAX_BRANCHES` is set to an unknown form.
    """
    form = os.environ.get(VARIABLE) or "auto"
    if form not in FORMS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(FORMS)}, got {form!r}")
    if form != "auto":
        return form
    return "cond" if default_platform() in ("gpu", "cuda") else "while"


def run_if[T](predicate: Array, body: Callable[[T], T], carry: T) -> T:
    """`body(carry)` if `predicate` else `carry`, in the form that `branch_form` names: a loop has at most one trip."""
    if branch_form() == "cond":
        return jax.lax.cond(predicate, body, lambda carry: carry, carry)

    def once(state: tuple[Array, T]) -> tuple[Array, T]:
        return jnp.zeros((), bool), body(state[1])

    return jax.lax.while_loop(lambda state: state[0], once, (predicate, carry))[1]
