"""The native kernels for CPUs: products against NumPy, threads, and how the library is built, kept and refused.

Attention is in `test_paged_attention.py`, beside the other implementations.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Best, Norm, PagedKVCache, Slots, cache_folder, head, write
from pallas_kernels import linear as product
from pallas_kernels.implementation import VARIABLE
from pallas_kernels.native import library, ops
from pallas_kernels.products import dot
from tests.native_env import COMPILER, needs_native

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def linear(weight: np.ndarray, x: np.ndarray) -> jax.Array:
    """`ops.linear`, built if it has not been."""
    arrays = jnp.asarray(weight), jnp.asarray(x)
    assert ops.linear_refusal(*arrays) is None
    return ops.linear(arrays[:1], arrays[1])[0]


def check_product(rows: int, depth: int, columns: int) -> None:
    weight, x = normal(rows, depth), normal(depth, columns, seed=1)
    found = np.asarray(linear(weight, x))
    assert (found.shape, found.dtype) == ((rows, columns), np.float32)
    # Rounding of float32 sums, relative to what was summed: 2**-24 for each of a few dozen additions in a row.
    error = np.abs(found - weight.astype(np.float64) @ x) / (np.abs(weight) @ np.abs(x))
    assert error.max() < 2e-6, (rows, depth, columns, error.max())


# ------------------------------------------------------------------------------------------------------------ products


@needs_native
@pytest.mark.parametrize(("rows", "depth"), [(37, 29), (701, 51)])
def test_products_of_any_number_of_columns(rows, depth):
    """The second takes several items of work, and neither rows nor depth come out even with any tile or vector."""
    for columns in [*range(1, 41), 64, 100]:
        check_product(rows, depth, columns)


@needs_native
def test_products_without_amx():
    """What this file says of products, again, of what a processor with AMX does where it has none."""
    if "EEJAX_AMX" in os.environ:
        pytest.skip("said already")
    if "amx" not in library.processor():
        pytest.skip("this processor has no AMX, so the other tests have run without it")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__, "-k", "products"]
    environment = {**os.environ, "EEJAX_AMX": "off"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "1 skipped" in done.stdout, done.stdout[-500:]


@needs_native
def test_products_of_many_columns_are_as_exact_as_of_few():
    """On AMX they are sums of products of bfloat16, and half as far off; one product left out makes it twenty times."""
    weight, x = normal(64, 768) * 0.02, normal(768, 100, seed=1)
    exact = weight.astype(np.float64) @ x
    errors = (np.asarray(linear(weight, x[:, :columns])) - exact[:, :columns] for columns in (16, 100))
    few, many = (np.sqrt(np.mean(error**2)) for error in errors)
    assert many < 1.5 * few, (many, few)


@needs_native
def test_products_of_what_is_not_a_number_or_infinite_are_their_columns_own():
    weight, x = normal(40, 64), normal(64, 50, seed=1)
    x[3, 7], x[5, 8] = np.nan, np.inf
    found, fine = np.asarray(linear(weight, x)), np.delete(np.arange(50), (7, 8))
    assert not np.isfinite(found[:, 7:9]).any()
    # Sums of 64 products of size 1, in another order.
    np.testing.assert_allclose(found[:, fine], weight @ x[:, fine], rtol=0, atol=1e-4)


@needs_native
def test_products_of_any_rows_and_depth():
    for columns in (1, 4, 8, 11, 16, 32, 47):
        for rows, depth in ((1, 1), (1, 70), (5, 3), (13, 16), (24, 64), (50, 15)):
            check_product(rows, depth, columns)


@needs_native
@pytest.mark.parametrize(("rows", "depth", "columns"), [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_products_without_elements(rows, depth, columns):
    found = linear(np.ones((rows, depth), np.float32), np.ones((depth, columns), np.float32))
    np.testing.assert_array_equal(found, np.zeros((rows, columns), np.float32))


SOME = [0.0, 0.2, 0.6, 1.0]
"""Shares of columns that are computed."""


def some_columns(columns: int, share: float) -> np.ndarray:
    return np.random.default_rng(columns).random(columns) < share


@needs_native
@pytest.mark.parametrize("share", SOME)
@pytest.mark.parametrize(("rows", "depth"), [(37, 29), (300, 51), (0, 5), (4, 0)])
def test_products_of_some_columns_leave_the_residual_in_the_others(rows, depth, share):
    assert ops.linear_refusal(jnp.ones((2, 2))) is None
    some = jax.jit(lambda weight, x, residual, active: product(weight, x, residual=residual, active=active))
    for columns in (1, 3, 8, 9, 16, 17, 32, 33, 100):
        weight, x, residual = normal(rows, depth), normal(depth, columns, seed=1), normal(rows, columns, seed=2)
        active = some_columns(columns, share)
        found = np.asarray(some(weight, x, residual, active))
        # Sums of 51 products of size 1, in another order.
        np.testing.assert_allclose(found[:, active], (residual + weight @ x)[:, active], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(found[:, ~active], residual[:, ~active])


@needs_native
@pytest.mark.parametrize("share", SOME)
def test_products_of_some_columns_are_those_of_these_columns_alone(share):
    """To the bit: a column's place does not matter. With a norm, gated, and in pairs with columns of their own."""
    first, second, norm = map(jnp.asarray, (normal(300, 51), normal(77, 51, seed=1), normal(51, seed=2)))
    gated = jax.jit(lambda x, active: product(first, x, norm=Norm(norm, 1e-5), gated=True, active=active))
    pair = jax.jit(lambda x, *active: product((first, second), x, norm=Norm(norm, 1e-5), active=active))
    for columns in (7, 20, 50):
        x, active = normal(51, columns, seed=3), some_columns(columns, share)
        more = active | some_columns(columns, 0.3)
        for some, found, weight, is_gated in (
            (active, gated(x, active), first, True),
            (active, pair(x, active, more)[0], first, False),
            (more, pair(x, active, more)[1], second, False),
        ):
            alone = product(weight, jnp.asarray(x[:, some]), norm=Norm(norm, 1e-5), gated=is_gated)
            np.testing.assert_array_equal(np.asarray(found)[:, some], alone, f"{columns} columns")


@needs_native
@pytest.mark.parametrize("share", SOME)
@pytest.mark.parametrize(("vocabulary", "depth"), [(1, 3), (37, 29), (5003, 16)])
def test_head_finds_what_logits_come_to(vocabulary, depth, share):
    rng = np.random.default_rng(vocabulary)
    # Small integers: logits are exact, and many are equal.
    weight = rng.integers(-2, 3, (vocabulary, depth)).astype(np.float32)
    some = jax.jit(lambda x, active, logits, wanted: head(weight, x, active=active, logits=logits, wanted=wanted))
    for columns in (1, 2, 8, 9, 20, 33, 64):
        x = rng.integers(-2, 3, (depth, columns)).astype(np.float32)
        active, wanted = some_columns(columns, share), rng.random(columns) < 0.5
        old = normal(vocabulary, columns)
        found, logits = some(x, active, old, wanted)
        expected = Best.of(jnp.asarray(weight @ x))
        for name in ("top", "token", "second"):
            np.testing.assert_array_equal(getattr(found, name)[active], getattr(expected, name)[active], name)
        np.testing.assert_allclose(found.total[active], expected.total[active], rtol=2e-6)
        np.testing.assert_array_equal(logits, np.where(active & wanted, weight @ x, old))
        greedy, nothing = head(jnp.asarray(weight), jnp.asarray(x), confidence=False)
        np.testing.assert_array_equal(greedy.token, (weight @ x).argmax(axis=0))
        assert nothing is None


@needs_native
def test_head_of_no_number_is_a_row_all_the_same():
    weight, x = np.full((300, 1), -np.inf, np.float32), np.ones((1, 5), np.float32)
    assert head(jnp.asarray(weight), jnp.asarray(x))[0].token.tolist() == [0] * 5
    assert head(jnp.full((300, 1), jnp.nan), jnp.asarray(x))[0].token.tolist() == [0] * 5
    weight[7], weight[200] = np.nan, -1
    found, _ = head(jnp.asarray(weight), jnp.asarray(x))
    assert found.token.tolist() == [200] * 5 == Best.of(jnp.asarray(weight @ x)).token.tolist()
    assert found.total.tolist() == [1] * 5, "what is no number counts for nothing"


@needs_native
def test_head_writes_logits_in_place_and_none_where_none_are_wanted():
    weight, x, logits = jnp.ones((50, 8)), jnp.ones((8, 4)), jnp.zeros((50, 4))
    place = logits.unsafe_buffer_pointer()
    write_them = jax.jit(lambda logits: head(weight, x, logits=logits)[1], donate_argnums=0)
    assert write_them(logits).unsafe_buffer_pointer() == place
    without = jax.jit(lambda x: head(weight, x)[0]).lower(x).compile()
    assert "f32[50,4]" not in without.as_text()
    assert "1024 columns" in (ops.head_refusal(weight, jnp.ones((8, 1025))) or "")


@needs_native
def test_two_products_of_one_normed_x_are_each_what_it_would_be_alone():
    first, second, norm = map(jnp.asarray, (normal(300, 51), normal(77, 51, seed=1), normal(51, seed=2)))
    for columns in (1, 3, 8, 9, 16, 32, 100):
        x, before = jnp.asarray(normal(51, columns, seed=3)), Norm(norm, 1e-5)
        for found, weight in zip(product((first, second), x, norm=before), (first, second), strict=True):
            np.testing.assert_array_equal(found, product(weight, x, norm=before))


@needs_native
@pytest.mark.parametrize(
    ("heads", "size", "dim", "tokens"), [(2, 8, 16, 1), (3, 8, 24, 33), (2, 16, 64, 100), (1, 8, 7, 70)]
)
def test_keys_are_written_in_place_and_nowhere_else(heads, size, dim, tokens):
    pages, values = normal(3, tokens + 2, heads, size, dim), normal(heads, dim, tokens, seed=1)
    rng = np.random.default_rng(tokens)
    ids = rng.permutation(tokens + 2)[:tokens].astype(np.int32)
    ids[::4] += tokens + 2  # dropped
    offsets = rng.integers(0, size, tokens, np.int32)
    expected = pages.copy()
    for token in np.flatnonzero(ids < tokens + 2):
        expected[1, ids[token], :, offsets[token]] = values[:, :, token]

    def write_there(pages, ids, offsets, values):
        return write(PagedKVCache(pages, jnp.zeros_like(pages)), 1, Slots(ids, offsets), values, values).k

    donated = jnp.array(pages)
    place = donated.unsafe_buffer_pointer()
    found = jax.jit(write_there, donate_argnums=0)(donated, ids, offsets, values)
    np.testing.assert_array_equal(found, expected)
    assert found.unsafe_buffer_pointer() == place
    assert "eejax_write" in jax.jit(write_there).lower(pages, ids, offsets, values).as_text()
    low = jnp.asarray(pages, jnp.bfloat16)
    assert "eejax_write" not in jax.jit(write_there).lower(low, ids, offsets, values).as_text()


@needs_native
def test_no_queries():
    pages = jnp.ones((1, 2, 1, 8, 16))
    none = jnp.zeros(0, jnp.int32)
    q = jnp.zeros((0, 4, 16))
    options = {"layer": 0, "sliding_window": None}
    assert ops.attention(q, pages, pages, jnp.zeros((1, 2), jnp.int32), none, none, **options).shape == q.shape


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")])
def test_other_types_are_refused(dtypes):
    weight, x = (jnp.ones((2, 2), dtype) for dtype in dtypes)
    assert all(part in ops.linear_refusal(weight, x) for part in dtypes)
    pages = jnp.ones((1, 2, 1, 8, 16), dtypes[1])
    assert all(part in ops.attention_refusal(jnp.ones((1, 4, 16), dtypes[0]), pages) for part in dtypes)
    assert all(part in ops.head_refusal(weight, x) for part in dtypes)


# --------------------------------------------------------------------------------------------------------- projections


def lowered(weight: jax.Array, x: jax.Array) -> str:
    def traced_anew(weight: jax.Array, x: jax.Array) -> jax.Array:
        return product(weight, x)

    return jax.jit(traced_anew).lower(weight, x).as_text()


@needs_native
def test_projections_of_float32_run_on_the_kernel(monkeypatch):
    weight, x = jnp.ones((4, 3)), jnp.ones((3, 2))
    assert "eejax_linear" in lowered(weight, x)
    assert "eejax_linear" not in lowered(weight.astype(jnp.bfloat16), x)
    monkeypatch.setenv(VARIABLE, "xla")
    assert "eejax_linear" not in lowered(weight, x)


@needs_native
@pytest.mark.parametrize("tokens", [(), (5,), (2, 3)], ids=str)
def test_projections_and_their_gradients_are_those_of_xla(tokens):
    weight, x = jnp.asarray(normal(6, 19)), jnp.asarray(normal(19, *tokens))

    def loss(product, weight, x):
        y = product(weight, x)
        return jnp.sum(jnp.sin(y)), y

    def both(product):
        of = jax.value_and_grad(functools.partial(loss, product), argnums=(0, 1), has_aux=True)
        return jax.tree.leaves(jax.jit(of)(weight, x))

    for found, expected in zip(both(product), both(dot), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)  # numbers of size 4


@needs_native
def test_projections_can_be_mapped():
    weights, xs = jnp.asarray(normal(3, 6, 19)), jnp.asarray(normal(3, 19, 5))
    expected = np.asarray(weights, np.float64) @ np.asarray(xs)
    np.testing.assert_allclose(jax.vmap(product)(weights, xs), expected, rtol=0, atol=1e-5)
    of_one = np.asarray(weights[0], np.float64) @ np.asarray(xs)
    np.testing.assert_allclose(jax.vmap(product, (None, 0))(weights[0], xs), of_one, rtol=0, atol=1e-5)


EPS = 0.1
"""Large enough to matter."""
COMPOSITIONS: dict[str, Callable] = {
    "norm": lambda weight, x, norm, residual: product(weight, x, norm=Norm(norm, EPS)),
    "residual": lambda weight, x, norm, residual: product(weight, x, residual=residual),
    "both": lambda weight, x, norm, residual: product(weight, x, norm=Norm(norm, EPS), residual=residual),
    "gated": lambda weight, x, norm, residual: product(weight, x, gated=True),
    "gated norm": lambda weight, x, norm, residual: product(weight, x, norm=Norm(norm, EPS), gated=True),
    "pair": lambda weight, x, norm, residual: jnp.concatenate(
        product((weight, weight[::2] * 2), x, norm=Norm(norm, EPS))
    ),
}


def assert_alike(found: list[jax.Array], expected: list[jax.Array]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        # Relative to the largest: gated results are products of two sums of 29.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * max(1, np.abs(theirs).max()))


@needs_native
@pytest.mark.parametrize("form", COMPOSITIONS)
def test_what_goes_along_with_products_is_what_xla_makes_of_it(monkeypatch, form):
    weight, norm = jnp.asarray(normal(38, 29)), jnp.asarray(1 + 0.3 * normal(29))
    of = COMPOSITIONS[form]

    def both(function: Callable, *arguments) -> list:
        found = []
        for wish in ("native", "xla"):
            monkeypatch.setenv(VARIABLE, wish)
            found.append(function(*arguments))
        return found

    for columns in (1, 3, 8, 9, 16, 32, 47):
        arguments = weight, jnp.asarray(normal(29, columns)), norm, jnp.asarray(normal(38, columns))
        assert_alike(*([y] for y in both(of, *arguments)))

    def loss(*arguments):
        y = of(*arguments)
        return jnp.sum(y * jnp.asarray(normal(*y.shape)))

    def gradients(*arguments) -> tuple:
        return jax.jit(jax.grad(loss, range(4)))(*arguments)  # traced at each call: the variable is read then

    assert_alike(*both(gradients, *arguments))


# ------------------------------------------------------------------------------------------------------------- threads


def work() -> list[jax.Array]:
    """Products and attention that take every form of the kernels, with items for several threads."""
    weight = normal(1500, 67)
    found = [linear(weight, normal(67, columns)) for columns in (1, 5, 16, 50)]
    pages = [jnp.asarray(normal(1, 40, 2, 8, 64, seed=seed)) for seed in (1, 2)]
    table = jnp.asarray(np.random.default_rng(3).permutation(40).reshape(4, 10), jnp.int32)
    for rows, positions in (
        (np.arange(4), np.array([0, 79, 33, 8])),
        (np.repeat(np.arange(4), 20), np.tile(np.arange(30, 50), 4)),
    ):
        q = jnp.asarray(normal(len(rows), 6, 64))
        found.append(
            ops.attention(q, *pages, table, jnp.asarray(rows), jnp.asarray(positions), layer=0, sliding_window=None)
        )
    return found


def digest() -> str:
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in work())).hexdigest()


@needs_native
def test_the_same_again_gives_the_same_bits():
    """What scratch and stacks hold from the calls before must not matter."""
    first = digest()
    check_product(300, 67, 40)
    assert {digest() for _ in range(3)} == {first}


@needs_native
def test_results_do_not_depend_on_the_number_of_threads():
    """XLA's pool, after which the kernels go, has `NPROC` threads where that is set."""
    script = "from tests.kernels.test_native import digest; print(digest())"
    found = {digest()}
    for threads in (1, 5):
        environment = os.environ | {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout.strip())
    assert len(found) == 1


@needs_native
def test_calls_at_the_same_time_do_not_disturb_one_another():
    expected = digest()
    with ThreadPoolExecutor(3) as pool:
        assert {future.result() for future in [pool.submit(digest) for _ in range(30)]} == {expected}


# ------------------------------------------------------------------------------------------------------------- library


@pytest.fixture
def new_process(monkeypatch, tmp_path):
    """`refusal` as at the start of a process, with a cache folder of its own; nothing is registered with XLA."""
    monkeypatch.setenv("EEJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)
    build = library.refusal.__wrapped__

    def start() -> str | None:
        monkeypatch.setattr(library, "refusal", functools.cache(build))
        return library.refusal()

    return start


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def counting(monkeypatch, tmp_path) -> Path:
    """A compiler that makes a library of empty functions, quickly, and writes a line into this file."""
    empty, log = tmp_path / "empty.c", tmp_path / "log"
    empty.write_text("".join(f"void {name}(void) {{}}\n" for name in library.TARGETS))
    log.write_text("")
    script = (
        f'echo called >> "{log}"; while [ "$1" != -o ]; do shift; done\n'
        f'exec "{COMPILER}" -shared -fPIC "{empty}" -o "$2"'
    )
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    return log


def test_without_a_compiler_xla_does_the_work(new_process, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    refusal = new_process()
    assert all(part in refusal for part in ("no C compiler", *library.COMPILERS, "CC"))
    weight, x = jnp.asarray(normal(4, 3)), jnp.asarray(normal(3, 2))
    assert "eejax_linear" not in lowered(weight, x)
    np.testing.assert_array_equal(product(weight, x), dot(weight, x))
    monkeypatch.setenv(VARIABLE, "native")
    with pytest.raises(ValueError) as caught:
        product(weight, x)
    assert f"{VARIABLE} is 'native'" in str(caught.value) and refusal in str(caught.value)
    assert not files_in(tmp_path)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(new_process, monkeypatch, tmp_path):
    script = 'while [ "$1" != -o ]; do shift; done; echo half > "$2"; echo first >&2; echo no such flag >&2; exit 3'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    refusal = new_process()
    assert all(part in refusal for part in (str(tmp_path / "compiler"), "failed with 3", "no such flag"))
    assert "first" not in refusal
    assert not files_in(tmp_path / "cache")


def test_a_compiler_that_takes_for_ever_is_given_up(new_process, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "TIME_LIMIT", 0.1)
    monkeypatch.setenv("CC", compiler(tmp_path, "exec sleep 60"))
    assert "timed out" in new_process()
    assert not files_in(tmp_path / "cache")


def test_a_cache_folder_that_cannot_be_written_is_a_reason(new_process, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("CC", compiler(tmp_path, "exit 0"))
    assert str(tmp_path / "cache") in new_process()


@needs_native
def test_a_library_is_built_once(new_process, counting, monkeypatch, tmp_path):
    assert new_process() is None
    [built] = files_in(tmp_path / "cache")
    assert new_process() is None
    assert files_in(tmp_path / "cache") == [built]
    assert counting.read_text().splitlines() == ["called"]
    os.utime(os.environ["CC"], (1, 1))  # another version of the compiler
    assert new_process() is None
    assert len(files_in(tmp_path / "cache")) == 2
    monkeypatch.setattr(library, "processor", lambda: "another")
    assert new_process() is None
    assert len(files_in(tmp_path / "cache")) == len(counting.read_text().splitlines()) == 3


@needs_native
def test_a_damaged_library_is_built_again(new_process, counting, monkeypatch, tmp_path):
    assert new_process() is None
    [built] = files_in(tmp_path / "cache")
    other = tmp_path / "other" / "native" / built.name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"half of it")
    monkeypatch.setenv("EEJAX_CACHE_DIR", str(tmp_path / "other"))
    assert new_process() is None
    assert files_in(tmp_path / "other") == [other] and other.read_bytes() == built.read_bytes()
    assert counting.read_text().splitlines() == ["called"] * 2


def test_a_compiler_that_is_named_but_missing_is_not_replaced(new_process, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert "no-such-compiler" in new_process()


@needs_native
def test_a_library_can_be_used_without_being_kept(new_process, counting, monkeypatch, tmp_path):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("EEJAX_CACHE_DIR", "off")
    assert new_process() is None
    assert new_process() is None
    assert counting.read_text().splitlines() == ["called"] * 2
    assert not files_in(tmp_path / "home") and not files_in(tmp_path / "cache")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EEJAX_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "eejax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "eejax"
    monkeypatch.setenv("EEJAX_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("EEJAX_CACHE_DIR", "off")
    assert cache_folder() is None


def test_windows_is_refused(new_process, monkeypatch):
    monkeypatch.setattr(library.platform, "system", lambda: "Windows")
    assert "Windows" in new_process()
