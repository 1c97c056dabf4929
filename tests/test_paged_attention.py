"""Attention over the paged cache, against float64 NumPy: one suite for every implementation.

An implementation is a pair of functions with the signatures of `pallas_kernels.api`; add it to `IMPLEMENTATIONS` and it
is put to all of this. Whatever no query may see is NaN: one read too many shows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels

LAYERS, PAGE, WIDTH, DIM = 3, 8, 4, 16
LONGEST = PAGE * WIDTH
LENGTHS = (0, 1, PAGE - 1, PAGE, PAGE + 1, LONGEST)
WINDOWS = (1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 3, LONGEST - 1, LONGEST, 10**12)
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}

IMPLEMENTATIONS = {
    "api": (pallas_kernels.paged_attention, pallas_kernels.paged_prefill_attention),
}

TOLERANCES = {
    # Sums of at most 32 products of normal numbers: rounding adds up to about 1e-6.
    "float32": 1e-5,
    # The reference reads the same bfloat16 K and V. What is rounded on the way are the scaled queries and the weights,
    # each by 2**-9: scores of size 4 move by 0.008, weights by 1 %, and values are of size 3 at the most.
    "bfloat16": 3e-2,
}


@dataclass(frozen=True)
class Problem:
    """Arguments of one call. `positions [B, T]` holds each query's last visible position, -1 for none."""

    q: np.ndarray  # [B T H C]
    k_pages: np.ndarray  # [L P K S C]
    v_pages: np.ndarray
    page_table: np.ndarray  # [B M]
    positions: np.ndarray
    layer: int = 1
    scale: float | None = None
    sliding_window: int | None = None

    def slots(self, row: int, query: int) -> range:
        """What one query sees."""
        last = int(self.positions[row, query])
        return range(0 if self.sliding_window is None else max(0, last - self.sliding_window + 1), last + 1)

    def expected(self) -> np.ndarray:
        """[B T H C], a query and a head at a time."""
        out = np.zeros(self.q.shape)
        group = self.q.shape[2] // self.k_pages.shape[2]
        scale = self.q.shape[3] ** -0.5 if self.scale is None else self.scale
        for row, query in np.ndindex(self.positions.shape):
            where = [(self.page_table[row, slot // PAGE], slot % PAGE) for slot in self.slots(row, query)]
            for head in range(self.q.shape[2] if where else 0):
                k, v = (
                    np.array([pages[self.layer, page, head // group, offset] for page, offset in where], np.float64)
                    for pages in (self.k_pages, self.v_pages)
                )
                scores = scale * (k @ self.q[row, query, head].astype(np.float64))
                weights = np.exp(scores - scores.max())
                out[row, query, head] = weights @ v / weights.sum()
        return out

    def found(self, implementation: str) -> np.ndarray:
        decode, prefill = compiled(implementation)
        arrays = [jnp.asarray(a) for a in (self.q, self.k_pages, self.v_pages, self.page_table, self.positions)]
        options = {"layer": self.layer, "scale": self.scale, "sliding_window": self.sliding_window}
        if self.q.shape[1] > 1:
            return np.asarray(prefill(*arrays, **options), np.float64)
        q, *rest, positions = arrays
        return np.asarray(decode(q[:, 0], *rest, positions[:, 0] + 1, **options)[:, None], np.float64)

    def swapped(self) -> Problem:
        return replace(self, k_pages=self.v_pages, v_pages=self.k_pages)


@functools.cache
def compiled(implementation: str):
    return [jax.jit(f, static_argnames=("layer", "scale", "sliding_window")) for f in IMPLEMENTATIONS[implementation]]


def problem(heads: str, positions, dtype: str = "float32", seed: int = 0, **kwargs) -> Problem:
    """Random numbers where a query may look, NaN everywhere else; pages in random order, one of them in two rows."""
    rng = np.random.default_rng(seed)
    positions = np.array(positions, np.int32)
    rows = len(positions)
    n_heads, kv_heads = HEADS[heads]
    num_pages = rows * WIDTH + 3
    table = rng.permutation(num_pages)[: rows * WIDTH].reshape(rows, WIDTH).astype(np.int32)
    lengths = positions.max(axis=1) + 1
    sharers = np.flatnonzero(lengths >= PAGE)[-2:]
    table[sharers, 0] = table[sharers[:1], 0]  # two rows with the same beginning
    shape = (LAYERS, num_pages, kv_heads, PAGE, DIM)
    k, v = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for _ in range(2))
    q = rng.standard_normal((*positions.shape, n_heads, DIM)).astype(np.float32)
    found = Problem(q, k, v, table, positions, **kwargs)
    seen = np.zeros((LAYERS, num_pages, PAGE), bool)
    for row, query in np.ndindex(positions.shape):
        for slot in found.slots(row, query):
            seen[found.layer, table[row, slot // PAGE], slot % PAGE] = True
    for pages in (k, v):
        np.moveaxis(pages, 2, -1)[~seen] = np.nan
    return found


def one_query_each(heads: str, dtype: str = "float32", **kwargs) -> Problem:
    return problem(heads, [[length - 1] for length in LENGTHS], dtype, **kwargs)


def several_queries_each(heads: str, dtype: str = "float32", **kwargs) -> Problem:
    """Padding behind, before and instead of queries; one row that goes over the end of a page."""
    rows = [
        [-1, -1, -1, -1],
        [0, -1, -1, -1],
        [0, 1, 2, 3],
        [PAGE - 2, PAGE - 1, PAGE, PAGE + 1],
        [-1, -1, PAGE - 2, PAGE - 1],
        [LONGEST - 4, LONGEST - 3, LONGEST - 2, LONGEST - 1],
    ]
    return problem(heads, rows, dtype, **kwargs)


def matches(given: Problem, implementation: str, expected: np.ndarray, dtype: str) -> bool:
    return np.allclose(given.found(implementation), expected, rtol=0, atol=TOLERANCES[dtype])


suite = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
kinds = pytest.mark.parametrize("make", [one_query_each, several_queries_each], ids=["decode", "prefill"])


@suite
@kinds
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_the_reference(implementation, make, heads, dtype):
    given = make(heads, dtype)
    expected = given.expected()
    assert not np.isnan(expected).any()
    np.testing.assert_allclose(given.found(implementation), expected, rtol=0, atol=TOLERANCES[dtype])
    assert np.all(expected[0] == 0) and np.all(given.found(implementation)[0] == 0)


@suite
@kinds
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", HEADS)
def test_swapped_keys_and_values_are_noticed(implementation, make, heads, dtype):
    given = make(heads, dtype)
    assert not matches(given.swapped(), implementation, given.expected(), dtype)


@suite
@kinds
def test_tables_lengths_and_sharing_are_data(implementation, make):
    """The compiled program of one problem serves any other of its shape."""
    for seed in range(1, 6):
        given = make("gqa", seed=seed)
        np.testing.assert_allclose(given.found(implementation), given.expected(), rtol=0, atol=TOLERANCES["float32"])


@suite
@kinds
@pytest.mark.parametrize(("layer", "scale"), [(0, None), (2, 0.7)])
def test_layer_and_scale(implementation, make, layer, scale):
    """All other layers are NaN, so a wrong one shows."""
    given = make("gqa", layer=layer, scale=scale)
    expected = given.expected()
    np.testing.assert_allclose(given.found(implementation), expected, rtol=0, atol=TOLERANCES["float32"])
    if scale is not None:
        assert not matches(replace(given, scale=None), implementation, expected, "float32")


@suite
@kinds
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_end_where_they_should(implementation, make, window):
    """One slot more would be NaN. One less, or all that came before, is another result."""
    given = make("gqa", sliding_window=window)
    expected = given.expected()
    np.testing.assert_allclose(given.found(implementation), expected, rtol=0, atol=TOLERANCES["float32"])
    assert np.all(expected[0] == 0) and np.all(given.found(implementation)[0] == 0)
    if 1 < window <= LONGEST:
        narrower = replace(given, sliding_window=window - 1)
        assert not matches(narrower, implementation, expected, "float32")
    if window < LONGEST:
        everything = replace(make("gqa"), sliding_window=window)
        assert not matches(replace(everything, sliding_window=None), implementation, everything.expected(), "float32")


@suite
@kinds
@pytest.mark.parametrize("heads", HEADS)
def test_windows_of_other_shapes(implementation, make, heads):
    """All kinds of heads, tables and lengths, in bfloat16; many lengths of one row in one batch."""
    for seed in range(3):
        given = make(heads, "bfloat16", seed=seed, sliding_window=PAGE + 3)
        np.testing.assert_allclose(given.found(implementation), given.expected(), rtol=0, atol=TOLERANCES["bfloat16"])
    every_length = problem(heads, [[last] for last in range(-1, LONGEST)], sliding_window=PAGE + 3)
    np.testing.assert_allclose(
        every_length.found(implementation), every_length.expected(), rtol=0, atol=TOLERANCES["float32"]
    )


@suite
def test_queries_far_apart_leave_a_gap_between_their_windows(implementation):
    given = problem("gqa", [[3, LONGEST - 1], [-1, PAGE], [LONGEST - 2, 0]], sliding_window=3)
    np.testing.assert_allclose(given.found(implementation), given.expected(), rtol=0, atol=TOLERANCES["float32"])


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
    given = problem("mqa", positions, sliding_window=window)
    _, prefill = IMPLEMENTATIONS["api"]
    arrays = (given.q, given.k_pages, given.v_pages, given.page_table, given.positions)
    found = prefill(*map(jnp.asarray, arrays), layer=given.layer, sliding_window=window)
    np.testing.assert_allclose(found, given.expected(), rtol=0, atol=TOLERANCES["float32"])
    assert trips == [pages]


@suite
def test_padding_queries_give_zeros(implementation):
    given = several_queries_each("gqa")
    found = given.found(implementation)
    assert np.all(found[given.positions < 0] == 0)
    assert np.all(np.any(found[given.positions >= 0] != 0, axis=-1))


@suite
def test_scores_of_any_size(implementation):
    """Softmax is taken relative to the largest score: e**400 would overflow."""
    given = one_query_each("mha", scale=100.0)
    np.testing.assert_allclose(given.found(implementation), given.expected(), rtol=0, atol=1e-3)


@suite
def test_result_has_the_dtype_of_the_queries(implementation):
    given = one_query_each("mqa", "bfloat16")
    arrays = (given.k_pages, given.v_pages, given.page_table, given.positions[:, 0] + 1)
    decode, _ = compiled(implementation)
    for dtype in (jnp.float32, jnp.bfloat16):
        q = jax.ShapeDtypeStruct(given.q[:, 0].shape, dtype)
        out = jax.eval_shape(functools.partial(decode, layer=0), q, *arrays)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)


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
    arrays = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    return arrays | {"layer": changes.get("layer", 0), "sliding_window": changes.get("sliding_window")}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"v_pages": ((LAYERS, 4, 2, PAGE, DIM), jnp.float32)}, ["k_pages", "v_pages", "[3, 4, 2, 8, 16]"]),
        ({"v_pages": (POOL, jnp.bfloat16)}, ["k_pages", "v_pages", "float32", "bfloat16"]),
        ({"k_pages": (POOL[1:], jnp.float32), "v_pages": (POOL[1:], jnp.float32)}, ["k_pages", "[L, P, K, S, C]"]),
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
    given["q"], lengths = given["q"][:, None], given.pop("lengths")
    with pytest.raises(ValueError) as caught:
        pallas_kernels.paged_prefill_attention(**given, positions=lengths[:, None])
    assert any(part in str(caught.value) for part in [parts[0], "positions"]), caught.value


def test_positions_must_fit_the_queries():
    given = arguments(q=((3, 2, 4, DIM), jnp.float32))
    del given["lengths"]
    with pytest.raises(ValueError, match=r"positions must be \[3, 2\].* got \[3, 1\]"):
        pallas_kernels.paged_prefill_attention(**given, positions=jnp.zeros((3, 1), jnp.int32))
