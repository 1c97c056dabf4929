"""KV fill-in: one suite for every implementation, against float64 NumPy; what the kernel reads; how it lowers.

Slots that must not be written hold random bits, NaNs among them, and have to keep them.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from pallas_kernels import ExitedTokens, KVProjection, PagedKVCache, kv_fill_refusals
from pallas_kernels.implementation import VARIABLE
from pallas_kernels.mosaic import kv_fill as kernel
from tests.native_env import needs_native

# Relative to the length of the vector written. Sums are in float32 everywhere; states, projection, bias and the norm of
# the keys are rounded once each, to 9 bits in bfloat16.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    """A call. `from_block` is one number for each token, in turn."""

    tokens: int = 5
    hidden: int = 128
    kv_heads: int = 2
    dim: int = 64
    layers: tuple[int, ...] = (3, 0, 2)
    cached: int = 4
    page_size: int = 4
    from_block: tuple[int, ...] = (0,)
    bias: bool = False
    k_norm: bool = False
    dtype: str = "bfloat16"

    @property
    def needed(self) -> np.ndarray:
        return np.resize(self.from_block, self.tokens)

    @property
    def num_pages(self) -> int:
        return -(-self.tokens // 3) * 2 + 3

    def arguments(self) -> dict:
        """Three tokens a row at scattered positions; each row's pages are its own, in any order."""
        rng = np.random.default_rng(self.tokens)
        dtype = np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))

        def normal(*shape: int, scale: float = 1.0) -> jax.Array:
            return jnp.asarray((scale * rng.normal(size=shape)).astype(dtype))

        def anything(*shape: int) -> jax.Array:
            bits = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
            bits[..., -1] |= np.where(rng.random(shape) < 0.25, 0x7F, 0).astype(np.uint8)  # huge numbers and NaNs
            return jnp.asarray(bits.view(dtype)[..., 0])

        heads = 2 * self.kv_heads * self.dim
        blocks = [
            KVProjection(
                norm=normal(self.hidden),
                wkv=normal(heads, self.hidden, scale=self.hidden**-0.5),
                bkv=normal(heads) if self.bias else None,
                k_norm=normal(self.dim) if self.k_norm else None,
                eps=1e-6,
            )
            for _ in self.layers
        ]
        rows = -(-self.tokens // 3)
        tables = rng.permutation(self.num_pages)[: 2 * rows].reshape(rows, 2)
        positions = np.concatenate([rng.permutation(2 * self.page_size)[:3] for _ in range(rows)])[: self.tokens]
        pages = (self.cached, self.num_pages, self.kv_heads, self.page_size, self.dim)
        return {
            "x": normal(self.hidden, self.tokens, scale=3.0),
            "blocks": blocks,
            "k_pages": anything(*pages),
            "v_pages": anything(*pages),
            "page_table": jnp.asarray(np.repeat(tables, 3, axis=0)[: self.tokens], jnp.int32),
            "positions": jnp.asarray(positions, jnp.int32),
            "from_block": jnp.asarray(self.needed, jnp.int32),
            "freq": jnp.asarray(1e4 ** -(np.arange(0, self.dim, 2) / self.dim), jnp.float32),
        }


def fill_arrays(x, positions, page_table, from_block, blocks, k_pages, v_pages, **options) -> tuple:
    """`kv_fill` of arrays; those of the cache come back."""
    tokens, cache = ExitedTokens(x, positions, page_table, from_block), PagedKVCache(k_pages, v_pages)
    filled = pallas_kernels.kv_fill(tokens, blocks, cache, **options)
    return filled.k, filled.v


def run(case: Case, given: dict, implementation: str) -> tuple[np.ndarray, np.ndarray]:
    def fill(given: dict) -> tuple[jax.Array, jax.Array]:
        return fill_arrays(**given, layers=case.layers, implementation=implementation)

    with interpreted() if implementation == "mosaic" and jax.default_backend() == "cpu" else contextlib.nullcontext():
        return tuple(np.asarray(pages) for pages in jax.jit(fill)(given))


def refusal(given: dict, blocks: list[KVProjection]) -> str | None:
    return kv_fill_refusals(given["x"], blocks, given["k_pages"])["mosaic"]()


def interpreted() -> contextlib.AbstractContextManager:
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))


def normed(weight, x: np.ndarray, eps: float) -> np.ndarray:
    """RMS norm over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * wide(weight)


def wide(x) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a slot that should have been written may hold a signalling NaN
        return np.asarray(x).astype(np.float64)


def check(case: Case, given: dict, filled: tuple[np.ndarray, np.ndarray]) -> None:
    """K and V of each token in each block that it lacks, in float64; every other slot as it was, to the bit."""
    positions, table = np.asarray(given["positions"]), np.asarray(given["page_table"])
    page, slot = table[np.arange(case.tokens), positions // case.page_size], positions % case.page_size
    angle = positions[:, None, None] * wide(given["freq"])
    cos, sin = np.cos(angle), np.sin(angle)
    written = np.zeros((case.cached, case.num_pages, case.page_size), bool)
    for index, (block, layer) in enumerate(zip(given["blocks"], case.layers, strict=True)):
        due = case.needed <= index
        kv = normed(block.norm, wide(given["x"]).T, block.eps) @ wide(block.wkv).T
        if block.bkv is not None:
            kv = kv + wide(block.bkv)
        k, v = np.moveaxis(kv.reshape(case.tokens, 2, case.kv_heads, case.dim), 1, 0)
        if block.k_norm is not None:
            k = normed(block.k_norm, k, block.eps)
        first, second = np.split(k, 2, axis=-1)
        k = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        for got, want in zip(filled, (k, v), strict=True):
            error = np.linalg.norm(wide(got[layer, page[due], :, slot[due]]) - want[due], axis=-1)
            assert np.all(error <= TOLERANCE[case.dtype] * np.linalg.norm(want[due], axis=-1)), (index, error)
        written[layer, page[due], slot[due]] = True
    for before, after in zip((given["k_pages"], given["v_pages"]), filled, strict=True):
        kept = np.moveaxis(np.asarray(before), 3, 2)[~written], np.moveaxis(after, 3, 2)[~written]
        assert kept[0].tobytes() == kept[1].tobytes()


CASES = {
    "one token": Case(tokens=1, layers=(1,), from_block=(0,)),
    "several tokens a row, each from a block of its own": Case(tokens=7, from_block=(1, 3, 0, 2, 99)),
    "nobody lacks anything": Case(from_block=(3, 4)),
    "norm of the keys": Case(k_norm=True, dtype="float16"),
    "bias and norm, heads of 128": Case(tokens=9, dim=128, bias=True, k_norm=True, from_block=(0, 2), layers=(1, 0)),
    "heads of 96": Case(tokens=3, hidden=64, dim=96, kv_heads=1),
    "heads of 256": Case(tokens=66, hidden=64, dim=256, kv_heads=1, layers=(0,), cached=1, from_block=(0, 0, 1)),
    "more tokens than a warpgroup takes": Case(tokens=70, kv_heads=1, bias=True, from_block=(0, 1, 2), layers=(2, 1)),
    "more tokens than a tile holds": Case(tokens=130, hidden=64, kv_heads=1, layers=(1,), from_block=(0, 0, 0, 0, 1)),
}


@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
@pytest.mark.parametrize("name", CASES)
def test_fills_what_is_missing_and_nothing_else(name, implementation, capfd):
    case = CASES[name]
    given = case.arguments()
    check(case, given, run(case, given, implementation))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("implementation", ["xla", pytest.param("native", marks=needs_native)])
def test_float32(implementation, monkeypatch):
    """The native kernels are those of the projection, where the variable decides."""
    monkeypatch.setenv(VARIABLE, implementation)
    case = Case(dtype="float32", bias=True, k_norm=True, from_block=(0, 1, 2, 3))
    given = case.arguments()
    check(case, given, run(case, given, implementation))


@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
def test_keys_and_values_are_not_taken_for_each_other(implementation):
    case = Case(tokens=2, kv_heads=1, layers=(0,))
    given = case.arguments()
    filled = run(case, given, implementation)
    given["k_pages"], given["v_pages"] = given["v_pages"], given["k_pages"]
    with pytest.raises(AssertionError):
        check(case, given, filled[::-1])


def test_a_thread_block_goes_from_item_to_item_and_a_launch_follows_another(monkeypatch, capfd):
    monkeypatch.setattr(kernel, "MULTIPROCESSORS", 3)  # 8 or 16 items: they do not come out even
    monkeypatch.setattr(kernel, "MAX_STAGES", 3)  # 4 steps an item: neither do these
    monkeypatch.setattr(kernel, "BLOCKS", 2)
    case = Case(hidden=256, bias=True, from_block=(1, 3, 0))
    given = case.arguments()
    check(case, given, run(case, given, "mosaic"))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(("from_block", "blocks"), [((1, 2, 3), 2), ((3, 5), 0)])
def test_weights_of_blocks_that_nobody_needs_are_not_read(from_block, blocks, monkeypatch):
    copies = []
    copy = plgpu.copy_gmem_to_smem

    def counted(source, *args) -> None:
        jax.debug.callback(lambda: copies.append(source.shape))
        copy(source, *args)

    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", counted)
    case = Case(from_block=from_block)
    given = case.arguments()
    check(case, given, run(case, given, "mosaic"))
    jax.effects_barrier()
    # K and V of 2 heads, in 2 steps; 5 tokens are fetched as 8.
    assert sorted(copies) == [(8, 64)] * 8 * blocks + [(64, 64)] * 8 * blocks


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"dtype": "float32"}, "bfloat16 or float16"),
        ({"dim": 80}, "64, 96, 128, 256, got 80"),
        ({"hidden": 96}, "multiple of 64, got 96"),
    ],
)
def test_refuses_what_it_cannot_do_and_xla_takes_it(change, part):
    case = replace(Case(tokens=2, layers=(1,)), **change)
    given = case.arguments()
    assert part in refusal(given, given["blocks"])
    with pytest.raises(ValueError, match=part):
        run(case, given, "mosaic")
    check(case, given, run(case, given, "xla"))


def test_refuses_blocks_that_differ_and_dtypes_that_do():
    given = Case().arguments()
    blocks = given["blocks"]
    for odd in (replace(blocks[0], eps=1e-5), replace(blocks[0], k_norm=jnp.ones(64, jnp.bfloat16))):
        assert "same eps" in refusal(given, [*blocks, odd])
    half = replace(blocks[0], wkv=blocks[0].wkv.astype(jnp.float16))
    assert "blocks[3].wkv" in refusal(given, [*blocks, half])
    assert "x must have" in refusal(given | {"x": given["x"].astype(jnp.float32)}, blocks)


MODELS = {
    "Llama-2-7B": Case(hidden=4096, kv_heads=32, dim=128, layers=tuple(range(32))),
    "Llama-3-8B": Case(hidden=4096, kv_heads=8, dim=128, layers=tuple(range(32))),
    "Llama-3.2-1B": Case(hidden=2048, kv_heads=8, dim=64, layers=tuple(range(16))),
    "Qwen3-0.6B": Case(hidden=1024, kv_heads=8, dim=128, layers=tuple(range(28)), k_norm=True),
}
PAGES = 100


def lowered(case: Case, loop: bool = False) -> str:
    """StableHLO of a call with donated pages, for CUDA; nothing is allocated."""

    def shape(*dims: int, dtype: str = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))

    heads = 2 * case.kv_heads * case.dim
    block = KVProjection(
        norm=shape(case.hidden),
        wkv=shape(heads, case.hidden),
        bkv=shape(heads) if case.bias else None,
        k_norm=shape(case.dim) if case.k_norm else None,
        eps=1e-6,
    )
    pages = shape(len(case.layers), PAGES, case.kv_heads, 64, case.dim)
    per_token = shape(case.tokens, dtype="int32")

    def fill(pages: tuple, rest: dict) -> tuple:
        def once(pages: tuple) -> tuple:
            return fill_arrays(k_pages=pages[0], v_pages=pages[1], **rest, layers=case.layers, implementation="mosaic")

        if not loop:
            return once(pages)
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, once(c[1])), (0, pages))[1]

    rest = {
        "x": shape(case.hidden, case.tokens),
        "blocks": [block] * len(case.layers),
        "page_table": shape(case.tokens, 32, dtype="int32"),
        "positions": per_token,
        "from_block": per_token,
        "freq": shape(case.dim // 2, dtype="float32"),
    }
    traced = jax.jit(fill, donate_argnums=0).trace((pages, pages), rest)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def check_in_place(case: Case, text: str) -> None:
    """Nothing but the kernel touches the pages, and it has them aliased in and out."""
    pages = f"tensor<{len(case.layers)}x{PAGES}x{case.kv_heads}x64x{case.dim}x"
    lines = [line for line in text.splitlines() if pages in line]
    calls = [line for line in lines if "stablehlo.custom_call @mosaic_gpu" in line]
    assert len(calls) == -(-len(case.layers) // kernel.BLOCKS)
    for call in calls:
        operands = re.search(r"\(([^()]*)\) -> \(([^()]*)\)$", call)
        assert operands is not None
        types = re.findall(r"tensor<[^>]*>", operands[1])
        aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d+)", call)
        assert [int(out) for out, _ in aliases] == [0, 1]
        assert len({index for _, index in aliases}) == 2
        assert all(types[int(index)].startswith(pages) for _, index in aliases)
    others = [line.strip() for line in lines if line not in calls]
    operations = {match[1] if (match := re.search(r"\b(stablehlo\.\w+|func\.func|return)\b", o)) else o for o in others}
    assert operations <= {"func.func", "return", "stablehlo.while", "stablehlo.return"}, operations
    assert text.count("tf.aliasing_output") == 2


@pytest.mark.parametrize("name", MODELS)
def test_lowers_for_cuda_in_place(name):
    check_in_place(MODELS[name], lowered(MODELS[name]))


def test_lowers_in_place_within_a_loop():
    case = replace(MODELS["Llama-3.2-1B"], layers=(0, 1), tokens=32)
    check_in_place(case, lowered(case, loop=True))


@pytest.mark.parametrize("dim", kernel.HEAD_DIMS)
@pytest.mark.parametrize("tokens", [1, 128])
def test_every_head_dimension_fits_shared_memory(dim, tokens):
    case = Case(tokens=tokens, hidden=1024, kv_heads=1, dim=dim, layers=(0,), dtype="float16", bias=True, k_norm=True)
    check_in_place(case, lowered(case))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
@pytest.mark.parametrize("name", CASES)
def test_suite_on_a_device(name, implementation):
    given = CASES[name].arguments()
    check(CASES[name], given, run(CASES[name], given, implementation))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "dtype"), [(1, "bfloat16"), (33, "float16"), (200, "bfloat16")])
@pytest.mark.parametrize("name", MODELS)
def test_real_shapes(name, tokens, dtype):
    case = replace(MODELS[name], tokens=tokens, layers=(2, 0), from_block=(1, 0, 2), dtype=dtype, page_size=64)
    given = case.arguments()
    check(case, given, run(case, given, "mosaic"))


@pytest.mark.gpu
def test_all_blocks_of_a_model():
    case = replace(MODELS["Llama-3.2-1B"], tokens=20, layers=tuple(range(30)), cached=30, from_block=(7, 30, 26))
    given = case.arguments()
    check(case, given, run(case, given, "mosaic"))


@pytest.mark.gpu
def test_pages_of_more_than_2_to_the_31_elements():
    case = Case(tokens=2, kv_heads=8, dim=128, layers=(1,), cached=2, page_size=64)
    given = case.arguments()
    small = run(case, given, "mosaic")
    far = 16_400  # K's and V's last pages lie behind element 2**31
    moved = dict(given, page_table=given["page_table"] + far)
    for name in ("k_pages", "v_pages"):
        moved[name] = jnp.zeros((2, far + case.num_pages, 8, 64, 128), jnp.bfloat16)
    filled = jax.jit(
        lambda k_pages, v_pages, rest: fill_arrays(
            k_pages=k_pages, v_pages=v_pages, **rest, layers=case.layers, implementation="mosaic"
        ),
        donate_argnums=(0, 1),
    )(moved.pop("k_pages"), moved.pop("v_pages"), moved)
    positions, table = np.asarray(given["positions"]), np.asarray(given["page_table"])
    for token in range(case.tokens):
        page, slot = table[token, positions[token] // 64], positions[token] % 64
        for near, pages in zip(small, filled, strict=True):
            np.testing.assert_array_equal(np.asarray(pages[1, far + page, :, slot]), near[1, page, :, slot])
