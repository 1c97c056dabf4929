"""How a block makes K and V of hidden states: norm, projection, bias, norm of the keys' heads, rotary embedding.

Plain functions over feature-major activations `[D, *N]` and weights `[out, in]`; the model runs on the same ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.implementation import resolve
from pallas_kernels.native import ops as native


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class KVProjection:
    """What one block makes its K and V with.

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


def dot(a: Float[Array, "o i"], b: Float[Array, "i *N"]) -> Float[Array, "o *N"]:
    """`a @ b` by XLA, summed in float32 and returned so."""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _flat(x: Float[Array, "i *N"]) -> Float[Array, "i N"]:
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _product(weight: Float[Array, "o i"], x: Float[Array, "i *N"]) -> Float[Array, "o *N"]:
    """`dot`, by a kernel where one takes it."""
    if resolve("auto", {"native": lambda: native.linear_refusal(weight, x)}) == "native":
        return native.linear(weight, _flat(x)).reshape(weight.shape[0], *x.shape[1:])
    return dot(weight, x)


@jax.custom_vjp
def project(weight: Float[Array, "o i"], x: Float[Array, "i *N"]) -> Float[Array, "o *N"]:
    """`weight @ x`, multiplied in the weight's dtype, summed in float32 and returned so."""
    return _product(weight, x.astype(weight.dtype))


def _project_forward(weight: Array, x: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    low = x.astype(weight.dtype)
    return _product(weight, low), (weight, low, jnp.zeros((0,), x.dtype))


def _project_backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array]:
    # XLA:CPU multiplies six times slower when the left operand is read by columns, so W is turned round beforehand:
    # the layout makes that a real transpose instead of a column-major view.
    weight, low, like = saved
    turned = with_layout_constraint(weight.T, Layout(major_to_minor=(0, 1)))
    dy = dy.astype(weight.dtype)
    tokens = tuple(range(1, dy.ndim))
    dw = jax.lax.dot_general(dy, low, ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32)
    return dw.astype(weight.dtype), dot(turned, dy).astype(like.dtype)


project.defvjp(_project_forward, _project_backward)


class Norm(NamedTuple):
    """RMS norm over the hidden size that stands before a projection."""

    weight: Float[Array, " D"]
    eps: float


def linear(
    weight: Float[Array, "o i"],
    x: Float[Array, "i *N"],
    norm: Norm | None = None,
    residual: Float[Array, "o *N"] | None = None,
    active: Bool[Array, " N"] | None = None,
) -> Float[Array, "o *N"]:
    """`residual + weight @ norm(x)` in `x`'s dtype; the product in the weight's dtype, summed in float32.

    Args:
        active: columns that are computed, all when None; one token axis then, and no derivative. The others are the
            residual's, or anything without one: a kernel leaves them out.
    """
    return _product_of(False, weight, x, norm, residual, active)


def gated_linear(
    weight: Float[Array, "o2 i"],
    x: Float[Array, "i *N"],
    norm: Norm | None = None,
    active: Bool[Array, " N"] | None = None,
) -> Float[Array, "o *N"]:
    """SwiGLU before its second matrix (arXiv 2002.05202): `silu(upper @ norm(x)) * (lower @ norm(x))`.

    Args:
        active: as in `linear`.
    """
    return _product_of(True, weight, x, norm, None, active)


def linear_pair(
    first: Float[Array, "o i"],
    second: Float[Array, "p i"],
    x: Float[Array, "i *N"],
    norm: Norm,
    active: tuple[Bool[Array, " N"], Bool[Array, " N"]] | None = None,
) -> tuple[Float[Array, "o *N"], Float[Array, "p *N"]]:
    """`linear` of two weights and the same `x`, which is read and normed once where a kernel does it.

    Args:
        active: for each of the products, as in `linear`.
    """
    if active is None:
        return _linear_pair(norm.eps, first, second, x, norm.weight)
    if resolve("auto", {"native": lambda: native.linear_refusal(first, second, x, norm.weight)}) == "native":
        return native.linear_pair(first, second, x, norm.weight, norm.eps, active)
    return _linear_pair_by_parts(norm.eps, first, second, x, norm.weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_pair(eps: float, first: Array, second: Array, x: Array, norm: Array) -> tuple[Array, Array]:
    if resolve("auto", {"native": lambda: native.linear_refusal(first, second, x, norm)}) != "native":
        return _linear_pair_by_parts(eps, first, second, x, norm)
    a, b = native.linear_pair(first, second, _flat(x), norm, eps)
    return a.reshape(-1, *x.shape[1:]), b.reshape(-1, *x.shape[1:])


def _linear_pair_by_parts(eps: float, first: Array, second: Array, x: Array, norm: Array) -> tuple[Array, Array]:
    """The specification."""
    h = rms_norm(norm, x, eps)
    return project(first, h).astype(x.dtype), project(second, h).astype(x.dtype)


def _linear_pair_forward(
    eps: float, first: Array, second: Array, x: Array, norm: Array
) -> tuple[tuple[Array, Array], Callable]:
    return jax.vjp(functools.partial(_linear_pair_by_parts, eps), first, second, x, norm)


def _linear_pair_backward(_eps: float, back: Callable, dy: tuple[Array, Array]) -> tuple:
    return back(dy)


_linear_pair.defvjp(_linear_pair_forward, _linear_pair_backward)


def _product_of(
    gated: bool, weight: Array, x: Array, norm: Norm | None, residual: Array | None, active: Array | None
) -> Array:
    eps, scale = (None, None) if norm is None else (norm.eps, norm.weight)
    if active is None:
        return _linear(eps, gated, weight, x, scale, residual)
    if resolve("auto", {"native": lambda: native.linear_refusal(weight, x, scale, residual)}) == "native":
        return native.linear(weight, x, scale, eps or 0.0, residual, gated, active)
    y = _linear_by_parts(eps, gated, weight, x, scale, residual)
    return y if residual is None else jnp.where(active, y, residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(
    eps: float | None, gated: bool, weight: Array, x: Array, norm: Array | None, residual: Array | None
) -> Array:
    if resolve("auto", {"native": lambda: native.linear_refusal(weight, x, norm, residual)}) != "native":
        return _linear_by_parts(eps, gated, weight, x, norm, residual)
    y = native.linear(weight, _flat(x), norm, eps or 0.0, None if residual is None else _flat(residual), gated)
    return y.reshape(y.shape[0], *x.shape[1:])


def _linear_by_parts(
    eps: float | None, gated: bool, weight: Array, x: Array, norm: Array | None, residual: Array | None
) -> Array:
    """The specification."""
    h = x if norm is None or eps is None else rms_norm(norm, x, eps)
    y = project(weight, h).astype(x.dtype)
    if gated:
        gate, up = jnp.split(y, 2, axis=0)
        y = jax.nn.silu(gate) * up
    return y if residual is None else residual + y


def _linear_forward(
    eps: float | None, gated: bool, weight: Array, x: Array, norm: Array | None, residual: Array | None
) -> tuple[Array, Callable]:
    return jax.vjp(functools.partial(_linear_by_parts, eps, gated), weight, x, norm, residual)


def _linear_backward(eps: float | None, gated: bool, back: Callable, dy: Array) -> tuple:
    return back(dy)


_linear.defvjp(_linear_forward, _linear_backward)


def rms_norm(weight: Float[Array, " D"], x: Float[Array, "*X"], eps: float, axis: int = 0) -> Float[Array, "*X"]:
    """Root-mean-square norm over `axis`, computed in float32 and returned in `x`'s dtype."""
    shape = [1] * x.ndim
    shape[axis] = -1
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axis, keepdims=True) + eps)
    return y.astype(x.dtype) * weight.reshape(shape).astype(x.dtype)


class Rotation(NamedTuple):
    """Cosine and sine of the angles by which the rotary embedding turns tokens."""

    cos: Float[Array, "C2 *N"]
    sin: Float[Array, "C2 *N"]


def rotation(positions: Int[Array, "*N"], freq: Float[Array, " C2"]) -> Rotation:
    """Of tokens at these positions: by `positions * freq`."""
    angle = freq.reshape(-1, *[1] * positions.ndim) * positions.astype(jnp.float32)
    # Kept apart: XLA would put them into every loop that reads them, and compute them for every head and block anew.
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
    kv = linear(projection.wkv, x, Norm(projection.norm, projection.eps), active=active)
    return finish_keys_values(projection, kv, rotation(positions, freq))


def finish_keys_values(
    projection: KVProjection, kv: Float[Array, "KV *N"], turn: Rotation
) -> tuple[Float[Array, "K C *N"], Float[Array, "K C *N"]]:
    """What `keys_values` does behind the product."""
    half, *tokens = turn.cos.shape
    if projection.bkv is not None:
        kv = kv + projection.bkv.reshape(-1, *[1] * len(tokens)).astype(kv.dtype)
    k, v = kv.reshape(2, -1, 2 * half, *tokens)
    if projection.k_norm is not None:
        k = rms_norm(projection.k_norm, k, projection.eps, axis=1)
    return rope(k, turn), v
