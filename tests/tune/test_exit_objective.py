"""What exits are tuned on, held to the cache-free reference and to formulas written out again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eejax.core import ExitConfig, ModelConfig
from eejax.tune.exit_objective import balanced_loss, chunk_size, head_loss, merged, observe, probe_loss, separated
from eejax.tune.exit_tuner import confidence_report
from eejax.tune.tuning_data import pack
from tests.cases import BASE, random_model, random_params, shape_config
from tests.reference import Reference, softmax

ROWS, LENGTH = 2, 16
SHAPES = ("gqa", "norm_own", "mlp_tied", "bare", "window", "everything")


def documents(config: ModelConfig, seed: int = 0) -> list[np.ndarray]:
    """Documents that leave padding, share rows, and of which one is cut."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in (7, 5, 3, 21, 4)]


def one_batch(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    [batch] = pack(documents(config, seed), 2 * ROWS, LENGTH)
    assert 0 < np.count_nonzero(batch["segments"]) < batch["segments"].size
    assert batch["segments"].max() == 3
    return batch


def model_with_probes(shape: str, seed: int = 0) -> tuple[ModelConfig, dict, dict]:
    """Configuration, backbone and exits of a named shape, with probes that have an opinion."""
    config = shape_config(shape)
    config = dataclasses.replace(config, exits=dataclasses.replace(config.exits, probes=True))
    params = jax.tree.map(jnp.asarray, random_params(config, seed))
    exits = params.pop("exits")
    return config, params, exits


@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_is_judged_as_if_its_document_stood_alone(shape: str) -> None:
    config, backbone, exits = model_with_probes(shape)
    batch = one_batch(config)
    found = jax.device_get(jax.jit(lambda b, e, x: observe(config, b, e, x, 24))(backbone, exits, batch))
    seen = found["seen"]
    assert seen.tolist() == (batch["segments"].reshape(-1) > 0).tolist()
    pieces = [ids[at : at + LENGTH + 1] for ids in documents(config) for at in range(0, len(ids) - 1, LENGTH)]
    expected: dict[str, list] = {"nats": [], "agree": [], "softmax": []}
    for ids in pieces:
        logits = Reference(config, backbone | {"exits": exits}).full_depth(ids[:-1])
        probabilities = np.stack([softmax(logits[point]) for point in config.exit_points])
        best = probabilities.argmax(axis=-1)
        expected["nats"].append(-np.log(probabilities[:, np.arange(len(ids) - 1), ids[1:]]))
        expected["agree"].append(best[:-1] == best[-1])
        expected["softmax"].append(probabilities[:-1].max(axis=-1))
    for name, parts in expected.items():
        np.testing.assert_allclose(found[name][:, seen], np.concatenate(parts, axis=1), rtol=1e-4, atol=1e-4)
    for i, name in enumerate(config.exit_names):
        logit = exits[name]["probe_weight"] @ found["features"][i] + exits[name]["probe_bias"][0]
        np.testing.assert_allclose(found["classifier"][i], 1 / (1 + np.exp(-logit)), rtol=1e-5)


def agreement_loss(logits: np.ndarray, last: np.ndarray) -> float:
    """Mean cross-entropy of `softmax(logits)` to `softmax(last)`, both `[N, V]`."""
    return float(np.mean(-np.sum(softmax(last) * np.log(softmax(logits)), axis=-1)))


@pytest.mark.parametrize("shape", ["norm_tied", "mlp_own"])
def test_heads_descend_on_their_divergence_from_full_depth(shape: str) -> None:
    """Value and gradient, which must depend neither on the chunk nor on what padding holds."""
    config, backbone, exits = model_with_probes(shape)
    heads, probes = separated(exits)
    batch = one_batch(config)
    run = jax.jit(lambda h, chunk: head_loss(config, backbone, h, probes, batch, chunk), static_argnums=1)
    nats, grads = run(heads, 24)
    pieces = [ids[at : at + LENGTH] for ids in documents(config) for at in range(0, len(ids) - 1, LENGTH)]
    pieces = [ids if len(ids) == LENGTH else ids[:-1] for ids in pieces]
    every = [Reference(config, backbone | {"exits": exits}).full_depth(ids) for ids in pieces]
    by_point = {point: np.concatenate([one[point] for one in every]) for point in config.exit_points}
    wanted = sum(agreement_loss(by_point[layer], by_point[config.n_layers]) for layer in config.exits.layers)
    assert float(nats) == pytest.approx(wanted, rel=1e-4)

    for other in jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), grads, run(heads, 64)[1])):
        assert other < 1e-5
    assert jax.tree.structure(grads) == jax.tree.structure(heads)
    rng = np.random.default_rng(1)
    # Along one random direction per leaf, the gradient is the slope of the loss.
    for index, leaf in enumerate(jax.tree.leaves(heads)):
        direction = rng.standard_normal(leaf.shape).astype(np.float32)
        moved = []
        for step in (1e-2, -1e-2):
            flat, tree = jax.tree.flatten(heads)
            flat[index] = leaf + step * direction
            moved.append(float(run(jax.tree.unflatten(tree, flat), 24)[0]))
        slope = float(np.sum(direction * jax.tree.leaves(grads)[index]))
        assert (moved[0] - moved[1]) / 2e-2 == pytest.approx(slope, rel=0.05, abs=0.02)


def test_probes_descend_on_the_balanced_loss_of_the_head_at_hand() -> None:
    config, backbone, exits = model_with_probes("norm_tied")
    heads, probes = separated(exits)
    batch = one_batch(config)
    found = observe(config, backbone, exits, batch, 128)

    def plain(probes: dict) -> jax.Array:
        total = jnp.zeros(())
        for i, name in enumerate(config.exit_names):
            x = found["features"][i][:, found["seen"]]
            yes = found["agree"][i][found["seen"]]
            sure = jax.nn.sigmoid(probes[name]["probe_weight"] @ x + probes[name]["probe_bias"][0])
            total -= (jnp.mean(jnp.log(sure[yes])) + jnp.mean(jnp.log(1 - sure[~yes]))) / 2
        return total

    nats, grads = probe_loss(config, backbone, probes, heads, batch, 128)
    wanted, expected = jax.value_and_grad(plain)(probes)
    assert float(nats) == pytest.approx(float(wanted), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected)


def test_both_classes_weigh_the_same() -> None:
    logits = jnp.asarray([2.0, -1.0, 0.5])
    agree = jnp.asarray([True, True, False])
    loss = float(balanced_loss(logits, agree, jnp.ones(3, bool)))
    ours = -np.log(1 / (1 + np.exp(-np.asarray([2.0, -1.0, -0.5]))))
    assert loss == pytest.approx((ours[:2].mean() + ours[2]) / 2)
    # Nine times as many of one class change nothing, and neither does padding.
    many = jnp.concatenate([jnp.tile(logits[:2], 9), logits[2:], jnp.asarray([30.0])])
    classes = jnp.asarray([True] * 18 + [False, False])
    assert float(balanced_loss(many, classes, jnp.arange(20) < 19)) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("only", [True, False])
def test_a_class_that_is_absent_weighs_nothing(only: bool) -> None:
    logits, agree, seen = jnp.asarray([1.0, -2.0]), jnp.full(2, only), jnp.ones(2, bool)
    loss, slope = jax.value_and_grad(balanced_loss)(logits, agree, seen)
    sign = 1 if only else -1
    assert float(loss) == pytest.approx(np.log1p(np.exp(-sign * np.asarray([1.0, -2.0]))).mean() / 2)
    assert np.all(np.sign(slope) == -sign)
    assert float(balanced_loss(logits, agree, ~seen)) == 0.0


def test_heads_and_probes_come_apart_and_together() -> None:
    _, params = random_model("mlp_own", exits=ExitConfig((1, 3), "mlp", tie_output=False, probes=True))
    heads, probes = separated(params["exits"])
    names = ("after_1", "after_3")
    assert {name: set(one) for name, one in probes.items()} == {n: {"probe_weight", "probe_bias"} for n in names}
    assert {name: set(one) for name, one in heads.items()} == {n: {"norm", "mlp", "output"} for n in names}
    assert merged(heads, probes) == params["exits"]


def test_logits_stay_bounded_for_large_vocabularies() -> None:
    """The temporary memory of a step grows with the chunk, not with the batch."""
    config = ModelConfig(**{**BASE, "vocab_size": 8192, "exits": ExitConfig((1,), "norm", probes=True)})
    params = jax.tree.map(jnp.asarray, random_params(config))
    heads, probes = separated(params.pop("exits"))
    chunk = chunk_size(config)
    assert chunk == 128
    text = np.random.default_rng(0).integers(0, 8192, 4097).astype(np.int32)

    def temporaries(loss, rows: int) -> int:
        [batch] = pack([text[: 64 * rows + 1]], rows, 64)
        run = jax.jit(lambda params, *own: loss(config, params, *own, batch, chunk))
        own = (heads, probes) if loss is head_loss else (probes, heads)
        return run.lower(params, *own).compile().memory_analysis().temp_size_in_bytes

    for loss in (head_loss, probe_loss):
        # What comes on top is hidden states: a small fraction of 4 * V bytes a token.
        assert temporaries(loss, 64) - temporaries(loss, 8) < 56 * 64 * 4 * config.vocab_size / 4


def test_a_report_says_how_well_confidence_tells_right_from_wrong() -> None:
    rng = np.random.default_rng(0)
    sure = np.round(rng.uniform(size=200), 2).astype(np.float32)  # with ties
    agree = rng.uniform(size=200) < sure
    report = confidence_report(sure, agree)
    pairs = sure[agree][:, None] - sure[~agree][None]
    assert report["auroc"] == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
    assert list(report["at"]) == ["0.5", "0.7", "0.9"]
    for threshold, found in report["at"].items():
        over = sure >= np.float32(float(threshold))
        assert found == {"coverage": pytest.approx(over.mean()), "agreement": pytest.approx(agree[over].mean())}


def test_a_report_of_one_class_has_no_auroc() -> None:
    report = confidence_report(np.full(3, 0.6, np.float32), np.ones(3, bool))
    assert report["auroc"] is None
    assert report["at"] == {
        "0.5": {"coverage": 1.0, "agreement": 1.0},
        "0.7": {"coverage": 0.0, "agreement": None},
        "0.9": {"coverage": 0.0, "agreement": None},
    }
