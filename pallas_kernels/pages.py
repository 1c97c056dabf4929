"""The door to writes into the paged cache `[L, P, K, S, C]`: a token's slot there, and putting K or V into slots."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.implementation import resolve
from pallas_kernels.native import ops as native


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Slots:
    """Where tokens' K and V go: page ids and slots within them. A page id of P or above drops the write."""

    pages: Int[Array, " N"]
    offsets: Int[Array, " N"]

    def only(self, valid: Bool[Array, " N"], num_pages: int) -> Slots:
        """These slots, with the writes of tokens that are not `valid` dropped as well."""
        return Slots(jnp.where(valid, self.pages, num_pages), self.offsets)


def slots_of(page_table: Int[Array, "N M"], positions: Int[Array, " N"], page_size: int) -> Slots:
    """Slots of the tokens at `positions`, one row of the page table each."""
    # Padding may have any position: clip the look-up, whose result is not used then.
    pages = jnp.take_along_axis(page_table, (positions // page_size)[:, None], axis=1, mode="clip")[:, 0]
    return Slots(pages, positions % page_size)


def write(pages: Float[Array, "L P K S C"], layer: int, slots: Slots, values: Float[Array, "K C N"]) -> Array:
    """`pages` with the `values` of N tokens in block `layer`; in place when donated."""
    values = values.astype(pages.dtype)
    if resolve("auto", {"native": lambda: native.write_refusal(pages, values)}) == "native":
        return native.write(pages, layer, slots.pages, slots.offsets, values)
    values = jnp.moveaxis(values, -1, 0)
    return pages.at[layer, slots.pages, :, slots.offsets].set(values, mode="drop")
