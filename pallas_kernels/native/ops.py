"""The native kernels as JAX functions. What they do not take, `*_refusal` says."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.implementation import Shaped
from pallas_kernels.native import library

PANEL = 32
"""Columns that scratch is rounded up to, and floats that one column of it may be longer: those of the widest panel."""
VECTOR = 16
"""Floats of the widest vector."""
MAX_HEAD_COLUMNS = 1024
"""Columns that `head` takes: tiles of logits are on the stack."""
MAX_DIM = 256
"""Largest head dimension, as in `kernels.h`."""


def linear_refusal(weight: Float[Shaped, "o i"], *others: Shaped | None) -> str | None:
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
    active: Bool[Array, " N"] | None = None,
) -> Float[Array, "o N"]:
    """`residual + weight @ x`, of columns that went through an RMS norm where `norm` is its weight.

    Args:
        gated: the upper half of the weight's rows is SwiGLU's gate: `silu(upper @ x) * (lower @ x)`, of `o / 2` rows.
            Without `residual`.
        active: columns that are computed, all when None. The others are the residual's, or anything without one.
    """
    depth, count = x.shape
    rows = weight.shape[0] // (2 if gated else 1)
    if not (rows and depth and count):
        return jnp.zeros((rows, count), jnp.float32) if residual is None else residual
    return _call_linear(weight, x, norm, eps, residual=residual, gated=gated, active=active)[0]


def linear_pair(
    first: Float[Array, "o i"],
    second: Float[Array, "p i"],
    x: Float[Array, "i N"],
    norm: Float[Array, " i"],
    eps: float,
    active: tuple[Bool[Array, " N"], Bool[Array, " N"]] | None = None,
) -> tuple[Float[Array, "o N"], Float[Array, "p N"]]:
    """`first @ x` and `second @ x`, of columns that go through an RMS norm once.

    Args:
        active: columns that are computed in the first product and in the second, all when None. The others may be
            anything.
    """
    if not (first.size and second.size and x.size):
        return linear(first, x, norm, eps), linear(second, x, norm, eps)
    mine, others = active or (None, None)
    one, other, _ = _call_linear(first, x, norm, eps, second=second, active=mine, active_in_second=others)
    return one, other


def _scratch_floats(depth: int, count: int) -> int:
    """A float of x, or three bfloat16, and a column's end, for each column."""
    return _padded(count) * (_padded(depth) * 3 // 2 + PANEL)


def _padded(size: int) -> int:
    return -(-size // PANEL) * PANEL


def _call_linear(
    weight: Array,
    x: Array,
    norm: Array | None,
    eps: float,
    *,
    residual: Array | None = None,
    second: Array | None = None,
    gated: bool = False,
    active: Array | None = None,
    active_in_second: Array | None = None,
) -> Sequence[Array]:
    (depth, count), rows = x.shape, weight.shape[0] // (2 if gated else 1)
    # Columns of a second product, and results of a gated one, stand by themselves where not all are computed.
    parts = 1 if active is None else 2
    scratch = _scratch_floats(depth, count) * (parts if second is not None else 1)
    scratch += rows * (count if active is None else 2 * _padded(count)) if gated else 0
    others = 0 if second is None else second.shape[0]
    shapes = [(rows, count), (others, count), (scratch + 2 * count,)]
    aliases = None if active is None or residual is None else {3: 0}
    call = jax.ffi.ffi_call("eejax_linear", _floats(*shapes), input_output_aliases=aliases, vmap_method="sequential")
    none = jnp.zeros((0,), jnp.float32)
    return call(
        weight,
        x,
        none if norm is None else norm,
        none if residual is None else residual,
        _flags(active),
        none if second is None else second,
        _flags(active_in_second),
        eps=np.float64(eps),
        gated=np.int64(gated),
    )


def _floats(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def _flags(active: Array | None) -> Array:
    return jnp.zeros((0,), bool) if active is None else active


def head_refusal(weight: Float[Shaped, "V D"], x: Float[Shaped, "D N"]) -> str | None:
    """Why `head` does not take these; None if it does. Shapes and dtypes are enough."""
    if x.shape[1] > MAX_HEAD_COLUMNS:
        return f"it takes {MAX_HEAD_COLUMNS} columns, and these are {x.shape[1]}"
    return linear_refusal(weight, x)


def head(
    weight: Float[Array, "V D"],
    x: Float[Array, "D N"],
    active: Bool[Array, " N"] | None,
    logits: Float[Array, "V N"] | None,
    wanted: Bool[Array, " N"] | None,
    confidence: bool,
) -> tuple[Array, ...]:
    """The largest of each column of `weight @ x`, its row, the second largest, the sum of exponentials, and `logits`.

    Args:
        active: columns that are computed, all when None; the others yield zeros.
        logits, wanted: where logits of those active columns that are `wanted` are written; in place where XLA needs the
            old ones no more.
        confidence: whether the second largest and the sum are asked for; they may be anything otherwise.
    """
    (rows, depth), count = weight.shape, x.shape[1]
    if logits is None:
        logits, wanted = jnp.zeros((0, count), jnp.float32), None
    found = 4 * (rows // 16 + 1) * (-(-count // VECTOR) * VECTOR)
    each, scratch = (count,), _scratch_floats(depth, count) + count
    shapes = _floats(logits.shape, each, each, each, each, (found,), (scratch,))
    shapes[2] = jax.ShapeDtypeStruct(each, jnp.int32)
    call = jax.ffi.ffi_call("eejax_head", shapes, input_output_aliases={3: 0}, vmap_method="sequential")
    logits, *best = call(weight, x, _flags(active), logits, _flags(wanted), confidence=np.int64(confidence))[:5]
    return (*best, logits)


def attention_refusal(q: Float[Shaped, "N H C"], k_pages: Float[Shaped, "L P K S C"]) -> str | None:
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
    rows: Int[Array, " N"] | None,
    positions: Int[Array, " N"],
    *,
    layer: int,
    scale: float | None,
    sliding_window: int | None,
) -> Float[Array, "N H C"]:
    """See `pallas_kernels.api.ragged_paged_attention`. Token i is of row i where `rows` is None."""
    if not q.size:
        return q
    rows = jnp.zeros((0,), jnp.int32) if rows is None else rows
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


def write_refusal(pages: Float[Shaped, "L P K S C"], values: Float[Shaped, "K C N"]) -> str | None:
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
