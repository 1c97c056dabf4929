"""The door to products of weights: `linear`, and `head`, which keeps of a product only what decoding needs of logits.

Activations are feature-major, `[D, *N]`, and weights `[out, in]`. Both operations run on the native kernel where it
takes the arguments, and otherwise by their specification, in plain jnp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.implementation import Implementation, resolve
from pallas_kernels.native import ops as native


def rms_norm(weight: Float[Array, " D"], x: Float[Array, "*X"], eps: float, axis: int = 0) -> Float[Array, "*X"]:
    """Root-mean-square norm over `axis`, computed in float32 and returned in `x`'s dtype."""
    shape = [1] * x.ndim
    shape[axis] = -1
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axis, keepdims=True) + eps)
    return y.astype(x.dtype) * weight.reshape(shape).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Norm:
    """The RMS norm over the hidden size before a product."""

    weight: Float[Array, " D"]
    eps: float = field(metadata={"static": True})


@overload
def linear(
    weights: Array,
    x: Array,
    *,
    norm: Norm | None = None,
    residual: Array | None = None,
    gated: bool = False,
    active: Array | None = None,
) -> Array: ...
@overload
def linear(
    weights: tuple[Array, Array], x: Array, *, norm: Norm | None = None, active: tuple[Array, Array] | None = None
) -> tuple[Array, Array]: ...
def linear(
    weights: Float[Array, "w i"] | tuple[Float[Array, "o i"], Float[Array, "p i"]],
    x: Float[Array, "i *N"],
    *,
    norm: Norm | None = None,
    residual: Float[Array, "o *N"] | None = None,
    gated: bool = False,
    active: Bool[Array, " N"] | tuple[Bool[Array, " N"], Bool[Array, " N"]] | None = None,
) -> Float[Array, "o *N"] | tuple[Float[Array, "o *N"], Float[Array, "p *N"]]:
    """`residual + weights @ norm(x)` in `x`'s dtype; the product in the weights' dtype, summed in float32.

    Args:
        weights: a matrix; or two of the same `x`, which is read and normed once, for a pair of results.
        gated: SwiGLU before its second matrix (arXiv 2002.05202): the upper half of the rows is the gate, and the
            result, half as high, is `silu(upper @ norm(x)) * (lower @ norm(x))`. Not with a residual.
        active: columns that are computed (of a pair: by each product), all when None; one token axis then. Other
            columns are the residual's, or anything without one: a kernel leaves them out.

    Raises:
        ValueError: `EEJAX_KERNELS` asks for a kernel that refuses these arguments: the message says why.
    """
    masks = active if active is None or isinstance(active, tuple) else (active,)
    if not isinstance(weights, tuple):
        return _linear(gated, (weights,), x, norm, residual, masks)[0]
    first, second = _linear(gated, weights, x, norm, residual, masks)
    return first, second


type _Saved = Callable | tuple[Array, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    gated: bool,
    weights: tuple[Array, ...],
    x: Array,
    norm: Norm | None,
    residual: Array | None,
    active: tuple[Array, ...] | None,
) -> tuple[Array, ...]:
    """By the kernel if it takes the arguments, else by the specification; differentiated as the specification is."""
    operand = x.astype(weights[0].dtype) if _is_plain(gated, weights, norm, residual) else x
    scale, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    refusals = {"native": lambda: native.linear_refusal(*weights, operand, scale, residual)}
    if resolve("auto", refusals) != "native":
        return _specification(gated, weights, x, norm, residual, active)
    residual = None if residual is None else _flat(residual)
    found = native.linear(weights, _flat(operand), scale, eps, residual, gated, active)
    return tuple(y.reshape(y.shape[0], *x.shape[1:]).astype(x.dtype) for y in found)


def _specification(
    gated: bool,
    weights: tuple[Array, ...],
    x: Array,
    norm: Norm | None,
    residual: Array | None,
    active: tuple[Array, ...] | None,
) -> tuple[Array, ...]:
    """What `linear` computes: plain products, and what goes along with them."""
    if _is_plain(gated, weights, norm, residual):
        return (dot(weights[0], x.astype(weights[0].dtype)).astype(x.dtype),)
    h = x if norm is None else rms_norm(norm.weight, x, norm.eps)
    first, *rest = (linear(weight, h) for weight in weights)
    if gated:
        gate, up = jnp.split(first, 2, axis=0)
        first = jax.nn.silu(gate) * up
    if residual is not None:
        first = residual + first if active is None else jnp.where(active[0], residual + first, residual)
    return (first, *rest)


def _is_plain(gated: bool, weights: tuple[Array, ...], norm: Norm | None, residual: Array | None) -> bool:
    return len(weights) == 1 and not gated and norm is None and residual is None


def _flat(x: Float[Array, "i *N"]) -> Float[Array, "i N"]:
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def dot(a: Float[Array, "o i"], b: Float[Array, "i *N"]) -> Float[Array, "o *N"]:
    """`a @ b` by XLA, summed in float32 and returned so."""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _forward(
    gated: bool,
    weights: tuple[Array, ...],
    x: Array,
    norm: Norm | None,
    residual: Array | None,
    active: tuple[Array, ...] | None,
) -> tuple[tuple[Array, ...], _Saved]:
    if not _is_plain(gated, weights, norm, residual):
        return jax.vjp(functools.partial(_specification, gated), weights, x, norm, residual, active)
    saved = weights[0], x.astype(weights[0].dtype), jnp.zeros((0,), x.dtype)
    return _linear(gated, weights, x, norm, residual, active), saved


def _backward(_gated: bool, saved: _Saved, dys: tuple[Array, ...]) -> tuple:
    if callable(saved):
        return saved(dys)
    # XLA:CPU multiplies six times slower when the left operand is read by columns, so the weight is transposed
    # beforehand: the layout makes that a real transpose instead of a column-major view.
    weight, x, like = saved
    transposed = with_layout_constraint(weight.T, Layout(major_to_minor=(0, 1)))
    dy = dys[0].astype(weight.dtype)
    tokens = tuple(range(1, dy.ndim))
    dw = jax.lax.dot_general(dy, x, ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32)
    return (dw.astype(weight.dtype),), dot(transposed, dy).astype(like.dtype), None, None, None


_linear.defvjp(_forward, _backward)


class Best(NamedTuple):
    """What decoding needs of N columns of logits. A NaN is never the largest and adds nothing to the sum.

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
        """The specification: of logits, by XLA."""
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
        """Of columns whose logits have not been computed."""
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
    """`Best` of the float32 logits `weight @ x`, and `logits` with the wanted columns replaced by theirs.

    Args:
        active: columns that are computed, all when None. `Best` of the others may be anything.
        logits: an array to update, in place when donated; None where no column's logits are wanted: the kernel then
            never has them all in memory.
        wanted: columns of `logits` to replace, where active; all active ones when None.
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
