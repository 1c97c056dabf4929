"""The native kernels as JAX functions; each `*_refusal` says why a kernel does not take its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.implementation import Shaped
from pallas_kernels.native import library

PANEL = 32
"""Columns of the widest panel. Scratch is rounded up to whole panels, and each column of it has room for one more."""
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
    weights: Sequence[Float[Array, "_ i"]],
    x: Float[Array, "i N"],
    norm: Float[Array, " i"] | None = None,
    eps: float = 0.0,
    residual: Float[Array, "o N"] | None = None,
    gated: bool = False,
    active: Sequence[Bool[Array, " N"]] | None = None,
) -> Sequence[Float[Array, "_ N"]]:
    """See `pallas_kernels.products.linear`: one or two products of the same `x`, and `active` columns of each."""
    depth, count = x.shape
    rows = weights[0].shape[0] // (2 if gated else 1)
    if not (x.size and all(weight.size for weight in weights)):
        if len(weights) == 2:
            return [linear([weight], x, norm, eps)[0] for weight in weights]
        return [jnp.zeros((rows, count), jnp.float32) if residual is None else residual]
    first, second, *_ = (*weights, None)
    active_in_first, active_in_second, *_ = (*(active or ()), None, None)
    # Where not all columns are computed, those of the second product, and results of a gated one, are collected apart.
    scratch = _scratch_floats(depth, count) * (2 if active and second is not None else 1)
    scratch += rows * (2 * _padded(count) if active else count) if gated else 0
    second = _or_empty(second)
    call = jax.ffi.ffi_call(
        "eejax_linear",
        _floats((rows, count), (second.shape[0], count), (scratch + 2 * count,)),
        input_output_aliases={3: 0} if active and residual is not None else None,
        vmap_method="sequential",
    )
    return call(
        first,
        x,
        _or_empty(norm),
        _or_empty(residual),
        _or_empty(active_in_first, bool),
        second,
        _or_empty(active_in_second, bool),
        eps=np.float64(eps),
        gated=np.int64(gated),
    )[: len(weights)]


def _scratch_floats(depth: int, count: int) -> int:
    """Of x as the kernel copies it: a float for each number, or three bfloat16, and the room after each column."""
    return _padded(count) * (_padded(depth) * 3 // 2 + PANEL)


def _padded(size: int) -> int:
    return -(-size // PANEL) * PANEL


def _floats(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def _or_empty(array: Array | None, dtype: DTypeLike = np.float32) -> Array | np.ndarray:
    """The array, or one of no elements in place of None: kernels have a fixed number of operands."""
    return np.zeros((0,), dtype) if array is None else array


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
    """See `pallas_kernels.products.head`; columns that are not active yield zeros.

    Returns:
        The largest of each column of `weight @ x`, its row, the second largest, the sum of exponentials; `logits`,
        updated in place where XLA no longer needs the old ones.
    """
    (rows, depth), count = weight.shape, x.shape[1]
    if logits is None:
        logits, wanted = jnp.zeros((0, count), jnp.float32), None
    found = 4 * (rows // 16 + 1) * (-(-count // VECTOR) * VECTOR)
    each, scratch = (count,), _scratch_floats(depth, count) + count
    shapes = _floats(logits.shape, each, each, each, each, (found,), (scratch,))
    shapes[2] = jax.ShapeDtypeStruct(each, jnp.int32)
    call = jax.ffi.ffi_call("eejax_head", shapes, input_output_aliases={3: 0}, vmap_method="sequential")
    logits, *best = call(
        weight,
        x,
        _or_empty(active, bool),
        logits,
        _or_empty(wanted, bool),
        confidence=np.int64(confidence),
    )[:5]
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
    sliding_window: int | None,
) -> Float[Array, "N H C"]:
    """See `pallas_kernels.api.ragged_paged_attention`. Token i is of row i where `rows` is None."""
    if not q.size:
        return q
    integers = (array.astype(jnp.int32) for array in (page_table, _or_empty(rows, np.int32), positions))
    # A window that holds all that a page table has room for is none, and might not fit the kernel's integers.
    room = page_table.shape[1] * k_pages.shape[3]
    window = 0 if sliding_window is None or sliding_window >= room else sliding_window
    # The kernel has the model's order, tokens last: XLA removes this transpose where the caller made the opposite one.
    q = jnp.moveaxis(q, 0, -1)
    found = jax.ffi.ffi_call("eejax_paged_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))(
        q,
        k_pages,
        v_pages,
        *integers,
        layer=np.int64(layer),
        scale=np.float64(q.shape[1] ** -0.5),
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
    """See `pallas_kernels.pages.write`. In place where XLA no longer needs the old pages."""
    if not values.size:
        return pages
    call = jax.ffi.ffi_call("eejax_write", jax.ShapeDtypeStruct(pages.shape, pages.dtype), input_output_aliases={0: 0})
    return call(pages, page_ids.astype(jnp.int32), offsets.astype(jnp.int32), values, layer=np.int64(layer))
