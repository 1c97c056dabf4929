"""How a block makes K and V of hidden states: norm, projection, bias, norm of the keys' heads, rotary embedding.

Plain functions over feature-major activations `[D, *N]` and weights `[out, in]`; the model runs on the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class KVProjection:
    """What one block makes its K and V with.

    Attributes:
        norm: weight of the RMS norm before attention.
        wkv: the K heads' rows, then the V heads', head by head.
        bkv: bias, in the same order; None where the model has none.
        k_norm: weight of the RMS norm of each key head (Qwen3); None where the model has none.
        eps: of both norms.
    """

    norm: Float[Array, " D"]
    wkv: Float[Array, "2*K*C D"]
    bkv: Float[Array, " 2*K*C"] | None
    k_norm: Float[Array, " C"] | None
    eps: float = field(metadata={"static": True})


def dot(a: Float[Array, "o i"], b: Float[Array, "i *N"]) -> Float[Array, "o *N"]:
    """`a @ b`, summed in float32 and returned so."""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def linear(weight: Float[Array, "o i"], x: Float[Array, "i *N"]) -> Float[Array, "o *N"]:
    """`weight @ x`, multiplied in the weight's dtype, summed in float32, returned in `x`'s dtype."""
    return dot(weight, x.astype(weight.dtype)).astype(x.dtype)


def _linear_forward(weight: Array, x: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    low = x.astype(weight.dtype)
    return dot(weight, low).astype(x.dtype), (weight, low, jnp.zeros((0,), x.dtype))


def _linear_backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array]:
    # XLA:CPU multiplies six times slower when the left operand is read by columns, so W is turned round beforehand:
    # the layout makes that a real transpose instead of a column-major view.
    weight, low, like = saved
    turned = with_layout_constraint(weight.T, Layout(major_to_minor=(0, 1)))
    dy = dy.astype(weight.dtype)
    tokens = tuple(range(1, dy.ndim))
    dw = jax.lax.dot_general(dy, low, ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32)
    return dw.astype(weight.dtype), dot(turned, dy).astype(like.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def rms_norm(weight: Float[Array, " D"], x: Float[Array, "D *N"], eps: float, axis: int = 0) -> Float[Array, "D *N"]:
    """Root-mean-square norm over `axis`, computed in float32 and returned in `x`'s dtype."""
    shape = [1] * x.ndim
    shape[axis] = -1
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axis, keepdims=True) + eps)
    return y.astype(x.dtype) * weight.reshape(shape).astype(x.dtype)


def rope(x: Float[Array, "heads C *N"], positions: Int[Array, "*N"], freq: Float[Array, " C/2"]) -> Array:
    """Rotate the two halves of `C` by `positions * freq` (rotary embedding, arXiv 2104.09864), in float32."""
    angle = freq.reshape(-1, *[1] * positions.ndim) * positions.astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1).astype(x.dtype)


def keys_values(
    projection: KVProjection, h: Float[Array, "D *N"], positions: Int[Array, "*N"], freq: Float[Array, " C/2"]
) -> tuple[Float[Array, "K C *N"], Float[Array, "K C *N"]]:
    """K and V of states that the block's norm has seen already."""
    kv = linear(projection.wkv, h)
    if projection.bkv is not None:
        kv = kv + projection.bkv.reshape(-1, *[1] * positions.ndim).astype(kv.dtype)
    k, v = kv.reshape(2, -1, 2 * freq.shape[0], *positions.shape)
    if projection.k_norm is not None:
        k = rms_norm(projection.k_norm, k, projection.eps, axis=1)
    return rope(k, positions, freq), v


def normed_keys_values(
    projection: KVProjection, x: Float[Array, "D *N"], positions: Int[Array, "*N"], freq: Float[Array, " C/2"]
) -> tuple[Float[Array, "K C *N"], Float[Array, "K C *N"]]:
    """K and V of hidden states, all that KV fill-in needs (CALM, arXiv 2207.07061, sec. 3.1)."""
    return keys_values(projection, rms_norm(projection.norm, x, projection.eps), positions, freq)
