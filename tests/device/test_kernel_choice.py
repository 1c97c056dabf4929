"""Which implementation of the kernels runs, what is refused and why, and bad arguments of `kv_fill`."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from eejax.core import CacheConfig, EngineConfig
from eejax.core.errors import ConfigError
from eejax.device.runner import Runner
from eejax.device.setup import choose_kernels
from pallas_kernels import (
    ExitedTokens,
    KVProjection,
    PagedKVCache,
    check_page_ids,
    device_refusal,
    implementation,
    resolve,
)
from pallas_kernels.implementation import VARIABLE, Refusals
from tests.cases import random_model
from tests.native_env import needs_native

# Devices are stand-ins here, and arguments wrong on purpose.
pytestmark = pytest.mark.usefixtures("unchecked_shapes")


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def on_device(monkeypatch, platform: str, capability: str | None = None) -> None:
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(implementation.jax, "local_devices", lambda: [device])


# ------------------------------------------------------------------------------------------------------------- resolve

BOTH = {"mosaic": lambda: None, "native": lambda: None}


def refusing(name: str, why: str = "head dimension 80") -> Refusals:
    return BOTH | {name: lambda: why}


@pytest.mark.parametrize(
    ("platform", "capability", "runs", "why"),
    [
        ("gpu", "9.0", "mosaic", {"native": "gpu"}),
        ("gpu", "8.0", "xla", {"mosaic": "8.0", "native": "gpu"}),
        ("gpu", "10.0", "xla", {"mosaic": "10.0", "native": "gpu"}),
        ("cpu", None, "native", {"mosaic": "cpu"}),
        ("tpu", None, "xla", {"mosaic": "tpu", "native": "tpu"}),
    ],
)
def test_auto_takes_the_kernel_of_the_device(monkeypatch, platform, capability, runs, why):
    on_device(monkeypatch, platform, capability)
    assert resolve("auto", BOTH) == runs
    for name in BOTH:
        refusal = device_refusal(name)
        assert refusal is None if name not in why else why[name] in refusal


def test_the_default_device_decides_and_may_be_a_name(monkeypatch):
    on_device(monkeypatch, "gpu", "9.0")
    with jax.default_device("cpu"):
        assert resolve("auto", BOTH) == "native"


@pytest.mark.parametrize(
    ("version", "refused"),
    [(None, None), (12070, None), (12080, "12.8.0"), (12090, "12.9.0"), (12091, None), (13000, None)],
)
def test_a_compiler_that_breaks_masks_is_refused(monkeypatch, version, refused):
    on_device(monkeypatch, "gpu", "9.0")
    monkeypatch.setattr(implementation, "cuda_version", lambda: version)
    assert resolve("auto", BOTH) == ("xla" if refused else "mosaic")
    if refused is None:
        assert resolve("mosaic", BOTH) == "mosaic"
        return
    assert f"CUDA {refused}" in str(device_refusal("mosaic"))
    with pytest.raises(ValueError, match=f"miscompiles masks, and this is CUDA {refused}"):
        resolve("mosaic", BOTH)


@pytest.mark.parametrize(("name", "device"), [("mosaic", ("gpu", "9.0")), ("native", ("cpu", None))])
def test_a_kernel_that_refuses_gives_way(monkeypatch, name, device):
    on_device(monkeypatch, *device)
    assert resolve("auto", refusing(name)) == "xla"
    with pytest.raises(ValueError, match=rf"implementation is '{name}'.*head dimension 80"):
        resolve(name, refusing(name))
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(ValueError, match=rf"{VARIABLE} is '{name}'.*head dimension 80"):
        resolve("auto", refusing(name))


def test_kernels_of_other_devices_are_not_asked(monkeypatch):
    """The native kernels' answer takes a C compiler some seconds."""

    def asked() -> str | None:
        raise AssertionError

    on_device(monkeypatch, "gpu", "9.0")
    assert resolve("auto", BOTH | {"native": asked}) == "mosaic"
    on_device(monkeypatch, "gpu", "8.0")
    assert resolve("auto", {"mosaic": asked, "native": asked}) == "xla"
    on_device(monkeypatch, "cpu")
    assert resolve("xla", {"native": asked}) == "xla"
    monkeypatch.setenv(VARIABLE, "xla")
    assert resolve("auto", {"native": asked}) == "xla"


@pytest.mark.parametrize("wish", ["xla", "mosaic", "native"])
def test_the_variable_decides_where_the_caller_does_not(monkeypatch, wish):
    device = {"xla": ("gpu", "9.0"), "mosaic": ("cpu", None), "native": ("gpu", "9.0")}[wish]
    on_device(monkeypatch, *device)
    monkeypatch.setenv(VARIABLE, wish)
    assert resolve("auto", BOTH) == wish
    for other in {"xla", "mosaic", "native"} - {wish}:
        assert resolve(other, BOTH) == other
    monkeypatch.setenv(VARIABLE, "")
    assert resolve("auto", BOTH) == {"cpu": "native", "gpu": "mosaic"}[device[0]]


def test_an_operation_without_the_kernel_of_the_variable_runs_on_xla(monkeypatch):
    on_device(monkeypatch, "cpu")
    monkeypatch.setenv(VARIABLE, "mosaic")
    native = {"native": lambda: None}
    assert resolve("auto", native) == "xla"
    with pytest.raises(ValueError, match=r"implementation is 'mosaic', but there is no such kernel.*only native"):
        resolve("mosaic", native)


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="implementation must be one of auto, mosaic, native, xla, got 'triton'"):
        resolve("triton", BOTH)
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"{VARIABLE} must be one of auto, mosaic, native, xla, got 'cuda'"):
        resolve("auto", BOTH)


# ---------------------------------------------------------------------------------------------------------- a model's


def test_a_model_s_kernels_and_what_speaks_against_mosaic(monkeypatch):
    config, _ = random_model("gqa")
    bfloat16 = jnp.dtype("bfloat16")
    on_device(monkeypatch, "tpu")
    found = choose_kernels(config, 64, bfloat16)
    assert {choice.implementation for choice in found.values()} == {"xla"}
    assert all("Hopper" in choice.refusal and "tpu" in choice.refusal for choice in found.values())

    on_device(monkeypatch, "gpu", "9.0")
    fitting = replace(config, head_dim=64, hidden_size=256)
    assert all(choice == ("mosaic", None) for choice in choose_kernels(fitting, 64, bfloat16).values())
    for model, page, dtype, word, refusing in (
        (config, 64, bfloat16, str(config.head_dim), {"paged_attention", "kv_fill"}),
        (fitting, 16, bfloat16, "16", {"paged_attention"}),  # fill-in writes token by token
        (fitting, 64, jnp.dtype("float32"), "float32", {"paged_attention", "kv_fill"}),
    ):
        found = choose_kernels(model, page, dtype)
        assert {name for name, choice in found.items() if choice.implementation == "xla"} == refusing
        assert all(word in found[name].refusal for name in refusing)


@needs_native
def test_a_model_s_kernels_on_a_cpu():
    config, _ = random_model("gqa")
    float32 = jnp.dtype("float32")
    assert set(choose_kernels(config, 8, float32).values()) == {("native", None)}
    for choice in choose_kernels(config, 8, jnp.dtype("bfloat16")).values():
        assert choice.implementation == "xla"
        assert "float32" in choice.refusal and "bfloat16" in choice.refusal
    wide = choose_kernels(replace(config, head_dim=258), 8, float32)
    assert wide["kv_fill"] == ("native", None)
    assert wide["paged_attention"].implementation == "xla" and "258" in wide["paged_attention"].refusal


@pytest.mark.parametrize(
    ("wish", "model", "message"),
    [
        ("cuda", {}, "EEJAX_KERNELS must be one of"),
        ("mosaic", {}, "float32"),
        ("native", {"head_dim": 258}, "EEJAX_KERNELS is 'native', but the kernel does not take .* 258"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_before_anything_runs(monkeypatch, wish, model, message):
    model, params = random_model("gqa", **model)
    monkeypatch.setenv(VARIABLE, wish)
    with pytest.raises(ConfigError, match=message):
        Runner(EngineConfig(model=model, cache=CacheConfig(8, 64), max_model_len=64), params)


# ------------------------------------------------------------------------------------------------------- bad arguments


def test_page_ids_out_of_range_are_refused_on_the_host():
    table = np.zeros((3, 4), np.int32)
    check_page_ids(table, 1)
    table[1, 2] = 7
    check_page_ids(table, 8)
    with pytest.raises(ValueError, match=r"page_table\[1, 2\] is 7; the cache has pages 0\.\.6"):
        check_page_ids(table, 7)
    table[1, 2] = -1
    with pytest.raises(ValueError, match=r"page_table\[1, 2\] is -1"):
        check_page_ids(table, 8)


def fill_arguments(tokens: int = 3, size: int = 8, heads: int = 2, dim: int = 4) -> dict:
    block = KVProjection(jnp.ones(size), jnp.ones((2 * heads * dim, size)), None, None, 1e-5)
    pages = jnp.zeros((3, 5, heads, 8, dim))
    return {
        "x": jnp.ones((size, tokens)),
        "blocks": [block, block],
        "k_pages": pages,
        "v_pages": pages,
        "page_table": jnp.zeros((tokens, 2), jnp.int32),
        "positions": jnp.arange(tokens),
        "from_block": jnp.zeros(tokens, jnp.int32),
        "layers": (2, 0),
        "freq": jnp.ones(dim // 2),
    }


def fill(x, positions, page_table, from_block, blocks, k_pages, v_pages, **options) -> PagedKVCache:
    tokens = ExitedTokens(x, positions, page_table, from_block)
    return pallas_kernels.kv_fill(tokens, blocks, PagedKVCache(k_pages, v_pages), **options)


def with_block(**changes: jax.Array) -> dict:
    good = fill_arguments()["blocks"][0]
    return {"blocks": [good, replace(good, **changes)]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones((8, 3, 1))}, r"x must be \[D, N\], got \[8, 3, 1\]"),
        ({"v_pages": jnp.zeros((3, 5, 2, 8, 4), jnp.bfloat16)}, "cache.k and cache.v must be alike"),
        ({"page_table": jnp.zeros((2, 2), jnp.int32)}, r"page_table must be \[3, M\], one row per token.*\[2, 2\]"),
        ({"page_table": jnp.zeros((3, 2))}, "page_table must be integers, got float32"),
        ({"positions": jnp.arange(4)}, r"positions must be \[3\], got \[4\]"),
        ({"from_block": jnp.zeros(1, jnp.int32)}, r"from_block must be \[3\], got \[1\]"),
        ({"from_block": jnp.zeros(3)}, "from_block must be integers"),
        ({"freq": jnp.ones(4)}, r"freq must be \[2\], got \[4\]"),
        ({"layers": (0,)}, r"each of 2 blocks, got \(0,\)"),
        ({"layers": (1, 1)}, r"each of 2 blocks, got \(1, 1\)"),
        ({"starts": (1,)}, r"starts must ascend from 0 and lie below 2, got \[1\]"),
        ({"starts": (0, 2)}, r"starts must ascend from 0 and lie below 2, got \[0, 2\]"),
        ({"layers": (1, 3)}, r"layers must lie in 0\.\.2, got 3"),
        (with_block(wkv=jnp.ones((16, 9))), r"blocks\[1\]\.wkv must be \[16, 8\], got \[16, 9\]"),
        (with_block(norm=jnp.ones(9)), r"blocks\[1\]\.norm must be \[8\], got \[9\]"),
        (with_block(bkv=jnp.ones(8)), r"blocks\[1\]\.bkv must be \[16\], got \[8\]"),
        (with_block(k_norm=jnp.ones(2)), r"blocks\[1\]\.k_norm must be \[4\], got \[2\]"),
        ({"implementation": "cuda"}, "implementation must be one of auto, mosaic, native, xla, got 'cuda'"),
        ({"implementation": "mosaic"}, "float32"),
    ],
)
def test_bad_arguments_of_kv_fill_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        fill(**(fill_arguments() | changes))


def test_bad_rows_of_paged_attention_are_named():
    pages = jnp.zeros((1, 2, 1, 8, 4))
    call = {"q": jnp.ones((2, 1, 4)), "cache": PagedKVCache(pages, pages), "layer": 0}
    call |= {"page_table": jnp.zeros((2, 1), jnp.int32), "lengths": jnp.ones(2, jnp.int32)}
    for active in (jnp.ones(3, bool), jnp.ones(2, jnp.int32)):
        with pytest.raises(ValueError, match=r"active must be bool\[2\], got"):
            pallas_kernels.paged_attention(**call, active=active)
