"""How a block makes K and V of hidden states: norm, projection, bias, norm of the keys' heads, rotary embedding.

Plain functions over feature-major activations `[D, *N]` and weights `[out, in]`; the model's blocks use the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.products import Norm, linear, rms_norm


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class KVProjection:
    """The parameters that make one block's K and V.

    Attributes:
        norm: weight of the RMS norm before attention.
        wkv: the K heads' rows, then the V heads', head by head: `KV = 2 K C` of them.
        bkv: bias, in the same order; None where the model has none.
        k_norm: weight of the RMS norm of each key head (Qwen3); None where the model has none.
        eps: of both norms.
    """

    norm: Float[Array, " D"]
    wkv: Float[Array, "KV D"]
    bkv: Float[Array, " KV"] | None
    k_norm: Float[Array, " C"] | None
    eps: float = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class ExitedTokens:
    """N tokens that left the network before its last block, as `kv_fill` takes them. Several may belong to one row.

    Attributes:
        x: hidden states they left with.
        positions, page_table: each token's position, and its row of the page table.
        from_block: index of the first block whose K and V a token lacks; the number of blocks where it lacks none, and
            such a token may have any position.
    """

    x: Float[Array, "D N"]
    positions: Int[Array, " N"]
    page_table: Int[Array, "N M"]
    from_block: Int[Array, " N"]


class Rotation(NamedTuple):
    """Cosine and sine of the angles by which the rotary embedding rotates queries and keys."""

    cos: Float[Array, "C2 *N"]
    sin: Float[Array, "C2 *N"]


def rotation(positions: Int[Array, "*N"], freq: Float[Array, " C2"]) -> Rotation:
    """The rotation of tokens at these positions: by the angles `positions * freq`."""
    angle = freq.reshape(-1, *[1] * positions.ndim) * positions.astype(jnp.float32)
    # Kept apart: XLA would move them into every loop that reads them, and compute them for every head and block anew.
    return Rotation(*jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle))))


def rope(x: Float[Array, "heads C *N"], turn: Rotation) -> Array:
    """Rotate the two halves of `C` (rotary embedding, arXiv 2104.09864), in float32."""
    cos, sin = turn
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1).astype(x.dtype)


def keys_values(
    projection: KVProjection,
    x: Float[Array, "D *N"],
    positions: Int[Array, "*N"],
    freq: Float[Array, " C2"],
    active: Bool[Array, " N"] | None = None,
) -> tuple[Float[Array, "K C *N"], Float[Array, "K C *N"]]:
    """K and V of hidden states, all that KV fill-in needs (CALM, arXiv 2207.07061, sec. 3.1).

    Args:
        active: as in `linear`.
    """
    kv = linear(projection.wkv, x, norm=Norm(projection.norm, projection.eps), active=active)
    return finish_keys_values(projection, kv, rotation(positions, freq))


def finish_keys_values(
    projection: KVProjection, kv: Float[Array, "KV *N"], turn: Rotation
) -> tuple[Float[Array, "K C *N"], Float[Array, "K C *N"]]:
    """What `keys_values` does after the product."""
    half, *tokens = turn.cos.shape
    if projection.bkv is not None:
        kv = kv + projection.bkv.reshape(-1, *[1] * len(tokens)).astype(kv.dtype)
    k, v = kv.reshape(2, -1, 2 * half, *tokens)
    if projection.k_norm is not None:
        k = rms_norm(projection.k_norm, k, projection.eps, axis=1)
    return rope(k, turn), v
