"""Confidence measures, thresholds and the random draw, each against the formula in NumPy."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eejax.core import LOGIT_MEASURES, MEASURES
from eejax.device import exits
from eejax.device.decode_state import ExitRows
from eejax.device.exits import Observation
from pallas_kernels import Best
from tests.reference import softmax


def rows(count: int, **changes) -> ExitRows:
    """Rows with constant thresholds of 0.5 at two exits, each with a key of its own."""
    values = {
        "thresholds": np.full((2, count), 0.5, np.float32),
        "measure": np.zeros(count, np.int32),
        "tau": np.full(count, -1, np.float32),
        "horizon": np.full(count, 16, np.float32),
        "gates": np.zeros(count, np.float32),
        "keys": np.stack([np.arange(count), np.zeros(count)], axis=1).astype(np.uint32),
    }
    return ExitRows(**{name: jnp.asarray(value) for name, value in (values | changes).items()})


def steps(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


def confidence(measure: str, logits, uniform=None) -> np.ndarray:
    """Of `logits [V, B]`, all rows under one measure."""
    logits = np.asarray(logits, np.float32)
    count = logits.shape[1]
    uniform = np.zeros(count, np.float32) if uniform is None else uniform
    given = rows(count, measure=np.full(count, MEASURES.index(measure), np.int32))
    return np.asarray(exits.confidence(given, Observation(Best.of(jnp.asarray(logits)), uniform=jnp.asarray(uniform))))


def test_constant_thresholds_stay():
    given = rows(3, thresholds=np.array([[0.1, 0.2, np.inf], [0.4, 0.5, 0.6]], np.float32))
    for step in (steps(0, 0, 0), steps(3, 900, 5)):
        np.testing.assert_allclose(exits.thresholds_at(given, 0, step), [0.1, 0.2, np.inf], rtol=1e-6)
        np.testing.assert_allclose(exits.thresholds_at(given, 1, step), [0.4, 0.5, 0.6], rtol=1e-6)


def test_decaying_thresholds_follow_the_formula():
    base, tau, horizon = 0.8, np.array([0.0, 4.0, 4.0, 11.0]), np.array([10, 10, 40, 7])
    given = rows(
        4,
        thresholds=np.full((2, 4), base, np.float32),
        tau=tau.astype(np.float32),
        horizon=horizon.astype(np.float32),
    )
    for t in (0, 1, 6):
        expected = [0.9 * base + 0.1 * math.exp(-a * t / n) for a, n in zip(tau, horizon, strict=True)]
        np.testing.assert_allclose(exits.thresholds_at(given, 1, steps(t, t, t, t)), expected, rtol=1e-6)
    assert exits.thresholds_at(given, 0, steps(0, 0, 0, 0)).tolist() == pytest.approx([0.82] * 4)


def test_decaying_and_constant_thresholds_side_by_side():
    given = rows(2, tau=np.array([-1, 2], np.float32))
    found = exits.thresholds_at(given, 0, steps(8, 8))
    np.testing.assert_allclose(found, [0.5, 0.45 + 0.1 * math.exp(-1.0)], rtol=1e-6)


def test_decaying_thresholds_stay_within_0_and_1():
    given = rows(2, thresholds=np.array([[1.5, 0.0]] * 2, np.float32), tau=np.array([0, 1e6], np.float32))
    assert exits.thresholds_at(given, 0, steps(1, 1)).tolist() == [1.0, 0.0]


def test_rows_without_a_threshold_do_not_take_part():
    given = rows(3, thresholds=np.array([[np.inf, 0.0, 1.0], [0.5, np.inf, np.inf]], np.float32))
    assert exits.may_exit(given, 0).tolist() == [False, True, True]
    assert exits.may_exit(given, 1).tolist() == [True, False, False]


@pytest.mark.parametrize("vocabulary", [2, 7, 500])
@pytest.mark.parametrize("size", [0.1, 3.0, 80.0])
def test_confidence_is_that_of_the_whole_distribution(vocabulary, size):
    logits = size * np.random.default_rng(vocabulary).standard_normal((vocabulary, 6)).astype(np.float32)
    ordered = np.sort(softmax(logits.T.astype(np.float64)), axis=1)
    np.testing.assert_allclose(confidence("softmax", logits), ordered[:, -1], rtol=2e-6)
    np.testing.assert_allclose(confidence("margin", logits), ordered[:, -1] - ordered[:, -2], rtol=2e-5, atol=2e-7)


def test_ties_leave_no_margin():
    logits = np.array([[1.0, 5.0, 0.0], [7.0, 5.0, 0.0], [7.0, -2.0, 0.0], [7.0, 0.0, 0.0]])
    assert confidence("margin", logits).tolist() == [0.0, 0.0, 0.0]
    assert confidence("softmax", logits)[2] == 0.25


def test_confidence_of_huge_and_of_excluded_logits():
    logits = np.array([[3e38, -np.inf], [-3e38, 0.0], [0.0, -np.inf]])
    assert confidence("softmax", logits).tolist() == [1.0, 1.0]
    assert confidence("margin", logits).tolist() == [1.0, 1.0]


def test_each_row_is_judged_by_its_own_measure():
    logits = np.log(np.array([[0.5], [0.3], [0.2]])).repeat(3, axis=1).astype(np.float32)
    measure = np.array([MEASURES.index(name) for name in ("random", "softmax", "margin")], np.int32)
    seen = Observation(Best.of(jnp.asarray(logits)), uniform=jnp.array([0.9, 0.8, 0.7]))
    np.testing.assert_allclose(exits.confidence(rows(3, measure=measure), seen), [0.9, 0.5, 0.2], rtol=1e-5)
    uses = functools.partial(exits.uses, rows(3, measure=measure))
    assert uses(LOGIT_MEASURES).tolist() == [False, True, True]
    assert uses(("random",)).tolist() == [True, False, False]


def test_similarity_is_the_cosine_of_two_states():
    before = np.array([[3.0, 1.0, 0.0, 2.0], [4.0, 0.0, 0.0, 2.0]], np.float32)
    after = np.array([[4.0, -2.0, 0.0, 1e3], [3.0, 0.0, 0.0, 1e3]], np.float32)
    found = np.asarray(exits.similarity(jnp.asarray(before), jnp.asarray(after)))
    np.testing.assert_allclose(found, [0.96, -1.0, 0.0, 1.0], rtol=1e-6)
    rng = np.random.default_rng(0)
    states = rng.standard_normal((5, 1000)).astype(np.float32)
    assert np.asarray(exits.similarity(jnp.asarray(states), jnp.asarray(3 * states))).max() <= 1.0


def test_cheap_measures_are_what_was_observed_and_nothing_else():
    measure = np.array([MEASURES.index(name) for name in ("similarity", "classifier", "softmax", "random")], np.int32)
    given = rows(4, measure=measure)
    four = jnp.array([0.25, 0.0, 0.5, 0.75])
    seen = Observation(similarity=four, probe=jnp.array([9.0, np.log(3.0), 9.0, 9.0]), uniform=1 - four)
    np.testing.assert_allclose(exits.confidence(given, seen), [0.25, 0.75, -np.inf, 0.25], rtol=1e-6)
    assert exits.confidence(given, Observation(uniform=four)).tolist()[:3] == [-np.inf] * 3


def test_random_confidence_ignores_the_logits():
    uniform = np.array([0.1, 0.9], np.float32)
    for logits in (np.zeros((3, 2)), np.full((3, 2), np.nan)):
        assert confidence("random", logits, uniform).tolist() == uniform.tolist()


def test_the_draw_depends_on_key_and_step_alone():
    keys = np.random.default_rng(1).integers(0, 2**32, (5, 2)).astype(np.uint32)
    at = np.array([0, 3, 3, 10, 511], np.int32)
    together = np.asarray(exits.uniform_draw(rows(5, keys=keys), jnp.asarray(at)))
    order = np.array([4, 2, 0, 3, 1])
    other = rows(
        5,
        keys=keys[order],
        thresholds=np.ones((2, 5), np.float32),
        measure=np.full(5, MEASURES.index("margin"), np.int32),
        tau=np.ones(5, np.float32),
    )
    assert exits.uniform_draw(other, jnp.asarray(at[order])).tolist() == together[order].tolist()
    for i in (0, 3):
        alone = exits.uniform_draw(rows(1, keys=keys[i : i + 1]), jnp.asarray(at[i : i + 1]))
        assert alone.tolist() == [together[i]]


def test_the_draw_is_uniform_and_differs_by_key_answer_and_step():
    keys = np.array([[seed, index] for seed in range(20) for index in range(5)], np.uint32)
    given = rows(100, keys=keys)
    found = np.stack([exits.uniform_draw(given, jnp.full(100, t, jnp.int32)) for t in range(10)])
    assert len(np.unique(found)) > 990  # of 1000; equal 24-bit numbers may turn up
    assert found.min() >= 0 and found.max() < 1
    counts, _ = np.histogram(found, bins=10, range=(0, 1))
    assert np.sum((counts - 100) ** 2 / 100) < 27.9  # chi-square with 9 degrees of freedom: 1 in 1000 is above


def test_the_draw_is_not_the_sampler_s_own_number():
    given = rows(4)
    keys = exits.token_keys(given, steps(0, 1, 2, 3))
    assert exits.uniform_draw(given, steps(0, 1, 2, 3)).tolist() != jax.vmap(jax.random.uniform)(keys).tolist()
