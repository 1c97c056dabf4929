"""Paged attention as `bench kernels` times it: one query for each row over pages that lie scattered in a large pool."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.kernels.timing import (
    MAX_SETS,
    Repetitions,
    Step,
    Timing,
    compare,
    judge,
    one_line,
    relative_error,
    sets_for,
    turns_for,
)
from pallas_kernels import Implementation, PagedKVCache, paged_attention

CUDNN = (
    "cuDNN: not callable. jax.nn.dot_product_attention(implementation='cudnn') takes no page table, and JAX's paged "
    "variant is private (jax._src.cudnn)"
)
PATTERN_PAGES = 251
"""Random pages that a pool repeats. A prime, so that neighbours and powers of two never hold the same."""
DEPENDENCE = 1e-3
"""Share of a turn's result in the next one's queries."""


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One cell of the sweep. `active` rows of `batch` take part, each with `context` tokens."""

    batch: int
    context: int
    heads: int
    kv_heads: int
    active: int
    head_dim: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"
    max_sets: int = MAX_SETS

    @property
    def pages_per_row(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def bytes(self) -> int:
        """What must move: K and V of the active rows, queries and results of all."""
        kv = 2 * self.active * self.context * self.kv_heads
        return jnp.dtype(self.dtype).itemsize * self.head_dim * (kv + 2 * self.batch * self.heads)

    @property
    def sets(self) -> int:
        """Disjoint sets of pages that calls take in turn."""
        return sets_for(replace(self, active=self.batch).bytes, self.max_sets)

    @property
    def pool_bytes(self) -> int:
        """Both pools."""
        pages = self.sets * self.batch * self.pages_per_row
        return 2 * pages * self.page_size * self.kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize


def cases(
    batches: Sequence[int], contexts: Sequence[int], heads: Sequence[tuple[int, int]], shares: Sequence[float]
) -> Iterator[list[AttentionCase]]:
    """Groups that differ in their active rows alone, all of them first; shares that round to the same are one case."""
    for batch in batches:
        for context in contexts:
            for query, kv in heads:
                counts = dict.fromkeys(max(1, round(share * batch)) for share in sorted(shares, reverse=True))
                yield [AttentionCase(batch, context, query, kv, active) for active in counts]


def make_data(case: AttentionCase, seed: int) -> dict[str, jax.Array]:
    """Pools of random pages, permuted page tables, queries, lengths.

    Returns:
        `k`, `v` [1, P, K, S, C]; `tables` [R, B, M] for R sets of pages; `q` [R, B, H, C]; `lengths` [B].
    """
    sets, rows, width = case.sets, case.batch, case.pages_per_row
    pages, dtype = sets * rows * width, jnp.dtype(case.dtype)
    shape = (case.kv_heads, case.page_size, case.head_dim)
    keys = jax.random.split(jax.random.key(seed), 3)

    def pool(key: jax.Array) -> jax.Array:
        pattern = jax.random.normal(key, (min(pages, PATTERN_PAGES), *shape), dtype)
        return pattern[jnp.arange(pages) % len(pattern)][None]

    make = jax.jit(pool)
    ids = np.random.default_rng(seed).permutation(pages).astype(np.int32)
    return {
        "k": make(keys[0]),
        "v": make(keys[1]),
        "tables": jnp.asarray(ids.reshape(sets, rows, width)),
        "q": jax.random.normal(keys[2], (sets, rows, case.heads, case.head_dim), dtype),
        "lengths": jnp.full((rows,), case.context, jnp.int32),
    }


def active_rows(case: AttentionCase, seed: int) -> jax.Array:
    """Which rows take part, drawn at random: bool [B]."""
    return jnp.asarray(np.random.default_rng(seed).permutation(case.batch) < case.active)


type State = tuple[jax.Array, jax.Array]
"""The latest result, and the float32 sum of those before it: [B, H, C]."""


@functools.cache
def _step(implementation: Implementation | None) -> Step[State, dict[str, jax.Array]]:
    """One turn: queries of the next set, which need the last result; None leaves attention out."""

    def step(turn: jax.Array, state: State, data: dict[str, jax.Array]) -> State:
        last, total = state
        number = turn % len(data["tables"])
        q, table = (jax.lax.dynamic_index_in_dim(data[name], number, keepdims=False) for name in ("q", "tables"))
        total = total + last.astype(jnp.float32)
        q = q + (DEPENDENCE * last.astype(jnp.float32)).astype(q.dtype)
        if implementation is None:
            # The page table takes part, or reading it would be left out as well.
            out = q + table[:, :1, None].astype(q.dtype)
        else:
            out = paged_attention(
                q,
                PagedKVCache(data["k"], data["v"]),
                table,
                data["lengths"],
                layer=0,
                active=data["active"],
                implementation=implementation,
            )
        return out, total  # the sum waits for the next turn, where it shares a kernel with the queries

    return step


def measure(
    case: AttentionCase,
    data: dict[str, jax.Array],
    implementations: Sequence[str],
    bandwidth: float,
    *,
    repeats: int,
    profile: bool,
    seed: int,
    turns: int | None = None,
) -> dict[str, Timing]:
    """Every implementation of one case, over data that `make_data` made for its group."""
    data = {**data, "active": active_rows(case, seed)}
    turns = turns or turns_for(replace(case, active=case.batch).bytes, bandwidth)
    shape = data["q"].shape[1:]
    state = jnp.zeros(shape, data["q"].dtype), jnp.zeros(shape)
    names: dict[str, Implementation] = {"mosaic": "mosaic", "xla": "xla"}
    steps = {name: _step(names[name]) for name in implementations if name in names}
    found = compare(
        steps,
        _step(None),
        state,
        data,
        repetitions=Repetitions(turns, repeats),
        result=lambda state: state[1] + state[0].astype(jnp.float32),
        profiled=("mosaic",) if profile else (),
    )
    if "torch" in implementations:
        found["torch"] = torch_attention(case, data, turns, repeats)
    return found


def torch_attention(case: AttentionCase, data: dict[str, jax.Array], turns: int, repeats: int) -> Timing:
    """PyTorch's `scaled_dot_product_attention` over the same keys and values, laid out row by row without pages.

    The calls of one program are captured in a CUDA graph, and events of the device time its replays.
    """
    if case.active < case.batch:
        return Timing(reason="torch: every row of its batch takes part")
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return Timing(reason="torch: not installed")
    if not torch.cuda.is_available():
        return Timing(reason="torch: finds no GPU")
    try:
        return _torch_on_gpu(torch, case, data, turns, repeats)
    except Exception as error:
        return Timing(reason=f"torch: {one_line(error)}")


def _torch_on_gpu(torch: Any, case: AttentionCase, data: dict[str, jax.Array], turns: int, repeats: int) -> Timing:
    rows = jax.jit(_row_by_row)
    k, v = (rows(data[name], data["tables"])[:, :, :, : case.context] for name in ("k", "v"))
    q = data["q"][:, :, :, None]
    tensors = [torch.from_dlpack(jax.block_until_ready(one)) for one in (q, k, v)]
    attend, grouped = torch.nn.functional.scaled_dot_product_attention, case.heads != case.kv_heads

    def call(turn: int) -> Any:
        return attend(*(one[turn % len(one)] for one in tensors), enable_gqa=grouped)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        results = [call(turn) for turn in range(len(q))]  # kernels are loaded before anything is captured
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = [call(turn) for turn in range(turns)]
        samples = []
        for _ in range(repeats + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            stream.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        mine = jnp.asarray(results[0].float().cpu().numpy())[:, :, 0]
    del kept
    args = data["q"][0], PagedKVCache(data["k"], data["v"]), data["tables"][0], data["lengths"]
    error = relative_error(mine, paged_attention(*args, layer=0, implementation="xla"))
    return judge(Timing(float(np.median(samples[1:])) / turns, None, error))


def _row_by_row(pool: jax.Array, tables: jax.Array) -> jax.Array:
    """Pages [1, P, K, S, C] and tables [R, B, M] as [R, B, K, M * S, C]."""
    pages = jnp.moveaxis(pool[0][tables], 3, 2)  # [R, B, K, M, S, C]
    return pages.reshape(*pages.shape[:3], -1, pages.shape[-1])
