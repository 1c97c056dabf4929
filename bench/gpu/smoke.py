"""One kernel at one shape, compared with XLA in float32: `python -m bench.gpu.smoke attention llama-3-8b`.

Each runs in a process of its own, since a kernel that aborts, hangs or writes out of bounds ends its process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.record import report
from bench.kernels.command import interpreted
from bench.kernels.fill import MODELS
from bench.kernels.timing import TOLERANCE, relative_error
from eejax.core import ModelConfig
from pallas_kernels import ExitedTokens, Implementation, KVProjection, PagedKVCache, kv_fill, paged_attention

FAULT = "EEJAX_GPU_CHECK_FAULT"
"""Environment variable for tests of the check: kernel and model whose process aborts."""
PAGE = 64


def pools(shape: tuple[int, ...], used: np.ndarray, seed: int) -> list[jax.Array]:
    """K and V pages in bfloat16, random where `used`, NaN elsewhere."""
    keys = jax.random.split(jax.random.key(seed))
    hole = jnp.asarray(~used)[None, :, None, None, None]
    return [jnp.where(hole, jnp.nan, jax.random.normal(key, shape)).astype(jnp.bfloat16) for key in keys]


def attention(config: ModelConfig, width: int, seed: int) -> float:
    """Rows with 0 tokens, 1, about a page, and up to `width` pages. Returns the relative error."""
    longest = width * PAGE
    lengths = np.array([0, 1, PAGE - 1, PAGE, PAGE + 1, longest - 7, longest], np.int32)
    count = width * len(lengths)
    table = np.random.default_rng(seed).permutation(count).astype(np.int32).reshape(len(lengths), width)
    used = np.zeros(count, bool)
    for row, length in zip(table, lengths, strict=True):
        used[row[: -(-length // PAGE)]] = True
    shape = (2, count, config.n_kv_heads, PAGE, config.head_dim)
    k, v = pools(shape, used, seed)
    q = jax.random.normal(jax.random.key(seed + 1), (len(lengths), config.n_heads, config.head_dim), jnp.bfloat16)
    places = jnp.asarray(table), jnp.asarray(lengths)

    def run(name: Implementation, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        call = jax.jit(lambda q, cache: paged_attention(q, cache, *places, layer=1, implementation=name))
        return call(q, PagedKVCache(k, v))

    found = run("mosaic", q, k, v)
    expected = run("xla", *(one.astype(jnp.float32) for one in (q, k, v)))
    if np.asarray(found[0]).any():
        raise AssertionError("a row without tokens must yield zeros")
    return relative_error(found, expected)


def fill(config: ModelConfig, seed: int) -> float:
    """Tokens that lack K and V in all blocks, in some, in none. Returns the relative error of what is written."""
    dim, heads, size = config.head_dim, config.n_kv_heads, config.hidden_size
    layers = (2, 0, 1)
    positions = np.array([0, 5, PAGE - 1, PAGE, 3, 70], np.int32)
    from_block = np.array([0, 1, 0, 2, 3, 0], np.int32)
    table = np.arange(2 * len(positions), dtype=np.int32).reshape(-1, 2)[::-1]
    keys = jax.random.split(jax.random.key(seed), 2 + 3 * len(layers))

    def weights(number: int) -> KVProjection:
        one, two, three = keys[2 + 3 * number : 5 + 3 * number]
        norm = 1 + 0.1 * jax.random.normal(one, (size,), jnp.bfloat16)
        wkv = size**-0.5 * jax.random.normal(two, (2 * heads * dim, size), jnp.bfloat16)
        k_norm = 1 + 0.1 * jax.random.normal(three, (dim,), jnp.bfloat16) if config.qk_norm else None
        return KVProjection(norm, wkv.astype(jnp.bfloat16), None, k_norm, config.norm_eps)

    blocks = [weights(number) for number in range(len(layers))]
    x = jax.random.normal(keys[0], (size, len(positions)), jnp.bfloat16)
    freq = 1e4 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    pages = jax.random.normal(keys[1], (len(layers), table.size, heads, PAGE, dim), jnp.bfloat16)

    def run(name: Implementation, dtype: jnp.dtype) -> list[np.ndarray]:
        def call(k: jax.Array, v: jax.Array, x: jax.Array, blocks: list[KVProjection]) -> tuple[jax.Array, jax.Array]:
            tokens = ExitedTokens(x, *map(jnp.asarray, (positions, table, from_block)))
            cache = kv_fill(tokens, blocks, PagedKVCache(k, v), layers=layers, freq=freq, implementation=name)
            return cache.k, cache.v

        cast = jax.tree.map(lambda leaf: jnp.array(leaf, dtype), (pages, pages + 1, x, blocks))
        return [np.asarray(one.astype(jnp.float32)) for one in jax.jit(call, donate_argnums=(0, 1))(*cast)]

    before = [np.asarray(one.astype(jnp.float32)) for one in (pages, pages + 1)]
    found, expected = run("mosaic", jnp.dtype(jnp.bfloat16)), run("xla", jnp.dtype(jnp.float32))
    written = np.zeros(pages.shape, bool)
    for token, first in enumerate(from_block):
        for layer in layers[first:]:
            written[layer, table[token, positions[token] // PAGE], :, positions[token] % PAGE] = True
    for old, new in zip(before, found, strict=True):
        if not np.array_equal(old[~written], new[~written]):
            raise AssertionError("a slot was changed that no token owns")
    return max(
        relative_error(jnp.asarray(one[written]), jnp.asarray(other[written]))
        for one, other in zip(found, expected, strict=True)
    )


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 where the error is too large."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke")
    parser.add_argument("kernel", choices=("attention", "fill"))
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--dry-run", action="store_true", help="interpreted")
    args = parser.parse_args(arguments)
    name = f"{args.kernel} {args.model}"
    if os.environ.get(FAULT) == name:
        os.abort()
    start = time.perf_counter()
    with interpreted() if args.dry_run else contextlib.nullcontext():
        config = MODELS[args.model]
        error = fill(config, seed=7) if args.kernel == "fill" else attention(config, 3 if args.dry_run else 20, seed=7)
    right = error <= TOLERANCE
    report("smoke", name, relative_error=error, right=right, seconds=time.perf_counter() - start)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
