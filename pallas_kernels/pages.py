"""The door to the paged KV cache: a token's slot in it, and writing K and V into slots."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.implementation import resolve
from pallas_kernels.native import ops as native


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PagedKVCache:
    """Keys and values of all blocks that keep them, in pages. Donate it to the function that returns its successor."""

    k: Float[Array, "L P K S C"]
    v: Float[Array, "L P K S C"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Slots:
    """Where tokens' K and V go: page ids and slots within them. A page id of P or above drops the write."""

    pages: Int[Array, " N"]
    offsets: Int[Array, " N"]

    def only(self, valid: Bool[Array, " N"], cache: PagedKVCache) -> Slots:
        """These slots, with the writes of tokens that are not `valid` dropped as well."""
        return Slots(jnp.where(valid, self.pages, cache.k.shape[1]), self.offsets)


def slots_of(
    cache: PagedKVCache,
    page_table: Int[Array, "N M"],
    positions: Int[Array, " N"],
    valid: Bool[Array, " N"] | None = None,
) -> Slots:
    """Slots of the tokens at `positions`, one row of the page table each; where not `valid`, writes are dropped."""
    page_size = cache.k.shape[3]
    # Padding may have any position: clip the look-up, whose result is not used then.
    pages = jnp.take_along_axis(page_table, (positions // page_size)[:, None], axis=1, mode="clip")[:, 0]
    slots = Slots(pages, positions % page_size)
    return slots if valid is None else slots.only(valid, cache)


def write(
    cache: PagedKVCache, layer: int, slots: Slots, k: Float[Array, "K C N"], v: Float[Array, "K C N"]
) -> PagedKVCache:
    """The cache with `k` and `v` of N tokens written into block `layer`'s pages; in place when donated."""

    def put(pages: Array, values: Array) -> Array:
        values = values.astype(pages.dtype)
        if resolve("auto", {"native": lambda: native.write_refusal(pages, values)}) == "native":
            return native.write(pages, layer, slots.pages, slots.offsets, values)
        return pages.at[layer, slots.pages, :, slots.offsets].set(jnp.moveaxis(values, -1, 0), mode="drop")

    return PagedKVCache(put(cache.k, k), put(cache.v, v))
