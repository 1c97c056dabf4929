"""Muon for the matrices inside the blocks, AdamW for the rest: far fewer tokens than AdamW alone for the same loss."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from checkpoints.demo_objective import transposed

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic whose iterates push every singular value towards 1 (Jordan et al. 2024, "Muon")."""


class MuonState(NamedTuple):
    """Running mean of the gradients."""

    momentum: Any


def orthogonalised(matrix: Float[Array, "o i"], dtype: Any, steps: int = 5) -> Float[Array, "o i"]:
    """About `U V^T` of the singular value decomposition `U S V^T`, by Newton-Schulz steps with products in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else transposed(matrix)
    x = x / (jnp.linalg.norm(x) + 1e-7)

    def dot(left: Array, right: Array, over: int) -> Array:
        left, right = left.astype(dtype), right.astype(dtype)
        return jax.lax.dot_general(left, right, (((1,), (over,)), ((), ())), preferred_element_type=jnp.float32)

    for _ in range(steps):
        gram = dot(x, x, 1)
        x = a * x + dot(b * gram + c * dot(gram, gram, 1), x, 0)
    return x if wide else x.T


def scale_by_muon(dtype: Any, decay: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised; scaled so that a step changes each output about equally for every shape."""

    def init(params: optax.Params) -> optax.OptState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        momentum = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, cast(MuonState, state).momentum, updates)

        def step(m: Array, g: Array) -> Array:
            scale = max(1.0, m.shape[0] / m.shape[1]) ** 0.5
            return scale * orthogonalised(decay * m + (1 - decay) * g, dtype)

        return jax.tree.map(step, momentum, updates), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def demo_optimiser(dtype: Any, clip: float, weight_decay: float, muon_ratio: float) -> optax.GradientTransformation:
    """Updates to be multiplied by the negative learning rate of AdamW.

    Args:
        dtype: dtype of Muon's products.
        clip: largest norm of the whole gradient.
        weight_decay: decoupled decay of every matrix; norm gains are not decayed.
        muon_ratio: Muon's learning rate over AdamW's.
    """

    def kinds(params: dict) -> dict:
        inside = jax.tree.map(lambda p: "muon" if p.ndim == 2 else "vector", params)
        return inside | {"embedding": "embedding"}

    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    decay = optax.add_decayed_weights(weight_decay)
    muon = optax.chain(scale_by_muon(dtype), optax.scale(muon_ratio), decay)
    groups: dict[Hashable, optax.GradientTransformation] = {
        "muon": muon,
        "embedding": optax.chain(adam, decay),
        "vector": adam,
    }
    return optax.chain(optax.clip_by_global_norm(clip), optax.partition(groups, kinds))
