"""KV fill-in as `bench kernels` times it: tokens that left after a third of the blocks, and all blocks above."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from bench.common import random_params
from bench.kernels.timing import MAX_SETS, Repetitions, Step, Timing, compare, sets_for, turns_for
from eejax.core import CacheConfig, ModelConfig
from eejax.device import init_cache
from eejax.model import bind
from pallas_kernels import (
    ExitedTokens,
    Implementation,
    KVProjection,
    PagedKVCache,
    Slots,
    kv_fill,
    paged_attention,
    slots_of,
    write,
)

TOKENS_PER_ROW = 4
"""As many tokens of a row wait for deferred fill-in."""
FIRST_POSITION = 20
STATES = 8
"""Hidden states that the turns take in turn, so that nothing can be computed once for all of them."""


def _blocks(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool) -> ModelConfig:
    """The last two thirds of a model's blocks. The vocabulary does not matter here."""
    return ModelConfig(
        vocab_size=16,
        hidden_size=hidden,
        intermediate_size=mlp,
        n_layers=layers - round(layers / 3),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        tie_embeddings=True,
        qk_norm=qk_norm,
    )


MODELS = {
    "llama-2-7b": _blocks(4096, 11008, 32, 32, 32, 128, False),
    "llama-3-8b": _blocks(4096, 14336, 32, 32, 8, 128, False),
    "llama-3.2-1b": _blocks(2048, 8192, 16, 32, 8, 64, False),
    "qwen3-0.6b": _blocks(1024, 3072, 28, 16, 8, 128, True),
    "tiny": _blocks(64, 128, 3, 2, 1, 64, True),
}


@dataclass(frozen=True, slots=True)
class FillCase:
    """One cell. The first `unneeded` of the blocks are needed by no token."""

    model: str
    tokens: int
    unneeded: int = 0
    page_size: int = 64
    dtype: str = "bfloat16"
    max_sets: int = MAX_SETS

    @property
    def config(self) -> ModelConfig:
        return MODELS[self.model]

    @property
    def weight_bytes(self) -> int:
        """Norms, projections and the keys' norms of the blocks that some token needs."""
        config = self.config
        kv = 2 * config.n_kv_heads * config.head_dim
        block = config.hidden_size * (1 + kv) + (config.head_dim if config.qk_norm else 0)
        return (config.n_layers - self.unneeded) * block * jnp.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """What must move: those weights, the states, and K and V written."""
        config = self.config
        kv = 2 * config.n_kv_heads * config.head_dim * (config.n_layers - self.unneeded)
        return self.weight_bytes + jnp.dtype(self.dtype).itemsize * self.tokens * (config.hidden_size + kv)

    @property
    def sets(self) -> int:
        """Sets of weights that the calls of a turn take one after another."""
        return sets_for(replace(self, unneeded=0).weight_bytes, self.max_sets)

    @property
    def model_bytes(self) -> int:
        """All sets of blocks, with what only running them in full needs."""
        config = self.config
        attention = config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
        block = config.hidden_size * (attention + 3 * config.intermediate_size + 2)
        return self.sets * config.n_layers * block * jnp.dtype(self.dtype).itemsize


def cases(models: Sequence[str], tokens: Sequence[int]) -> Iterator[list[FillCase]]:
    """For each model: every token needs every block; then, once, no token needs the first half of them."""
    for model in models:
        half = MODELS[model].n_layers // 2
        yield [*(FillCase(model, count) for count in tokens), FillCase(model, tokens[0], unneeded=half)]


def make_params(case: FillCase, seed: int) -> dict:
    """Parameters of all sets of blocks, as one deep model."""
    return random_params(_deep(case), jnp.dtype(case.dtype), seed)


def _deep(case: FillCase) -> ModelConfig:
    """The model that has all sets' blocks, one set after another."""
    return replace(case.config, n_layers=case.sets * case.config.n_layers)


type State = tuple[PagedKVCache, jax.Array]
"""The cache, and the sum of what full blocks put out: [D, N] in float32."""


def measure(
    case: FillCase,
    params: dict,
    implementations: Sequence[str],
    bandwidth: float,
    *,
    repeats: int,
    profile: bool,
    seed: int,
    turns: int | None = None,
) -> dict[str, Timing]:
    """Every implementation of one case, over the parameters that `make_params` made for its model."""
    config, dtype, count = case.config, jnp.dtype(case.dtype), case.tokens
    rows = -(-count // TOKENS_PER_ROW)
    number = jnp.arange(count)
    data = {
        "params": params,
        "x": jax.random.normal(jax.random.key(seed), (STATES, config.hidden_size, count), dtype),
        "page_table": (number // TOKENS_PER_ROW)[:, None],
        "positions": FIRST_POSITION + number % TOKENS_PER_ROW,
        "from_block": jnp.full((count,), case.unneeded),
    }
    cache = init_cache(config, CacheConfig(rows, case.page_size), dtype)
    state = cache, jnp.zeros((config.hidden_size, count))
    names: dict[str, Implementation] = {"mosaic": "mosaic", "xla": "xla"}
    steps: dict[str, Step[State, dict[str, Any]]] = {
        name: _fill_step(_deep(case), config.n_layers, names[name]) for name in implementations if name in names
    }
    if "full" in implementations and not case.unneeded:
        steps["full"] = _full_step(_deep(case), config.n_layers)

    def written(state: State) -> jax.Array:
        slots = _slots(state[0], data)
        return jnp.stack([pages[:, slots.pages, :, slots.offsets] for pages in (state[0].k, state[0].v)])

    found = compare(
        steps,
        _empty_step,
        state,
        data,
        repetitions=Repetitions(
            turns or turns_for(case.sets * case.weight_bytes, bandwidth), repeats, calls_per_turn=case.sets
        ),
        result=written,
        unchecked=("full",),
        profiled=("mosaic",) if profile else (),
    )
    if "full" in found and (seconds := found["full"].seconds) is not None:
        found["full"] = replace(found["full"], seconds=case.sets * seconds)  # a turn runs one set: it is large enough
    return found


def _states(turn: jax.Array, data: dict[str, Any]) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(data["x"], turn % STATES, keepdims=False)


def _slots(cache: PagedKVCache, data: dict[str, Any]) -> Slots:
    return slots_of(cache, data["page_table"], data["positions"], jnp.ones(data["positions"].shape, bool))


def _empty_step(turn: jax.Array, state: State, data: dict[str, Any]) -> State:
    cache, total = state
    x = _states(turn, data)
    return PagedKVCache(*(pages.at[0, 0, 0, 0, 0].add(x[0, 0]) for pages in (cache.k, cache.v))), total


@functools.cache
def _fill_step(config: ModelConfig, count: int, implementation: Implementation) -> Step[State, dict[str, Any]]:
    """One turn: every set of `count` blocks fills the same slots."""

    def step(turn: jax.Array, state: State, data: dict[str, Any]) -> State:
        cache, total = state
        model = bind(config, data["params"])
        x, freq = _states(turn, data), model.frequencies()
        for first in range(0, config.n_layers, count):
            blocks: list[KVProjection] = [block.kv_projection for block in model.blocks[first : first + count]]
            tokens = ExitedTokens(x, data["positions"], data["page_table"], data["from_block"])
            cache = kv_fill(tokens, blocks, cache, layers=range(count), freq=freq, implementation=implementation)
        return cache, total

    return step


@functools.cache
def _full_step(config: ModelConfig, count: int) -> Step[State, dict[str, Any]]:
    """One turn: the states go through the first `count` blocks, each token a row that sees its own page."""

    def step(turn: jax.Array, state: State, data: dict[str, Any]) -> State:
        cache, total = state
        model = bind(config, data["params"])
        positions, table = data["positions"], data["page_table"]
        slots, x, angles = _slots(cache, data), _states(turn, data), model.rotation(positions)
        for layer in range(count):

            def attend(
                q: jax.Array, k: jax.Array, v: jax.Array, cache: PagedKVCache, layer: int = layer
            ) -> tuple[jax.Array, PagedKVCache]:
                cache = write(cache, layer, slots, k, v)
                o = paged_attention(jnp.moveaxis(q, -1, 0), cache, table, positions + 1, layer=layer)
                return jnp.moveaxis(o, 0, -1), cache

            x, _, cache = model.blocks[layer](x, angles, attend, cache)
        return cache, total + x.astype(jnp.float32)

    return step
