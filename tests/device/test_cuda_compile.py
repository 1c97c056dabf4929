"""The whole way to a Hopper GPU's machine code, on a machine without one: XLA, Mosaic and ptxas for a described H100.

It needs the wheels of `jax[cuda13]` or `jax[cuda12]`, and no driver; where they are not installed it is skipped:

    make test EXTRAS=cuda13 ARGS=tests/device/test_cuda_compile.py

What a program then does, and how fast, only a GPU shows (`pytest -m gpu`).
"""

from __future__ import annotations

import functools
import importlib.util
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import pallas_kernels
from bench.shapes import SHAPES
from eejax.core import CacheConfig, EngineConfig, ExitConfig, ModelConfig
from eejax.core.xla_flags import compiler_options
from eejax.device.batch_arrays import limits_of, rows_of, state_of
from eejax.device.decode import decode_chunk
from eejax.device.decode_state import Asks, Plan
from eejax.device.setup import init_cache
from eejax.model.transformer import param_shapes
from pallas_kernels import ExitedTokens, KVProjection, PagedKVCache, control_flow
from pallas_kernels.implementation import VARIABLE

PLUGINS = [name for name in ("jax_cuda13_plugin", "jax_cuda12_plugin") if importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(not PLUGINS, reason="needs the wheels of jax[cuda13] or jax[cuda12]")

H100 = Path(__file__).parents[1] / "fixtures" / "h100.txtpb"
"""What XLA must know of an H100 SXM, as its `GpuTargetConfigProto`."""

OPTIONS = {"xla_gpu_autotune_level": 0, **compiler_options("gpu")}  # there is no device to time kernels on
BFLOAT16 = jnp.dtype("bfloat16")
ROWS, WIDTH = 32, 64
KERNELS_A_BLOCK = [(1, 19), (32, 16)]
"""Rows, and launches of one block in one step."""


@functools.cache
def h100() -> jax.Device:
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100.read_text()
    )
    return found.devices[0]


def compiled(function, *arguments, donate: tuple[int, ...] = (), **options) -> jax.stages.Compiled:
    place = SingleDeviceSharding(h100())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=place), arguments)
    return jax.jit(function, donate_argnums=donate).lower(*shapes).compile(compiler_options=OPTIONS | options)


def shaped(*shape: int, dtype=BFLOAT16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


# (query heads, KV heads, head dimension, hidden size, bias, norm of the keys)
MODELS = {
    "llama-2-7b": (32, 32, 128, 4096, False, False),
    "llama-3-8b": (32, 8, 128, 4096, False, False),
    "llama-3.2-1b": (32, 8, 64, 2048, False, False),
    "qwen3-0.6b": (16, 8, 128, 1024, False, True),
    "heads of 96": (32, 32, 96, 3072, False, False),
    "heads of 256": (16, 8, 256, 2048, True, True),
}


def attention_of(heads, kv_heads, dim, size, bias, norm):
    pages = shaped(3, 512, kv_heads, 64, dim)
    table, lengths, active = shaped(ROWS, WIDTH, dtype="int32"), shaped(ROWS, dtype="int32"), shaped(ROWS, dtype="bool")

    def call(q, k, v, table, lengths, active):
        cache = PagedKVCache(k, v)
        return pallas_kernels.paged_attention(q, cache, table, lengths, layer=1, active=active, implementation="mosaic")

    return call, (shaped(ROWS, heads, dim), pages, pages, table, lengths, active), ()


def fill_of(heads, kv_heads, dim, size, bias, norm):
    pages, width = shaped(3, 512, kv_heads, 64, dim), 2 * kv_heads * dim
    block = KVProjection(
        shaped(size), shaped(width, size), shaped(width) if bias else None, shaped(dim) if norm else None, 1e-5
    )
    table, numbers = shaped(ROWS, WIDTH, dtype="int32"), shaped(ROWS, dtype="int32")

    def call(x, blocks, k, v, table, positions, from_block, freq):
        tokens, cache = ExitedTokens(x, positions, table, from_block), PagedKVCache(k, v)
        return pallas_kernels.kv_fill(tokens, blocks, cache, layers=(2, 0, 1), freq=freq, implementation="mosaic")

    freq = shaped(dim // 2, dtype="float32")
    return call, (shaped(size, ROWS), [block] * 3, pages, pages, table, numbers, numbers, freq), (2, 3)


@pytest.mark.parametrize("operation", [attention_of, fill_of])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_become_machine_code_that_stays_in_registers(name, operation, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    call, arguments, donate = operation(*MODELS[name])
    program = compiled(call, *arguments, donate=donate)
    assert 'custom_call_target="mosaic_gpu' in program.as_text()
    reports = "".join(file.read_text() for file in tmp_path.rglob("*.ptxas"))
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill stores", reports)]
    assert spills and max(spills) <= (1024 if name == "heads of 256" else 0), reports  # 256 sums a row do not fit
    assert "sm_90a" in reports


# ------------------------------------------------------------------------------------------------------ a decode chunk


class Thunk(NamedTuple):
    """One line of what XLA runs: `indent` tells whose body it is in."""

    indent: int
    kind: str


@dataclass(frozen=True)
class Chunk:
    """A compiled decode chunk."""

    program: jax.stages.Compiled
    cache_shape: tuple[int, ...]
    cache_bytes: int
    thunks: tuple[Thunk, ...]

    def copies_of_the_cache(self) -> list[str]:
        shape = ",".join(map(str, self.cache_shape))
        return re.findall(rf"= \S*\[{shape}\]\S* (?:copy|copy-start|gather)\(.*", self.program.as_text())

    def host_reads(self) -> int:
        """Predicates that the host waits for in a step: of loops and branches that no CUDA graph holds.

        Loops whose number of trips XLA knows are not counted. The loop over the steps counts: it is asked once a step.
        """
        around: list[Thunk] = []
        count = 0
        for thunk in self.thunks:
            around = [one for one in around if one.indent < thunk.indent]
            in_graph = any(one.kind == "kCommandBuffer" for one in around)
            count += thunk.kind in ("kWhile", "kConditional") and not in_graph
            around.append(thunk)
        return count - self.program.as_text().count("known_trip_count")

    def launches(self) -> int:
        """Kernels and copies, each counted once."""
        return sum(thunk.kind not in ("kWhile", "kConditional", "kCommandBuffer") for thunk in self.thunks)


def decode_of(model: ModelConfig, rows: int, fill: str, asks: Asks):
    """A chunk over a large cache, and the shapes of its arguments, without making any of them."""
    config = EngineConfig(model=model, cache=CacheConfig(2048), max_model_len=1024)
    params = jax.tree.map(lambda leaf: shaped(*leaf.shape), param_shapes(model))
    cache = jax.eval_shape(lambda: init_cache(model, config.cache, BFLOAT16))
    plan = Plan(False, fill == "deferred", asks)
    chunk = functools.partial(decode_chunk, model, 4, plan)
    return chunk, (params, cache, rows_of(config, (), rows), state_of((), rows), limits_of()), cache


@functools.cache
def chunk_of(form: str, rows: int, fill: str, asks: Asks, layers: int = 3) -> Chunk:
    """A model of `layers` blocks like llama-1b's, with both kernels and exits after the first two."""
    model = replace(SHAPES["llama-1b"], n_layers=layers, exits=ExitConfig((1, 2)), vocab_size=1024)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv(VARIABLE, "mosaic")
        patch.setenv(control_flow.VARIABLE, form)
        chunk, arguments, cache = decode_of(model, rows, fill, asks)
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        program = compiled(chunk, *arguments, donate=(1,), **dump)
        [file] = Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt")
        lines = re.findall(r"^( *)\d+: (k\w+)", file.read_text(), re.MULTILINE)
    thunks = tuple(Thunk(len(indent), kind) for indent, kind in lines)
    return Chunk(program, cache.k.shape, 2 * cache.k.size * cache.k.dtype.itemsize, thunks)


FULL, HEADS, ANY = Asks("none", "greedy"), Asks("heads", "greedy"), Asks()
CHUNKS = [
    ("cond", 1, "eager", FULL),
    ("cond", 1, "eager", HEADS),
    ("cond", 1, "deferred", HEADS),
    ("cond", 32, "eager", FULL),
    ("cond", 32, "eager", HEADS),
    ("cond", 32, "eager", ANY),
    ("while", 1, "eager", ANY),
    ("while", 32, "eager", ANY),
    ("while", 32, "deferred", ANY),
]


@pytest.mark.parametrize(("form", "rows", "fill", "asks"), CHUNKS, ids=str)
def test_a_decode_chunk_updates_the_cache_in_place(form, rows, fill, asks):
    """With both kernels in it: no copy of the cache, and temporaries far below its size."""
    chunk = chunk_of(form, rows, fill, asks)
    memory = chunk.program.memory_analysis()
    assert memory.alias_size_in_bytes >= chunk.cache_bytes
    assert memory.temp_size_in_bytes < chunk.cache_bytes / 10
    kernels = chunk.program.as_text().count('custom_call_target="mosaic_gpu')
    assert kernels == 3 if asks == FULL else kernels >= 4  # attention of each block, fill-in
    assert not chunk.copies_of_the_cache()


@pytest.mark.parametrize(
    ("rows", "fill", "asks", "reads"),
    [
        (1, "eager", FULL, 1),
        (1, "eager", HEADS, 1),
        (1, "deferred", HEADS, 1),
        (32, "eager", FULL, 1),
        (32, "eager", HEADS, 1),
        (32, "eager", ANY, 2),  # drawing tokens takes loops, which no graph holds
    ],
    ids=str,
)
def test_the_host_is_asked_once_a_step(rows, fill, asks, reads):
    """Whether to go on: all else is decided within one CUDA graph."""
    assert chunk_of("cond", rows, fill, asks).host_reads() == reads


@pytest.mark.parametrize("rows", [1, 32])
def test_as_loops_the_host_is_asked_at_every_branch(rows):
    """What the count above is held against."""
    assert chunk_of("while", rows, "eager", ANY).host_reads() > 6


@pytest.mark.parametrize(("rows", "most"), KERNELS_A_BLOCK)
def test_kernels_a_block(rows, most):
    """Launches that one more block adds to a step at full depth; fewer are welcome, and then written down here."""
    more, fewer = (chunk_of("cond", rows, "eager", FULL, layers).launches() for layers in (4, 3))
    assert 0 < more - fewer <= most


def test_a_program_holds_only_what_its_rows_ask_for():
    least, exits, most = (chunk_of("cond", 32, "eager", asks).launches() for asks in (FULL, HEADS, ANY))
    assert least < exits < most
    assert chunk_of("cond", 32, "eager", FULL).program.as_text().count("conditional(") == 0
