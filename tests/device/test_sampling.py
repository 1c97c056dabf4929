"""Logits to tokens: what is kept, what is drawn, what is reported."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax.core import MAX_LOGPROBS
from eejax.device import sampling
from eejax.device.sampling import SamplingRows
from tests.reference import softmax

ROWS, VOCABULARY = 4, 12  # hypothesis draws many problems of this one shape: compiled once

keep_mask = jax.jit(sampling.keep_mask)
sample = jax.jit(sampling.sample)


def sampling_rows(count: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> SamplingRows:
    def row(value, dtype) -> jax.Array:
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (count,)))

    return SamplingRows(
        row(temperature, np.float32),
        row(top_k, np.int32),
        row(top_p, np.float32),
        row(min_p, np.float32),
        row(-1, np.int32),
    )


def keys(*seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))


def kept_by_sorting(probs, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Top-k, then top-p of what is left, then min-p, for one row; tokens tied with the last one kept stay."""
    border = np.sort(probs)[::-1][min(top_k, len(probs)) - 1] if top_k > 0 else 0.0
    left = np.where(probs >= border, probs, 0.0)
    if top_p < 1:
        ordered = np.sort(left)[::-1]
        enough = np.cumsum(ordered) >= top_p * left.sum()
        left = np.where(left >= ordered[np.argmax(enough)], left, 0.0)
    return (left > 0) & (left >= min_p * left.max())


def clear_cut(probs, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether float32 sums decide as exact ones: nothing but exact ties lies within rounding of a border."""
    kept = kept_by_sorting(probs, top_k, 1.0, 0.0)
    left = np.where(kept, probs, 0.0)
    sums = np.cumsum(np.sort(left)[::-1]) / left.sum()
    at_p = top_p == 1 or np.min(np.abs(sums - top_p)) > 1e-5
    ratios = left / left.max()
    return at_p and np.min(np.abs(ratios - min_p)[ratios > 0], initial=1) > 1e-5


# ---------------------------------------------------------------------------------------------------------- keep_mask

# Weights from few values give ties in most examples; powers of two make their sums exact.
weights = st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, 8.0, 16.0, 0.001]), min_size=VOCABULARY, max_size=VOCABULARY)
filters = st.tuples(
    st.integers(0, VOCABULARY + 2),
    st.sampled_from([1.0, 0.99, 0.9, 0.63, 0.5, 0.31, 0.01]),
    st.sampled_from([0.0, 0.01, 0.1, 0.27, 0.6, 1.0]),
)


@settings(max_examples=150)
@given(st.lists(st.tuples(weights, filters), min_size=ROWS, max_size=ROWS))
def test_kept_tokens_are_those_of_sorting(drawn):
    probs = np.array([np.array(w) / np.sum(w) for w, _ in drawn], np.float32)
    top_k, top_p, min_p = zip(*(f for _, f in drawn), strict=True)
    found = np.asarray(keep_mask(jnp.asarray(probs.T), sampling_rows(ROWS, 1.0, top_k, top_p, min_p))).T
    for row in range(ROWS):
        p, k, nucleus, least = probs[row].astype(np.float64), top_k[row], top_p[row], min_p[row]
        assert found[row].any() and found[row][p.argmax()]
        # A border may coincide with a sum (0.5 of four equals) or with a ratio; min_p of 1 keeps the first rank.
        if clear_cut(p, k, nucleus, least if least < 1 else 0.0):
            np.testing.assert_array_equal(found[row], kept_by_sorting(p, k, nucleus, least), err_msg=str(drawn[row]))


@pytest.mark.parametrize("seed", range(4))
def test_kept_tokens_of_a_real_vocabulary(seed):
    rng = np.random.default_rng(seed)
    probs = softmax(3 * rng.standard_normal((8, 3000))).astype(np.float32)
    top_k, top_p, min_p = rng.integers(0, 60, 8), rng.uniform(0.05, 1, 8), rng.uniform(0, 0.1, 8)
    found = np.asarray(keep_mask(jnp.asarray(probs.T), sampling_rows(8, 1.0, top_k, top_p, min_p))).T
    compared = 0
    for row in range(8):
        p = probs[row].astype(np.float64)
        if clear_cut(p, top_k[row], top_p[row], min_p[row]):
            compared += 1
            np.testing.assert_array_equal(found[row], kept_by_sorting(p, top_k[row], top_p[row], min_p[row]))
    assert compared >= 6


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 1, 2]),  # the second and third tie
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [0]),
        ({"top_p": 0.41}, [0, 1, 2]),
        ({"top_p": 0.85}, [0, 1, 2, 3]),
        ({"top_p": 1e-6}, [0]),
        ({"min_p": 0.45}, [0, 1, 2]),
        ({"min_p": 0.55}, [0]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 1, "top_p": 0.99}, [0]),
        ({"top_k": 3, "top_p": 0.49}, [0]),  # 0.49 of the 0.8 that top-k leaves: top-p comes second
        ({"top_p": 0.85, "min_p": 0.3}, [0, 1, 2]),
    ],
)
def test_kept_tokens_by_hand(options, kept):
    probs = np.array([0.4, 0.2, 0.2, 0.12, 0.08], np.float32)[:, None]
    found = np.asarray(keep_mask(jnp.asarray(probs), sampling_rows(1, **options)))[:, 0]
    assert np.flatnonzero(found).tolist() == kept


def test_tokens_without_probability_are_never_kept():
    probs = np.array([0.5, 0.0, 0.5, 0.0], np.float32)[:, None]
    assert np.asarray(keep_mask(jnp.asarray(probs), sampling_rows(1)))[:, 0].tolist() == [True, False, True, False]


# ------------------------------------------------------------------------------------------------------------- sample


def some_logits(rows: int, seed: int = 0) -> np.ndarray:
    return 2 * np.random.default_rng(seed).standard_normal((VOCABULARY, rows)).astype(np.float32)


def test_greedy_rows_take_the_argmax_beside_rows_that_sample():
    logits = some_logits(6)
    for seed in range(3):
        found = sample(jnp.asarray(logits), sampling_rows(6, [0, 1, 0, 5, 0, 9]), keys(*range(seed, seed + 6)))
        assert np.asarray(found)[::2].tolist() == logits.argmax(axis=0)[::2].tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 2e-38, 1e-40])
def test_low_temperatures_are_nearly_greedy(temperature):
    """Down to where dividing by the temperature overflows."""
    logits = 10 * some_logits(6)
    found = sample(jnp.asarray(logits), sampling_rows(6, temperature), keys(*range(6)))
    assert found.tolist() == logits.argmax(axis=0).tolist()


def test_a_key_decides_alone():
    """The same key and logits give the same token in any place of any batch; other keys give others."""
    logits = some_logits(1).repeat(6, axis=1)
    drawn = [sample(jnp.asarray(logits), sampling_rows(6, 2.0), keys(*range(s, s + 6))).tolist() for s in range(20)]
    assert drawn[0] == sample(jnp.asarray(logits), sampling_rows(6, 2.0), keys(*range(6))).tolist()
    for start in range(19):
        assert drawn[start][1:] == drawn[start + 1][:5]
    alone = sample(jnp.asarray(logits[:, :1]), sampling_rows(1, 2.0), keys(3))
    assert alone.tolist() == drawn[0][3:4]
    assert len({one for row in drawn for one in row}) > 5


@functools.partial(jax.jit, static_argnums=0)
def many_samples(count: int, logits, rows) -> jax.Array:
    def one(i) -> jax.Array:
        return sampling.sample(logits, rows, jax.vmap(jax.random.key)(i * 4 + jnp.arange(4)))

    return jax.lax.map(one, jnp.arange(count), batch_size=500)


def test_tokens_are_drawn_with_their_probabilities():
    logits, count = some_logits(4, seed=3), 4000
    temperature, top_k, top_p, min_p = [0.5, 1.0, 2.0, 1.0], [0, 5, 0, 0], [1.0, 1.0, 0.8, 1.0], [0, 0, 0, 0.1]
    rows = sampling_rows(4, temperature, top_k, top_p, min_p)
    drawn = np.asarray(many_samples(count, jnp.asarray(logits), rows))
    for row in range(4):
        probs = softmax(logits[:, row].astype(np.float64) / temperature[row])
        kept = kept_by_sorting(probs, top_k[row], top_p[row], min_p[row])
        expected = count * np.where(kept, probs, 0) / probs[kept].sum()
        found = np.bincount(drawn[:, row], minlength=VOCABULARY)
        assert not np.any(found[~kept])
        chi_square = np.sum((found[kept] - expected[kept]) ** 2 / expected[kept])
        assert chi_square < 35  # with at most 11 degrees of freedom fewer than 1 in 2000 are above 33


# ------------------------------------------------------------------------------------------------------------ logprobs


@pytest.mark.parametrize("vocabulary", [2, MAX_LOGPROBS - 1, MAX_LOGPROBS, 300])
def test_reported_logprobs(vocabulary):
    logits = 3 * np.random.default_rng(vocabulary).standard_normal((vocabulary, 5)).astype(np.float32)
    tokens = np.array([0, 1, vocabulary - 1, logits[:, 3].argmax(), logits[:, 4].argmin()], np.int32)
    found = sampling.token_logprobs(jnp.asarray(logits), jnp.asarray(tokens))
    logp = np.log(softmax(logits.T.astype(np.float64)))
    shown = min(vocabulary, MAX_LOGPROBS)
    assert found.top.shape == found.top_ids.shape == (MAX_LOGPROBS, 5)
    for row, token in enumerate(tokens):
        order = np.argsort(-logp[row])
        assert found.top_ids[:shown, row].tolist() == order[:shown].tolist()
        np.testing.assert_allclose(found.top[:shown, row], logp[row][order[:shown]], rtol=1e-5, atol=1e-6)
        assert found.chosen[row] == pytest.approx(logp[row, token], rel=1e-5, abs=1e-6)
        assert found.rank[row] == 1 + order.tolist().index(token)
    assert np.all(np.asarray(found.top[shown:]) == -np.inf)  # places that a small vocabulary leaves empty
    assert np.all(np.asarray(found.top_ids[shown:]) == -1)


def test_tied_tokens_share_a_rank():
    found = sampling.token_logprobs(jnp.array([[1.0], [3.0], [1.0], [2.0]]), jnp.array([2]))
    assert found.rank.tolist() == [3]
