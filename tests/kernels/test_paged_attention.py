"""Attention over the paged cache, against float64 NumPy: one suite for every implementation.

Add an `Implementation` to `IMPLEMENTATIONS`, and it is put to all of this. Whatever no query may see is NaN: one read
too many shows. The kernel for Hopper GPUs runs under the Mosaic interpreter, which also looks for data races, and with
`-m gpu` on a device; the one for CPUs where there is a C compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from pallas_kernels import PagedKVCache, reference
from pallas_kernels.mosaic import paged_attention as mosaic
from tests.native_env import needs_native

# The interpreter multiplies with NumPy, which may warn of NaN: rows of queries that no head fills are NaN there.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")

LAYERS = 3
HEADS = {"mha": (2, 2), "gqa": (6, 2), "mqa": (4, 1)}
TOLERANCES = {
    # Sums of at most 300 products of normal numbers: rounding adds up to about 1e-6.
    "float32": 1e-5,
    # The reference reads the same bfloat16 K and V. What is rounded on the way are the scaled queries and the weights,
    # each by 2**-9: scores of size 4 move by 0.008, weights by 1 %, and values are of size 3 at the most.
    "bfloat16": 3e-2,
    # The same with 2**-12.
    "float16": 4e-3,
}


@dataclass(frozen=True)
class Implementation:
    """Functions and the shapes that they are put to.

    `decode` is called like `pallas_kernels.paged_attention`, `prefill` like `reference.paged_prefill_attention`.
    """

    decode: Callable
    prefill: Callable
    page: int
    width: int
    dim: int
    dtypes: tuple[str, ...]
    """The first is what a test uses that is not about types."""

    @property
    def longest(self) -> int:
        return self.page * self.width

    @property
    def lengths(self) -> tuple[int, ...]:
        return (0, 1, self.page - 1, self.page, self.page + 1, self.longest)

    @property
    def exact(self) -> bool:
        """Whether one slot of many is more than what rounding does."""
        return self.dtypes[0] == "float32"


def interpreted(*arguments, **options) -> jax.Array:
    """The kernel on the CPU: long rows have two pieces, long pieces fill their rings again, blocks get several."""
    small = mock.patch.multiple(mosaic, PIECE_TILES=1, MAX_PIECES=2, MULTIPROCESSORS=3, _occupancy=lambda *_: (2, 1))
    with small, plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return pallas_kernels.paged_attention(*arguments, **options, implementation="mosaic")


COPIES = 26
"""The native kernel takes tokens of a row together only where there are many: so often are those of a test repeated."""


def row_by_row(q, cache, page_table, positions, **options) -> jax.Array:
    """The native kernel on several queries a row: tokens of one row behind those of another."""
    rows = jnp.repeat(jnp.arange(q.shape[0]), q.shape[1])
    flat = q.reshape(-1, *q.shape[2:])
    many, many_rows, many_positions = (jnp.concatenate([a] * COPIES) for a in (flat, rows, positions.reshape(-1)))
    found = pallas_kernels.ragged_paged_attention(
        many, cache, page_table, many_rows, many_positions, **options, implementation="native"
    )
    return found[: len(flat)].reshape(q.shape)


def refused(*arguments, **options) -> jax.Array:
    raise AssertionError("there is no kernel for several queries a row")


XLA = Implementation(
    functools.partial(pallas_kernels.paged_attention, implementation="xla"),
    reference.paged_prefill_attention,
    page=8,
    width=4,
    dim=16,
    dtypes=("float32", "bfloat16"),
)
NATIVE = Implementation(
    functools.partial(pallas_kernels.paged_attention, implementation="native"),
    row_by_row,
    page=8,
    width=4,
    dim=64,
    dtypes=("float32",),
)
INTERPRETED = Implementation(interpreted, refused, page=64, width=5, dim=64, dtypes=("bfloat16", "float16"))
DEVICE = Implementation(
    functools.partial(pallas_kernels.paged_attention, implementation="mosaic"),
    refused,
    page=64,
    width=18,  # 1152 slots: three pieces
    dim=128,
    dtypes=("bfloat16", "float16"),
)
IMPLEMENTATIONS = {
    "xla": XLA,
    "native": NATIVE,
    "native-20": replace(NATIVE, dim=20),  # no multiple of any processor's vectors
    "interpreted": INTERPRETED,
    "device": DEVICE,
}
PAGE, WIDTH, DIM, LONGEST = XLA.page, XLA.width, XLA.dim, XLA.longest


@dataclass(frozen=True)
class Problem:
    """Arguments of one call. `positions [B, T]` holds each query's last visible position, -1 for none."""

    implementation: str
    q: np.ndarray  # [B T H C]
    k_pages: np.ndarray  # [L P K S C]
    v_pages: np.ndarray
    page_table: np.ndarray  # [B M]
    positions: np.ndarray
    layer: int = 1
    sliding_window: int | None = None

    @property
    def cache(self) -> PagedKVCache:
        return PagedKVCache(jnp.asarray(self.k_pages), jnp.asarray(self.v_pages))

    def slots(self, row: int, query: int) -> range:
        """What one query sees."""
        last = int(self.positions[row, query])
        return range(0 if self.sliding_window is None else max(0, last - self.sliding_window + 1), last + 1)

    def expected(self) -> np.ndarray:
        """[B T H C], a query and a head at a time."""
        out = np.zeros(self.q.shape)
        page_size = self.k_pages.shape[3]
        group = self.q.shape[2] // self.k_pages.shape[2]
        for row, query in np.ndindex(self.positions.shape):
            slots = np.array(self.slots(row, query), int)
            pages, offsets = self.page_table[row, slots // page_size], slots % page_size
            for head in range(self.q.shape[2] if len(slots) else 0):
                k, v = (
                    cached[self.layer, pages, head // group, offsets].astype(np.float64)
                    for cached in (self.k_pages, self.v_pages)
                )
                scores = self.q.shape[3] ** -0.5 * (k @ self.q[row, query, head].astype(np.float64))
                weights = np.exp(scores - scores.max())
                out[row, query, head] = weights @ v / weights.sum()
        return out

    def found(self, **options) -> np.ndarray:
        decode, prefill = compiled(self.implementation)
        q, table, positions = map(jnp.asarray, (self.q, self.page_table, self.positions))
        options |= {"layer": self.layer, "sliding_window": self.sliding_window}
        if self.q.shape[1] > 1:
            return np.asarray(prefill(q, self.cache, table, positions, **options), np.float64)
        return np.asarray(decode(q[:, 0], self.cache, table, positions[:, 0] + 1, **options)[:, None], np.float64)

    def check(self) -> np.ndarray:
        found = self.found()
        np.testing.assert_allclose(found, self.expected(), rtol=0, atol=TOLERANCES[self.k_pages.dtype.name])
        return found

    def close(self, found: np.ndarray, expected: np.ndarray) -> bool:
        return np.allclose(found, expected, rtol=0, atol=TOLERANCES[self.k_pages.dtype.name])

    def swapped(self) -> Problem:
        return replace(self, k_pages=self.v_pages, v_pages=self.k_pages)


@functools.cache
def compiled(implementation: str):
    of = IMPLEMENTATIONS[implementation]
    return [jax.jit(f, static_argnames=("layer", "sliding_window")) for f in (of.decode, of.prefill)]


def problem(
    implementation: str, heads: tuple[int, int], positions, dtype: str | None = None, seed: int = 0, **kwargs
) -> Problem:
    """Random numbers where a query may look, NaN everywhere else; pages in random order, one of them in two rows."""
    of = IMPLEMENTATIONS[implementation]
    rng = np.random.default_rng(seed)
    positions = np.array(positions, np.int32)
    rows = len(positions)
    n_heads, kv_heads = heads
    num_pages = rows * of.width + 3
    table = rng.permutation(num_pages)[: rows * of.width].reshape(rows, of.width).astype(np.int32)
    lengths = positions.max(axis=1) + 1
    sharers = np.flatnonzero(lengths >= of.page)[-2:]
    table[sharers, 0] = table[sharers[:1], 0]  # two rows with the same beginning
    shape = (LAYERS, num_pages, kv_heads, of.page, of.dim)
    k, v = (rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype or of.dtypes[0])) for _ in range(2))
    q = rng.standard_normal((*positions.shape, n_heads, of.dim)).astype(np.float32)
    found = Problem(implementation, q, k, v, table, positions, **kwargs)
    seen = np.zeros((LAYERS, num_pages, of.page), bool)
    for row, query in np.ndindex(positions.shape):
        for slot in found.slots(row, query):
            seen[found.layer, table[row, slot // of.page], slot % of.page] = True
    for pages in (k, v):
        np.moveaxis(pages, 2, -1)[~seen] = np.nan
    return found


def one_query_each(implementation: str, heads: str, dtype: str | None = None, **kwargs) -> Problem:
    rows = [[length - 1] for length in IMPLEMENTATIONS[implementation].lengths]
    return problem(implementation, HEADS[heads], rows, dtype, **kwargs)


def several_queries_each(implementation: str, heads: str, dtype: str | None = None, **kwargs) -> Problem:
    """Padding behind, before and instead of queries; one row that goes over the end of a page."""
    page, longest = IMPLEMENTATIONS[implementation].page, IMPLEMENTATIONS[implementation].longest
    rows = [
        [-1, -1, -1, -1],
        [0, -1, -1, -1],
        [0, 1, 2, 3],
        [page - 2, page - 1, page, page + 1],
        [-1, -1, page - 2, page - 1],
        [longest - 4, longest - 3, longest - 2, longest - 1],
    ]
    return problem(implementation, HEADS[heads], rows, dtype, **kwargs)


NAMES = [
    "xla",
    pytest.param("native", marks=needs_native),
    "interpreted",
    pytest.param("device", marks=pytest.mark.gpu),
]
KERNEL = NAMES[1:]
suite = pytest.mark.parametrize("implementation", NAMES)
KINDS = [
    pytest.param("xla", one_query_each, id="xla-decode"),
    pytest.param("xla", several_queries_each, id="xla-prefill"),
    pytest.param("native", one_query_each, id="native-decode", marks=needs_native),
    pytest.param("native", several_queries_each, id="native-prefill", marks=needs_native),
    pytest.param("native-20", one_query_each, id="native-20-decode", marks=needs_native),
    pytest.param("native-20", several_queries_each, id="native-20-prefill", marks=needs_native),
    pytest.param("interpreted", one_query_each, id="interpreted"),
    pytest.param("device", one_query_each, id="device", marks=pytest.mark.gpu),
]
kinds = pytest.mark.parametrize(("implementation", "make"), KINDS)


@kinds
@pytest.mark.parametrize("heads", HEADS)
def test_equals_the_reference(implementation, make, heads):
    dtypes = IMPLEMENTATIONS[implementation].dtypes
    # A program takes the interpreter a second: it runs the second type for one kind of heads.
    for dtype in dtypes if implementation != "interpreted" or heads == "gqa" else dtypes[:1]:
        given = make(implementation, heads, dtype)
        expected = given.expected()
        assert not np.isnan(expected).any() and np.all(expected[0] == 0)
        assert np.all(given.check()[0] == 0)
        assert not given.close(given.swapped().found(), expected), "K and V are not told apart"


@kinds
def test_tables_lengths_and_sharing_are_data(implementation, make):
    """The compiled program of one problem serves any other of its shape."""
    for seed in range(1, 3 if implementation == "interpreted" else 6):
        make(implementation, "gqa", seed=seed).check()


@kinds
@pytest.mark.parametrize("layer", [0, 2])
def test_layers(implementation, make, layer):
    """All other layers are NaN, so a wrong one shows."""
    make(implementation, "gqa", layer=layer).check()


def windows(implementation: str) -> list[int]:
    page, longest = IMPLEMENTATIONS[implementation].page, IMPLEMENTATIONS[implementation].longest
    if implementation == "interpreted":
        return [1, page + 1, 10**12]
    return [1, page - 1, page, page + 1, 2 * page + 3, longest - 1, longest, 10**12]


@kinds
def test_windows_end_where_they_should(implementation, make):
    """One slot more would be NaN. One less, or all that came before, is another result."""
    of = IMPLEMENTATIONS[implementation]
    everything = make(implementation, "gqa")
    for window in windows(implementation):
        given = make(implementation, "gqa", sliding_window=window)
        found = given.check()
        assert np.all(found[0] == 0)
        if not of.exact and window > of.page + 1:
            continue  # one slot of many is less than the rounding of 16 bits
        if 1 < window <= of.longest:
            assert not given.close(found, replace(given, sliding_window=window - 1).expected())
        if window < of.longest:
            found = replace(everything, sliding_window=window).check()
            assert not given.close(found, everything.expected())


@pytest.mark.parametrize(
    ("implementation", "make", "heads"),
    [
        pytest.param(*kind.values, heads, id=f"{kind.id}-{heads}", marks=kind.marks)
        for kind in KINDS
        for heads in (["gqa"] if kind.id == "interpreted" else HEADS)
    ],
)
def test_windows_of_other_shapes(implementation, make, heads):
    """All kinds of heads, tables and lengths; many lengths of one row in one batch."""
    of = IMPLEMENTATIONS[implementation]
    for seed in range(0 if implementation == "interpreted" else 3):
        make(implementation, heads, of.dtypes[-1], seed=seed, sliding_window=of.page + 3).check()
    lengths = range(-1, of.longest, 1 if of.exact else 21)
    problem(implementation, HEADS[heads], [[last] for last in lengths], sliding_window=of.page + 3).check()


def test_queries_far_apart_leave_a_gap_between_their_windows():
    rows = [[3, LONGEST - 1], [-1, PAGE], [LONGEST - 2, 0]]
    problem("xla", HEADS["gqa"], rows, sliding_window=3).check()


@pytest.mark.parametrize(
    ("positions", "window", "pages"),
    [
        ([[LONGEST - 1], [0]], None, WIDTH),
        ([[LONGEST - 1], [0]], LONGEST, WIDTH),
        ([[LONGEST - 1], [0]], LONGEST - 1, WIDTH),
        ([[LONGEST - 1], [0], [-1]], PAGE, 1),  # each row has its own first page
        ([[LONGEST - 1], [0], [-1]], PAGE + 1, 2),
        ([[LONGEST - 2], [PAGE - 1]], PAGE, 2),
        ([[LONGEST - 1], [LONGEST - 1]], 1, 1),
        ([[-1], [-1]], 1, 0),
        ([[-1], [-1]], None, 0),
        ([[LONGEST - 3, LONGEST - 2, LONGEST - 1, -1]], 2 * PAGE - 2, 2),  # padding does not count
        ([[LONGEST - 3, LONGEST - 2, LONGEST - 1, -1]], 2 * PAGE - 1, 3),
    ],
)
def test_only_pages_within_reach_are_visited(monkeypatch, positions, window, pages):
    """The XLA implementation takes one trip per page: as many as the row with most of them to see."""
    trips: list[int] = []
    fori_loop = jax.lax.fori_loop

    def counted(lower, upper, body, start):
        trips.append(max(0, int(upper) - int(lower)))
        return fori_loop(lower, upper, body, start)

    monkeypatch.setattr(jax.lax, "fori_loop", counted)
    given = problem("xla", HEADS["mqa"], positions, sliding_window=window)
    q, table, last = map(jnp.asarray, (given.q, given.page_table, given.positions))
    found = XLA.prefill(q, given.cache, table, last, layer=given.layer, sliding_window=window)
    np.testing.assert_allclose(found, given.expected(), rtol=0, atol=TOLERANCES["float32"])
    assert trips == [pages]


def test_padding_queries_give_zeros():
    given = several_queries_each("xla", "gqa")
    found = given.found()
    assert np.all(found[given.positions < 0] == 0)
    assert np.all(np.any(found[given.positions >= 0] != 0, axis=-1))


@suite
def test_scores_of_any_size(implementation):
    """Softmax is taken relative to the largest score: e**400 would overflow."""
    given = one_query_each(implementation, "gqa")
    given = replace(given, q=given.q * np.float32(100 * given.q.shape[-1] ** 0.5))
    if given.k_pages.dtype == np.float32:
        np.testing.assert_allclose(given.found(), given.expected(), rtol=0, atol=1e-3)
    else:
        # The rounding of K and queries moves scores of a thousand by more than their distance: which of them wins is
        # open, but each result is a mean of values, not larger (but for rounding) than the largest of them.
        assert np.all(np.abs(given.found()) <= 1.01 * np.nanmax(np.abs(given.v_pages.astype(np.float32))))


@suite
def test_result_has_the_dtype_of_the_queries(implementation):
    other = IMPLEMENTATIONS[implementation].dtypes[-1]
    given = one_query_each(implementation, "mqa", other)
    arrays = (given.cache, given.page_table, given.positions[:, 0] + 1)
    decode, _ = compiled(implementation)
    for dtype in (jnp.dtype("float32"), jnp.dtype(other)):
        q = jax.ShapeDtypeStruct(given.q[:, 0].shape, dtype)
        out = jax.eval_shape(functools.partial(decode, layer=0), q, *arrays)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)


# ------------------------------------------------------------------------------------------------------- inactive rows


@suite
def test_inactive_rows_give_zeros_and_the_others_what_they_gave(implementation):
    given = one_query_each(implementation, "gqa")
    active = np.array([True, True, False, True, False, True])
    found = given.found(active=jnp.asarray(active))
    assert np.all(found[~active] == 0)
    np.testing.assert_array_equal(found[active], given.found()[active])
    assert np.all(given.found(active=jnp.zeros(len(active), bool)) == 0)


@pytest.mark.parametrize("implementation", KERNEL)
def test_entries_that_no_row_needs_are_not_looked_up(implementation):
    """Pages that do not exist stand behind each row's length, before its window, and in all of an inactive row."""
    of = IMPLEMENTATIONS[implementation]
    window = of.page + 1
    given = one_query_each(implementation, "gqa", sliding_window=window)
    active = np.array([True, True, False, True, True, True])
    lengths = np.where(active, of.lengths, 0)
    page = np.arange(of.width)
    needed = (page < -(-lengths[:, None] // of.page)) & (page >= (np.maximum(lengths - window, 0) // of.page)[:, None])
    wild = replace(given, page_table=np.where(needed, given.page_table, 10**6).astype(np.int32))
    found = wild.found(active=jnp.asarray(active))
    np.testing.assert_array_equal(found, np.where(active[:, None, None, None], given.found(), 0))


# --------------------------------------------------------------------------------------- tokens of any rows, any order


@functools.cache
def ragged(implementation: str) -> Callable:
    return jax.jit(
        functools.partial(pallas_kernels.ragged_paged_attention, implementation=implementation),
        static_argnames=("layer", "sliding_window"),
    )


def check_ragged(implementation: str, given: Problem, rows: np.ndarray, queries: np.ndarray) -> None:
    """Tokens `queries[n]` of `rows[n]`, in this order, one behind another; a row of -1 is padding."""
    if implementation == "native":
        rows, queries = np.tile(rows, COPIES), np.tile(queries, COPIES)
    padding = rows < 0
    positions = np.where(padding, -1, given.positions[rows, queries])
    arrays = given.q[rows, queries], given.cache, given.page_table, np.maximum(rows, 0), positions
    options = {"layer": given.layer, "sliding_window": given.sliding_window}
    found = np.asarray(ragged(implementation)(*jax.tree.map(jnp.asarray, arrays), **options), np.float64)
    expected = np.where(padding[:, None, None], 0, given.expected()[rows, queries])
    assert np.all(found[positions < 0] == 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCES[given.k_pages.dtype.name])


RAGGED = pytest.mark.parametrize("implementation", ["xla", pytest.param("native", marks=needs_native)])


@pytest.mark.parametrize(
    ("implementation", "heads", "dim"),
    [
        pytest.param("xla", (6, 2), 16),
        *(
            pytest.param("native", heads, dim, marks=needs_native)
            for heads, dim in [((2, 2), 64), ((6, 2), 16), ((9, 1), 64), ((6, 2), 20), ((40, 1), 16)]
        ),
    ],
)
def test_tokens_of_several_rows_in_one_call(implementation, heads, dim, monkeypatch):
    """Runs of one token to many, rows that come back, padding in between: all see what they see by themselves."""
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", replace(XLA, dim=dim))
    ascending = [np.arange(first, first + PAGE + 3) for first in (0, 2, LONGEST - PAGE - 3, PAGE - 2)]
    lengths = [PAGE + 3, 1, 7, 2]
    together = np.repeat(np.arange(4), lengths), np.concatenate([np.arange(length) for length in lengths])
    order = np.random.default_rng(1).permutation(sum(lengths))
    rows = [-1, 2, 2, -1, -1, 0, 0, 0, 3, -1, 0, 0, -1, 1, 1, 1, 1, 1, 1, 1, -1]
    queries = [0, 3, 4, 0, 0, 5, 6, 7, 9, 0, 8, 9, 0, 10, 0, 1, 3, 2, 8, 9, 0]
    for window in (None, 3, PAGE + 1):
        given = problem("xla", heads, ascending, sliding_window=window)
        check_ragged(implementation, given, *together)
        check_ragged(implementation, given, *(array[order] for array in together))
        check_ragged(implementation, given, np.array(rows), np.array(queries))


@RAGGED
def test_a_row_alone_may_go_back_and_forth(implementation):
    """One row of the page table takes a way of its own in XLA's implementation."""
    given = problem("xla", HEADS["gqa"], [[5, 2, -1, LONGEST - 1, 0, PAGE]], sliding_window=4)
    check_ragged(implementation, given, np.array([0, 0, -1, 0, 0, 0, 0]), np.array([0, 1, 0, 2, 3, 4, 5]))


@RAGGED
def test_all_of_a_long_row_and_of_a_short_one(implementation):
    """More tokens than a block of work holds, for every group of heads."""
    positions = np.stack([np.arange(LONGEST), np.where(np.arange(LONGEST) < 5, np.arange(LONGEST), -1)])
    rows = np.repeat([0, 1], [LONGEST, 5])
    for heads in HEADS.values():
        check_ragged(implementation, problem("xla", heads, positions), rows, np.r_[:LONGEST, :5])


# ------------------------------------------------------------------------------------------------- only of the kernel


@pytest.mark.parametrize("implementation", KERNEL)
def test_other_rows_change_nothing(implementation):
    """Where a row is cut into pieces depends on its length alone: weights are rounded alike in every batch.

    What is left are the last digits in float32, in which XLA joins the pieces.
    """
    given = one_query_each(implementation, "gqa")
    rows = [5, 2, 4]
    fewer = replace(given, q=given.q[rows], page_table=given.page_table[rows], positions=given.positions[rows])
    np.testing.assert_allclose(fewer.found(), given.found()[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", KERNEL)
@pytest.mark.parametrize(
    ("heads", "dim", "page"),
    [((2, 2), 96, 64), ((2, 1), 128, 128), ((2, 1), 256, 64), ((12, 1), 64, 64), ((128, 2), 64, 64)],
    ids=str,
)
def test_shapes_of_heads_and_pages(monkeypatch, implementation, heads, dim, page):
    shape = replace(IMPLEMENTATIONS[implementation], dim=dim, page=page, width=3)
    monkeypatch.setitem(IMPLEMENTATIONS, implementation, shape)
    problem(implementation, heads, [[-1], [page - 2], [3 * page - 1]], sliding_window=page + 5).check()


@needs_native
def test_native_shapes_of_heads_and_pages(monkeypatch):
    """Groups of every width, more heads than a tile of queries has, dimensions and pages of several steps."""
    for heads, dim, page in (
        ((5, 1), 16, 8),
        ((14, 2), 48, 8),
        ((15, 1), 32, 3),
        ((18, 2), 64, 8),
        ((40, 1), 32, 8),
        ((40, 1), 20, 8),
        ((2, 1), 256, 96),
        ((6, 3), 7, 96),
    ):
        monkeypatch.setitem(IMPLEMENTATIONS, "native", replace(NATIVE, dim=dim, page=page, width=3))
        rows = [[-1, -1], [page - 2, page - 1], [-1, page], [3 * page - 2, 3 * page - 1]]
        for window in (None, page + 2):
            problem("native", heads, [row[-1:] for row in rows], sliding_window=window).check()
            problem("native", heads, rows, sliding_window=window).check()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "dim", "dtype"),
    [((32, 32), 128, "bfloat16"), ((32, 8), 128, "float16"), ((32, 8), 64, "bfloat16"), ((16, 8), 128, "bfloat16")],
    ids=str,
)
def test_rows_and_heads_of_real_models(monkeypatch, heads, dim, dtype):
    """Rows of one to five pieces; with 32 KV heads more work than there are blocks."""
    monkeypatch.setitem(IMPLEMENTATIONS, "device", replace(DEVICE, dim=dim, width=36))
    problem("device", heads, [[last] for last in range(35, 36 * 64, 280)], dtype).check()


@pytest.mark.parametrize(
    ("q", "pages", "parts"),
    [
        ((4, 64), ((2, 64, 64), "float32"), ["bfloat16 or float16", "float32"]),
        ((4, 80), ((2, 64, 80), "bfloat16"), ["64, 96, 128, 256", "80"]),
        ((4, 64), ((2, 32, 64), "bfloat16"), ["page size", "64", "32"]),
        ((4, 64), ((2, 96, 64), "bfloat16"), ["page size", "96"]),
        ((130, 64), ((2, 64, 64), "bfloat16"), ["64 query heads", "65"]),
        ((128, 64), ((2, 64, 64), "bfloat16"), []),
    ],
)
def test_the_kernel_says_what_it_does_not_take(q, pages, parts):
    shape, dtype = pages
    q = jnp.zeros((3, *q))
    pool = jnp.zeros((LAYERS, 5, *shape), dtype)
    reason = mosaic.refusal(q, pool)
    assert all(part in str(reason) for part in parts) and (reason is None) == (not parts)
    if parts:
        with pytest.raises(ValueError) as caught:
            mosaic.paged_attention(
                q, PagedKVCache(pool, pool), jnp.zeros((3, 2), jnp.int32), jnp.zeros(3, jnp.int32), layer=0
            )
        assert str(caught.value) == reason


# -------------------------------------------------------------------------------------------------------- bad arguments

POOL = (LAYERS, 5, 2, PAGE, DIM)


def arguments(**changes) -> dict:
    shapes = {
        "q": ((3, 4, DIM), jnp.float32),
        "k_pages": (POOL, jnp.float32),
        "v_pages": (POOL, jnp.float32),
        "page_table": ((3, WIDTH), jnp.int32),
        "lengths": ((3,), jnp.int32),
    }
    shapes |= {name: value for name, value in changes.items() if name in shapes}
    arrays: dict = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    arrays["cache"] = PagedKVCache(arrays.pop("k_pages"), arrays.pop("v_pages"))
    return arrays | {"layer": changes.get("layer", 0), "sliding_window": changes.get("sliding_window")}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"v_pages": ((LAYERS, 4, 2, PAGE, DIM), jnp.float32)}, ["cache.k", "cache.v", "[3, 4, 2, 8, 16]"]),
        ({"v_pages": (POOL, jnp.bfloat16)}, ["cache.k", "cache.v", "float32", "bfloat16"]),
        ({"k_pages": (POOL[1:], jnp.float32), "v_pages": (POOL[1:], jnp.float32)}, ["cache.k", "[L, P, K, S, C]"]),
        ({"q": ((3, 4, DIM + 2), jnp.float32)}, ["q ", str(DIM + 2), str(DIM)]),
        ({"q": ((3, 5, DIM), jnp.float32)}, ["q ", "5 heads", "multiple"]),
        ({"page_table": ((2, WIDTH), jnp.int32)}, ["page_table", "[3, M]", "[2, 4]"]),
        ({"page_table": ((3,), jnp.int32)}, ["page_table", "[3]"]),
        ({"lengths": ((2,), jnp.int32)}, ["lengths", "[3]", "[2]"]),
        ({"layer": LAYERS}, ["layer", "0..2", "3"]),
        ({"layer": -1}, ["layer", "0..2", "-1"]),
        ({"sliding_window": 0}, ["sliding_window", "at least 1", "got 0"]),
        ({"sliding_window": -4}, ["sliding_window", "got -4"]),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, parts):
    given = arguments(**changes)
    with pytest.raises(ValueError) as caught:
        pallas_kernels.paged_attention(**given)
    assert all(part in str(caught.value) for part in parts), caught.value
    if "[3, M]" in parts:
        return  # tokens of any row: there may be fewer rows
    positions = given.pop("lengths")
    with pytest.raises(ValueError) as caught:
        pallas_kernels.ragged_paged_attention(**given, rows=jnp.zeros(3, jnp.int32), positions=positions)
    assert any(part in str(caught.value) for part in [parts[0], "positions"]), caught.value


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((3, 1, 4, DIM))}, r"q must have 3 dimensions, got \[3, 1, 4, 16\]"),
        ({"rows": jnp.zeros(2, jnp.int32)}, r"rows must be \[3\], one per token of q, got \[2\]"),
        ({"positions": jnp.zeros((3, 1), jnp.int32)}, r"positions must be \[3\], one per token of q, got \[3, 1\]"),
        ({"rows": jnp.zeros(3)}, "rows must be integers, got float32"),
        ({"page_table": jnp.zeros(4, jnp.int32)}, r"page_table must be \[R, M\], .*got \[4\]"),
        ({"implementation": "mosaic"}, "implementation is 'mosaic', but there is no such kernel for this: only native"),
    ],
)
def test_tokens_must_fit_their_rows(changes, message):
    given = arguments() | {"rows": jnp.zeros(3, jnp.int32), "positions": jnp.zeros(3, jnp.int32)}
    del given["lengths"]
    with pytest.raises(ValueError, match=message):
        pallas_kernels.ragged_paged_attention(**(given | changes))
