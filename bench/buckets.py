"""What a block costs by the number of rows: `python -m bench buckets --random llama-125m`.

Row compaction pays as soon as a block over a smaller bucket takes less time than over the larger one, by more than the
gathering costs, which is a few microseconds a segment. This measures a pass through all blocks of a model, over the
paged cache, for every bucket that a segment may run in, the buckets in turn; figures are medians per block.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.common import (
    ModelOptions,
    at_least,
    dtype_of,
    finish,
    median,
    model_facts,
    new_parser,
    options_of,
)
from bench.cost import ModelCost
from eejax.buckets import bucket_of, segment_buckets
from eejax.config import CacheConfig, ModelConfig
from eejax.kv_cache import PagedKVCache, init_cache, slots_of, write
from eejax.model import bind
from pallas_kernels import paged_attention

PASSES = 4
"""Passes through the network in one timed call."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = new_parser("buckets", __doc__)
    found.add_argument("--context", type=at_least(1), default=128, help="tokens that every row has (%(default)s)")
    found.add_argument("--max-num-seqs", type=at_least(1), default=32, help="rows of the largest batch (%(default)s)")
    found.add_argument("--num-iters", type=at_least(1), default=9, help="timed calls of each bucket (%(default)s)")
    return found


def through_all_blocks(
    config: ModelConfig,
    params: dict,
    cache: PagedKVCache,
    x: Float[Array, "D B"],
    positions: Int[Array, " B"],
    page_table: Int[Array, "B M"],
) -> PagedKVCache:
    """`PASSES` times every block, one query per row over its own pages."""
    model = bind(config, params)
    slots = slots_of(cache, page_table, positions, jnp.ones(positions.shape, bool))

    def once(_: Array, carry: tuple[Array, PagedKVCache]) -> tuple[Array, PagedKVCache]:
        x, cache = carry
        for layer, block in enumerate(model.blocks):

            def attend(
                q: Array, k: Array, v: Array, cache: PagedKVCache, layer: int = layer
            ) -> tuple[Array, PagedKVCache]:
                cache = write(cache, layer, slots, k, v)
                o = paged_attention(jnp.moveaxis(q, -1, 0), cache.k, cache.v, page_table, positions + 1, layer=layer)
                return jnp.moveaxis(o, 0, -1), cache

            x, _, cache = block(x, positions, model.frequencies(), attend, cache)
            x = x / jnp.max(jnp.abs(x))  # random weights would let it grow out of range
        return x, cache

    return jax.lax.fori_loop(0, PASSES, once, (x, cache))[1]


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    chosen = ModelOptions.of(args)
    llm = chosen.build(max_model_len=args.context + 1, max_num_seqs=1)
    config, params, dtype = llm.config.model, llm.engine.runner.params, dtype_of(llm)
    top, width = bucket_of(args.max_num_seqs), -(-args.context // args.page_size)
    sizes = sorted({size for power in range(top.bit_length()) for size in segment_buckets(1 << power, True)})
    cache = init_cache(config, CacheConfig(top * width, args.page_size), dtype)
    run = jax.jit(functools.partial(through_all_blocks, config), donate_argnums=1)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for i in range(args.num_iters + 1):
        for size in sizes:
            x = jnp.ones((config.hidden_size, size), dtype)
            positions = jnp.full((size,), args.context - 1, jnp.int32)
            table = jnp.asarray(np.arange(size * width, dtype=np.int32).reshape(size, width))
            start = time.perf_counter()
            cache = jax.block_until_ready(run(params, cache, x, positions, table))
            if i:  # the first call compiles
                times[size].append((time.perf_counter() - start) / PASSES / config.n_layers)
    cost = ModelCost.of(config, dtype.itemsize)
    blocks = {
        size: {"ms": 1e3 * median(found), "calls_ms": [1e3 * one for one in found]} for size, found in times.items()
    }
    result = {
        "bench": "buckets",
        **machine.provenance(),
        "model": model_facts(llm, chosen.name, cost),
        "options": options_of(args),
        "blocks": blocks,
    }
    _show(result)
    finish(result, args.output_json)


def _show(result: dict[str, Any]) -> None:
    blocks = result["blocks"]
    table = Table()
    for column in ("rows", "ms a block", "us a row", "of the largest"):
        table.add_column(column, justify="right")
    largest = blocks[max(blocks)]["ms"]
    for size, found in blocks.items():
        ms = found["ms"]
        table.add_row(str(size), f"{ms:.3f}", f"{1e3 * ms / size:.1f}", f"{ms / largest:.2f}")
    console = Console(highlight=False, width=120)
    name, context = result["model"]["name"], result["options"]["context"]
    console.print(f"buckets: {name}, context {context}, medians of {result['options']['num_iters']}", style="bold")
    console.print(table)
