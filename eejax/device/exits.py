"""Confidence measures and thresholds: who may leave at an exit.

To add a measure: name it in `eejax.core.Measure` and compute it in `confidence`, from what `Observation` carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from eejax.core import MEASURES
from pallas_kernels import Best

RANDOM_STREAM = 1
"""Sets the `random` measure's draws apart from the sampler's, which use the same per-token keys."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class ExitRows:
    """Per-row exit parameters, fixed for a request.

    Attributes:
        thresholds: `inf` where the row may not leave at that exit (E exits, ascending).
        measure: index into `MEASURES`.
        tau: decay of CALM eq. 5, per answer; negative for a constant threshold.
        horizon: the N of that equation, the request's `max_tokens`.
        gates: probability by an exit's probe below which its head is not asked; 0 asks always.
        keys: raw random key of the row's request.
    """

    thresholds: Float[Array, "E B"]
    measure: Int[Array, " B"]
    tau: Float[Array, " B"]
    horizon: Float[Array, " B"]
    gates: Float[Array, " B"]
    keys: UInt32[Array, "B 2"]


@dataclass(frozen=True, slots=True)
class Observation:
    """What measures may look at, at one exit. What is None was not computed, and rows that need it do not leave.

    Attributes:
        best: what this exit's logits come to.
        similarity: cosine of the hidden states behind and before the exit's block.
        probe: log-odds by the exit's linear probe.
        uniform: one draw per token.
    """

    best: Best | None = None
    similarity: Float[Array, " B"] | None = None
    probe: Float[Array, " B"] | None = None
    uniform: Float[Array, " B"] | None = None


def uses(rows: ExitRows, names: Sequence[str]) -> Bool[Array, " B"]:
    """Which rows use one of the named measures."""
    return jnp.isin(rows.measure, jnp.array([i for i, name in enumerate(MEASURES) if name in names]))


def may_leave(rows: ExitRows, exit_index: int) -> Bool[Array, " B"]:
    """Which rows take part in the test at an exit at all."""
    return jnp.isfinite(rows.thresholds[exit_index])


def thresholds_at(rows: ExitRows, exit_index: int, step: Int[Array, " B"]) -> Float[Array, " B"]:
    """Thresholds for answer token number `step` (from 0) at one exit; `DecayingThreshold` gives the formula."""
    base = rows.thresholds[exit_index]
    decayed = 0.9 * base + 0.1 * jnp.exp(-rows.tau * step.astype(jnp.float32) / rows.horizon)
    return jnp.where(rows.tau < 0, base, jnp.clip(decayed, 0.0, 1.0))


def token_keys(rows: ExitRows, step: Int[Array, " B"]) -> Array:
    """One random key per row for answer token number `step`: a function of the request alone, not of its batch."""
    return jax.vmap(lambda data, t: jax.random.fold_in(jax.random.wrap_key_data(data), t))(rows.keys, step)


def uniform_draw(rows: ExitRows, step: Int[Array, " B"]) -> Float[Array, " B"]:
    """The `random` measure: one number in [0, 1) per row and token, the same at every exit."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, RANDOM_STREAM)))(token_keys(rows, step))


def similarity(before: Float[Array, "D B"], behind: Float[Array, "D B"]) -> Float[Array, " B"]:
    """The `similarity` measure: cosine of the hidden states before and behind a block, at most 1."""
    before, behind = before.astype(jnp.float32), behind.astype(jnp.float32)
    lengths = jnp.sum(before * before, axis=0) * jnp.sum(behind * behind, axis=0)
    cosine = jnp.sum(before * behind, axis=0) * jax.lax.rsqrt(jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny))
    return jnp.minimum(cosine, 1.0)


def confidence(rows: ExitRows, seen: Observation) -> Float[Array, " B"]:
    """Each row's confidence under its own measure, below every threshold where that was not observed."""
    found: dict[str, Array] = {}
    if seen.best is not None:
        best = seen.best
        found |= {"softmax": 1 / best.total, "margin": (1 - jnp.exp(best.second - best.top)) / best.total}
    if seen.similarity is not None:
        found["similarity"] = seen.similarity
    if seen.probe is not None:
        found["classifier"] = jax.nn.sigmoid(seen.probe)
    if seen.uniform is not None:
        found["random"] = seen.uniform
    result = jnp.full(rows.measure.shape, -jnp.inf)
    for index, name in enumerate(MEASURES):
        if name in found:
            result = jnp.where(rows.measure == index, found[name], result)
    return result
