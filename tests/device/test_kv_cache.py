"""The paged cache: writes land where the page table says, and nowhere else."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eejax.core import CacheConfig
from eejax.device.setup import init_cache, page_bytes
from pallas_kernels import PagedKVCache, slots_of, write
from tests.cases import shape_config

PAGES, PAGE = 7, 4
MODEL = shape_config("gqa")  # 4 blocks, 2 K/V heads of 8
TABLE = np.array([[5, 2, 0], [1, 6, 3], [4, 1, 2]], np.int32)


def filled(seed: int = 0) -> PagedKVCache:
    """A cache without a single zero or repeated number."""
    empty = init_cache(MODEL, CacheConfig(PAGES, PAGE), jnp.dtype("float32"))
    k, v = np.random.default_rng(seed).standard_normal((2, *empty.k.shape)).astype(np.float32)
    return PagedKVCache(jnp.asarray(k), jnp.asarray(v))


def new_keys_values(count: int) -> tuple[np.ndarray, np.ndarray]:
    k, v = np.random.default_rng(9).standard_normal((2, MODEL.n_kv_heads, MODEL.head_dim, count)).astype(np.float32)
    return k, v


@functools.partial(jax.jit, static_argnames="layer")
def put(cache, table, positions, valid, k, v, *, layer):
    return write(cache, layer, slots_of(cache, table, positions, valid), k, v)


def test_slots_are_pages_and_offsets_of_positions():
    cache = init_cache(MODEL, CacheConfig(PAGES, PAGE), jnp.dtype("float32"))
    slots = slots_of(cache, jnp.asarray(TABLE), jnp.array([0, 7, 8]), jnp.ones(3, bool))
    assert slots.pages.tolist() == [5, 6, 2]
    assert slots.offsets.tolist() == [0, 3, 0]


def test_slots_of_invalid_rows_lie_outside_the_cache():
    cache = init_cache(MODEL, CacheConfig(PAGES, PAGE), jnp.dtype("float32"))
    slots = slots_of(cache, jnp.asarray(TABLE), jnp.array([3, 10**6, 4]), jnp.array([False, False, True]))
    assert slots.pages.tolist() == [PAGES, PAGES, 1]  # padding may have any position


@pytest.mark.parametrize("layer", [0, 2])
def test_writes_change_their_slots_and_nothing_else(layer):
    before, (k, v) = filled(), new_keys_values(3)
    valid = np.array([True, False, True])
    after = put(before, TABLE, np.array([5, 2, 0], np.int32), valid, k, v, layer=layer)
    for name, values in (("k", k), ("v", v)):
        expected = np.array(getattr(before, name))
        expected[layer, 2, :, 1] = values[..., 0]  # position 5: the row's second page, second slot
        expected[layer, 4, :, 0] = values[..., 2]
        np.testing.assert_array_equal(getattr(after, name), expected, err_msg=name)


def test_nothing_changes_when_no_row_is_valid():
    before, (k, v) = filled(), new_keys_values(3)
    after = put(before, TABLE, np.array([5, 2, 0], np.int32), np.zeros(3, bool), k, v, layer=0)
    np.testing.assert_array_equal(after.k, before.k)
    np.testing.assert_array_equal(after.v, before.v)


def test_values_are_stored_in_the_dtype_of_the_cache():
    cache = init_cache(MODEL, CacheConfig(PAGES, PAGE), jnp.dtype("bfloat16"))
    k, v = new_keys_values(3)
    after = put(cache, TABLE, np.array([0, 0, 0], np.int32), np.ones(3, bool), k, v, layer=1)
    assert after.k.dtype == after.v.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after.k[1, 5, :, 0], k[..., 0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(after.v[1, 4, :, 0], v[..., 2].astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["gqa", "mha", "odd_sizes", "block_own"])
def test_page_bytes_are_what_a_page_takes(shape, dtype):
    model = shape_config(shape)
    cache = init_cache(model, CacheConfig(PAGES, PAGE), jnp.dtype(dtype))
    assert page_bytes(model, PAGE, jnp.dtype(dtype).itemsize) == (cache.k.nbytes + cache.v.nbytes) / PAGES
    blocks = model.n_layers + (len(model.exits.layers) if shape == "block_own" else 0)
    assert cache.k.shape == (blocks, PAGES, model.n_kv_heads, PAGE, model.head_dim)
    assert not np.any(np.asarray(cache.k, np.float32)) and not np.any(np.asarray(cache.v, np.float32))
