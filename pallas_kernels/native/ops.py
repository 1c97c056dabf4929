"""The native kernels as JAX functions. What they do not take, `*_refusal` says."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.native import library

PANEL = 32
"""Columns that scratch is rounded up to, and floats that one column of it may be longer: those of the widest panel."""
MAX_DIM = 256
"""Largest head dimension, as in `kernels.h`."""


def linear_refusal(weight: Float[Array, "o i"], *others: Array | None) -> str | None:
    """Why `linear` does not take these; None if it does. Dtypes are enough."""
    dtypes = {str(array.dtype) for array in (weight, *others) if array is not None}
    if dtypes != {"float32"}:
        return f"products are float32, and these are {', '.join(sorted(dtypes))}"
    return library.refusal()


def linear(
    weight: Float[Array, "o i"],
    x: Float[Array, "i N"],
    norm: Float[Array, " i"] | None = None,
    eps: float = 0.0,
    residual: Float[Array, "o N"] | None = None,
    gated: bool = False,
) -> Float[Array, "o N"]:
    """`residual + weight @ x`, of columns that went through an RMS norm where `norm` is its weight.

    Args:
        gated: the upper half of the weight's rows is SwiGLU's gate: `silu(upper @ x) * (lower @ x)`, of `o / 2` rows.
            Without `residual`.
    """
    depth, count = x.shape
    rows = weight.shape[0] // (2 if gated else 1)
    if not (rows and depth and count):
        return jnp.zeros((rows, count), jnp.float32) if residual is None else residual
    return _call_linear(weight, x, norm, eps, residual=residual, gated=gated)[0]


def linear_pair(
    first: Float[Array, "o i"],
    second: Float[Array, "p i"],
    x: Float[Array, "i N"],
    norm: Float[Array, " i"],
    eps: float,
) -> tuple[Float[Array, "o N"], Float[Array, "p N"]]:
    """`first @ x` and `second @ x`, of columns that go through an RMS norm once."""
    if not (first.size and second.size and x.size):
        return linear(first, x, norm, eps), linear(second, x, norm, eps)
    one, other, _ = _call_linear(first, x, norm, eps, second=second)
    return one, other


def linear_into(
    old: Float[Array, "o N"], only: Bool[Array, " N"], weight: Float[Array, "o i"], x: Float[Array, "i N"]
) -> Float[Array, "o N"]:
    """`old` with `weight @ x` in those columns `only`. In place where XLA needs `old` no more."""
    if not (old.size and x.size):
        return jnp.where(only, 0.0, old)
    columns = jnp.pad(only.astype(jnp.int32), (0, -only.shape[0] % PANEL))
    return _call_linear(weight, x, None, 0.0, residual=old, only=columns)[0]


def _call_linear(
    weight: Array,
    x: Array,
    norm: Array | None,
    eps: float,
    *,
    residual: Array | None = None,
    only: Array | None = None,
    second: Array | None = None,
    gated: bool = False,
) -> Sequence[Array]:
    (depth, count), rows = x.shape, weight.shape[0] // (2 if gated else 1)
    # A float of x, or three bfloat16, and a column's end; gates.
    columns, column = -(-count // PANEL) * PANEL, -(-depth // PANEL) * PANEL * 3 // 2 + PANEL
    scratch = columns * column + (rows * count if gated else 0)
    others = 0 if second is None else second.shape[0]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, count), (others, count), (scratch,))]
    aliases = None if only is None else {3: 0}
    call = jax.ffi.ffi_call("eejax_linear", shapes, input_output_aliases=aliases, vmap_method="sequential")
    none = jnp.zeros((0,), jnp.float32)
    return call(
        weight,
        x,
        none if norm is None else norm,
        none if residual is None else residual,
        jnp.zeros((0,), jnp.int32) if only is None else only,
        none if second is None else second,
        eps=np.float64(eps),
        gated=np.int64(gated),
    )


def attention_refusal(q: Float[Array, "N H C"], k_pages: Float[Array, "L P K S C"]) -> str | None:
    """Why `attention` does not take these; None if it does. Shapes and dtypes are enough."""
    if q.dtype != jnp.float32 or k_pages.dtype != jnp.float32:
        return f"attention is in float32, and queries are {q.dtype}, pages {k_pages.dtype}"
    if q.shape[-1] > MAX_DIM:
        return f"head dimensions are at most {MAX_DIM}, and this one is {q.shape[-1]}"
    return library.refusal()


def attention(
    q: Float[Array, "N H C"],
    k_pages: Float[Array, "L P K S C"],
    v_pages: Float[Array, "L P K S C"],
    page_table: Int[Array, "R M"],
    rows: Int[Array, " N"],
    positions: Int[Array, " N"],
    *,
    layer: int,
    scale: float | None,
    sliding_window: int | None,
) -> Float[Array, "N H C"]:
    """See `pallas_kernels.api.ragged_paged_attention`."""
    if not q.size:
        return q
    integers = (array.astype(jnp.int32) for array in (page_table, rows, positions))
    # A window that holds all that a page table has room for is none, and might not fit the kernel's integers.
    room = page_table.shape[1] * k_pages.shape[3]
    window = 0 if sliding_window is None or sliding_window >= room else sliding_window
    # The kernel has the model's order, tokens last: where that is what a caller turned round, nothing is left of it.
    q = jnp.moveaxis(q, 0, -1)
    found = jax.ffi.ffi_call("eejax_paged_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))(
        q,
        k_pages,
        v_pages,
        *integers,
        layer=np.int64(layer),
        scale=np.float64(q.shape[1] ** -0.5 if scale is None else scale),
        window=np.int64(window),
    )
    return jnp.moveaxis(found, -1, 0)


def write_refusal(pages: Float[Array, "L P K S C"], values: Float[Array, "K C N"]) -> str | None:
    """Why `write` does not take these; None if it does. Shapes and dtypes are enough."""
    if pages.dtype != jnp.float32 or values.dtype != jnp.float32:
        return f"pages are float32, and these are {pages.dtype}, what is written {values.dtype}"
    if pages.shape[-1] > MAX_DIM:
        return f"head dimensions are at most {MAX_DIM}, and this one is {pages.shape[-1]}"
    return library.refusal()


def write(
    pages: Float[Array, "L P K S C"],
    layer: int,
    page_ids: Int[Array, " N"],
    offsets: Int[Array, " N"],
    values: Float[Array, "K C N"],
) -> Float[Array, "L P K S C"]:
    """See `pallas_kernels.pages.write`. In place where XLA needs the old pages no more."""
    if not values.size:
        return pages
    call = jax.ffi.ffi_call("eejax_write", jax.ShapeDtypeStruct(pages.shape, pages.dtype), input_output_aliases={0: 0})
    return call(pages, page_ids.astype(jnp.int32), offsets.astype(jnp.int32), values, layer=np.int64(layer))


def argmax_refusal(x: Float[Array, "V N"]) -> str | None:
    """Why `argmax` does not take this; None if it does. The dtype is enough."""
    if x.dtype != jnp.float32:
        return f"argmax is of float32, and this is {x.dtype}"
    return library.refusal()


def argmax(x: Float[Array, "V N"]) -> Int[Array, " N"]:
    """The lowest row of each column's largest element; a NaN is larger than nothing."""
    rows, columns = x.shape
    if not x.size:
        return jnp.zeros((columns,), jnp.int32)
    parts = rows // 64 + 1, columns
    shapes = (
        jax.ShapeDtypeStruct((columns,), jnp.int32),
        jax.ShapeDtypeStruct(parts, jnp.float32),
        jax.ShapeDtypeStruct(parts, jnp.int32),
    )
    return jax.ffi.ffi_call("eejax_argmax", shapes, vmap_method="sequential")(x)[0]
