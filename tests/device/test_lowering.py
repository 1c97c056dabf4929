"""The kernels lower for a GPU where there is none, and leave no other operation of XLA's on the cache."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels

PAGES, PAGE, WIDTH, ROWS = 512, 64, 40, 8

HEADS = {
    "Llama-2-7B": (32, 32, 32, 128),
    "Llama-3-8B": (32, 32, 8, 128),
    "Llama-3.2-1B": (16, 32, 8, 64),
    "Qwen3-0.6B": (28, 16, 8, 128),
}
"""Blocks, query heads, key/value heads, head dimension."""


def lowered(blocks: int, heads: int, kv_heads: int, dim: int, dtype=jnp.bfloat16, **options) -> list[str]:
    """The lines of one call's StableHLO."""
    cache = jax.ShapeDtypeStruct((blocks, PAGES, kv_heads, PAGE, dim), dtype)
    q = jax.ShapeDtypeStruct((ROWS, heads, dim), dtype)
    table, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((ROWS, WIDTH), (ROWS,)))

    def call(q, k_pages, v_pages, table, lengths):
        pages = pallas_kernels.PagedKVCache(k_pages, v_pages)
        return pallas_kernels.paged_attention(q, pages, table, lengths, layer=blocks - 1, **options)

    trace = jax.jit(call).trace(q, cache, cache, table, lengths)
    return trace.lower(lowering_platforms=("cuda",)).as_text().splitlines()


def sizes(line: str) -> list[int]:
    """Elements of each array that a line of StableHLO names."""
    return [math.prod(map(int, shape.split("x"))) for shape in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", line)]


def on_the_cache(lines: list[str], elements: int) -> set[str]:
    """Operations that read or make something of `elements` elements; functions' own lines aside."""
    found = set()
    for line in lines:
        operation = re.search(r"(?:stablehlo\.|call )(@?\w+)(?: @(\w+))?", line)
        if operation and max(sizes(line), default=0) >= elements:
            found.add(operation[2] or operation[1])
    return found


@pytest.mark.parametrize("options", [{}, {"sliding_window": 1000}], ids=["all", "window"])
@pytest.mark.parametrize("model", HEADS)
def test_attention_reads_the_cache_where_it_is(model, options):
    """One kernel is given the whole cache, seen as a row of single heads' pages: no gather, slice or copy is left."""
    blocks, _, kv_heads, dim = HEADS[model]
    one_block = PAGES * kv_heads * PAGE * dim
    lines = lowered(*HEADS[model], implementation="mosaic", **options)
    # The kernel is in a function of its own, which all blocks call.
    assert on_the_cache(lines, one_block) == {"reshape", "@_attend_to_pieces", "mosaic_gpu_v2"}
    kernels = [line for line in lines if "custom_call" in line]
    assert len(kernels) == 1
    assert sorted(sizes(kernels[0]))[-2:] == [blocks * one_block] * 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 96), (8, 8, 256), (64, 1, 64)])
def test_other_heads_and_types_lower(dtype, heads, kv_heads, dim):
    lines = lowered(2, heads, kv_heads, dim, dtype, implementation="mosaic")
    assert sum("mosaic_gpu_v2" in line for line in lines) == 1


def test_what_xla_leaves_on_the_cache_is_noticed():
    """The implementation for other devices gathers pages, so that the test above can fail."""
    _, _, kv_heads, dim = HEADS["Llama-3-8B"]
    lines = lowered(*HEADS["Llama-3-8B"], implementation="xla")
    assert "gather" in on_the_cache(lines, PAGES * kv_heads * PAGE * dim)
