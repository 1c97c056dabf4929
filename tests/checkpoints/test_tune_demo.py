"""Tuning of the demo model, in miniature: who leaves in its forward pass, what it learns, and the folder it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from rich.console import Console

from checkpoints import tune_demo
from checkpoints.demo_objective import Numerics, exit_features
from checkpoints.demo_trainer import PRESETS, Trainer
from checkpoints.demo_tuning import (
    MARGINS,
    PROBE_SCALE,
    PROBE_START,
    STAGES,
    draw_thresholds,
    exit_params,
    new_probes,
    tuning_loss_and_grads,
)
from checkpoints.train_demo import summary
from checkpoints.tune_demo import Tuner, choose_stages, main
from eejax.core import CacheConfig, EngineConfig, SchedulerConfig
from eejax.core.errors import ConfigError
from eejax.device.runner import Runner
from eejax.model.weights import load_checkpoint
from tests.checkpoints.test_train_demo import MODEL, random_params, some_batch, write_data

NUMERICS = Numerics(jnp.float32, serial=True, chunk=16)
EXITS = len(MODEL.exits.layers)
NEVER = np.full((EXITS, 2, 32), np.inf, np.float32)


def sure_params() -> dict:
    """Parameters whose margins spread."""
    params = random_params()
    return params | {"norm": 8 * params["norm"]}


def forward(params: dict, batch: dict[str, np.ndarray], thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features `[E, D, N]` at every exit point, and who came as far `[E, N]`."""
    run = jax.jit(lambda p, b, t: exit_features(MODEL, NUMERICS, p, b, t))
    return jax.device_get(run(params, batch, thresholds.reshape(EXITS, -1)))


def test_tokens_leave_and_are_frozen_as_in_decoding() -> None:
    """The scorer, which is held to the reference, makes the same of the same text at the same thresholds."""
    params, batch, start = sure_params(), some_batch(), 10
    batch["segments"][:] = 1
    margins = (0.45, 0.25)
    thresholds = NEVER.copy()
    thresholds[:, 1, start:] = np.asarray(margins)[:, None]
    features, came = (x[..., 32:] for x in forward(params, batch, thresholds))

    engine = EngineConfig(MODEL, CacheConfig(1, 8), SchedulerConfig(1), max_model_len=32)
    text = batch["tokens"][1].tolist()
    scores = Runner(engine, params).score(text, margins, "margin", start)
    assert set(scores.exit_layers[start:]) == {*MODEL.exit_points}
    left_at = came.sum(axis=0) - 1
    np.testing.assert_array_equal(np.asarray(MODEL.exit_points)[left_at], scores.exit_layers)
    logits = np.asarray(params["embedding"]) @ features[left_at, :, np.arange(32)].T
    np.testing.assert_array_equal(logits.argmax(axis=0), scores.choices)
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=0))
    np.testing.assert_allclose(log_probs[text[1:], np.arange(31)], scores.logprobs[:-1], atol=1e-4)
    np.testing.assert_array_equal(features[1, :, left_at == 0], features[0, :, left_at == 0])


def test_rows_at_full_depth_know_nothing_of_thresholds() -> None:
    params, batch = sure_params(), some_batch()
    batch["segments"][:] = 1
    thresholds = NEVER.copy()
    thresholds[0, 1, 20] = 0.0
    plain, leaving = forward(params, batch, NEVER), forward(params, batch, thresholds)
    changed = np.any(plain[0] != leaving[0], axis=(0, 1))
    # The token that left, and those of its row that read the K and V of its frozen state.
    assert np.flatnonzero(changed).tolist() == list(range(32 + 20, 64))
    assert plain[1].all()
    assert np.argwhere(~leaving[1]).tolist() == [[1, 52], [2, 52]]


def test_only_tokens_that_decoding_would_feed_may_leave() -> None:
    weights = np.tile(np.array([0.25, 0.25, 1, 1, 1, 0.25, 1, 0], np.float32), (40, 1))
    segments = np.tile(np.array([1, 1, 1, 1, 1, 2, 2, 0], np.int32), (40, 1))
    drawn = draw_thresholds({"weights": weights, "segments": segments}, np.random.default_rng(0))
    drawn = drawn.reshape(EXITS, 40, 8)
    assert np.isinf(drawn[:, 0]).all()
    # A position's weight is its target's: 3 and 4 hold answer tokens, 5 begins a document, 6 is a question's.
    for e, (low, high) in enumerate(MARGINS):
        assert set(np.argwhere(np.isfinite(drawn[e]))[:, 1].tolist()) == {3, 4}
        of_rows = drawn[e, 1:, 3]
        np.testing.assert_array_equal(of_rows, drawn[e, 1:, 4])
        finite = of_rows[np.isfinite(of_rows)]
        assert low <= finite.min() < finite.max() <= high
        assert (0 < len(finite) < 39) if e == 0 else len(finite) == 39


@pytest.mark.parametrize(("name", "own"), [("join", 1.0), ("hold", 0.0)])
def test_gradients_are_those_of_the_plain_objective(name: str, own: float) -> None:
    stage, batch, params = dataclasses.replace(STAGES[name], probe=0.5), some_batch(), sure_params()
    untuned = jax.tree.map(lambda p: p * 0.7, params)
    rng = np.random.default_rng(2)
    probes = jax.tree.map(lambda p: p + jnp.asarray(0.05 * rng.normal(size=p.shape), p.dtype), new_probes(MODEL))
    thresholds = NEVER.copy()
    thresholds[:, 1, ::2] = [[0.45], [0.25]]
    batch |= {"thresholds": thresholds.reshape(EXITS, -1), "own": np.float32(own)}
    next_token = stage.next_token[int(own)]

    def plain(learnt: tuple[dict, dict]) -> tuple[jax.Array, jax.Array]:
        params, probes = learnt

        def distribution(p: dict) -> jax.Array:
            return jax.nn.softmax(p["embedding"] @ exit_features(MODEL, NUMERICS, p, batch)[0][-1], axis=0)

        full, before = jax.lax.stop_gradient((distribution(params), distribution(untuned)))
        best, following = (jax.nn.one_hot(x, MODEL.vocab_size, axis=0) for x in (full.argmax(0), batch["targets"]))
        following = following.reshape(MODEL.vocab_size, -1)
        features, came = exit_features(MODEL, NUMERICS, params, batch, batch["thresholds"])
        share = batch["weights"].reshape(-1) / batch["weights"].sum() * came.astype(jnp.float32)
        log_probs = [jax.nn.log_softmax(params["embedding"] @ f, axis=0) for f in features]
        early = full + stage.choice * own * (best - full)
        below = jax.lax.stop_gradient(jnp.exp(log_probs[-2]))
        rest = 1 - next_token - stage.lower
        last = rest * (before if stage.held else full) + next_token * following + stage.lower * below
        joint = jnp.zeros(())
        for e, target in enumerate((*[early] * EXITS, last)):
            joint -= stage.exit_weights[e] * jnp.sum(share[e] * target * log_probs[e])
            if e < EXITS:
                odds = PROBE_SCALE * (probes["weight"][e] @ features[e] + probes["bias"][e])
                agrees = log_probs[e].argmax(0) == full.argmax(0)
                joint += stage.probe * jnp.sum(share[e] * jax.nn.softplus(jnp.where(agrees, -odds, odds)))
        return joint, jnp.sum(came & (batch["weights"].reshape(-1) == 1), axis=1)

    (_, counted), wanted = jax.jit(jax.value_and_grad(plain, has_aux=True))((params, probes))
    run = jax.jit(lambda *args: tuning_loss_and_grads(MODEL, stage, NUMERICS, *args))
    seen, *grads = run(params, probes, untuned, batch)
    np.testing.assert_array_equal(seen[:, 0], counted)
    assert counted[0] > counted[1] > counted[2]
    assert jax.tree.structure(tuple(grads)) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        # Sums of some thousand float32 products.
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5 * float(jnp.abs(want).max()))


def test_a_stage_ends_with_a_mean_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(config, stage, numerics, params, probes, untuned, batch):
        return jnp.zeros((EXITS + 1, 3)), jax.tree.map(jnp.ones_like, params), jax.tree.map(jnp.ones_like, probes)

    monkeypatch.setattr(tune_demo, "tuning_loss_and_grads", fake)
    start = sure_params()
    found = {}
    for keep in (1.0, 0.25):
        tuner = Tuner(MODEL, NUMERICS, start)
        tuner.params = jax.tree.map(lambda p: 2 * p, start)  # from an earlier stage, and no part of the mean
        stage = dataclasses.replace(STAGES["join"], steps=3, peak_rate=0.1, keep=keep)
        stream = iter([(some_batch(), bool(n % 2)) for n in range(9)])
        report = tuner.run(stage, stream, np.random.default_rng(0), Console(quiet=True))
        assert len(list(stream)) == 6
        assert report["tokens"] == 3 * np.count_nonzero(some_batch()["weights"])
        found[keep] = tuner
    assert tuner.untuned is start
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).min()), start, found[1.0].params)
    assert min(jax.tree.leaves(moved)) > 0
    for old, whole, mean in zip(*map(jax.tree.leaves, (start, found[1.0].params, found[0.25].params)), strict=True):
        np.testing.assert_allclose(mean, 0.75 * old + 0.25 * whole, rtol=1e-5, atol=1e-6)
    # Probes are taken whole: the model had none before tuning.
    np.testing.assert_array_equal(found[1.0].probes["bias"], found[0.25].probes["bias"])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, and a checkpoint as training writes it."""
    folder = tmp_path_factory.mktemp("tuning")
    write_data(folder / "data")
    trainer = Trainer(PRESETS["tiny"], folder / "data", folder / "work", 0, jnp.float32)
    trainer.params = sure_params()
    metrics = summary(trainer, "tiny", True, "validation", trainer.evaluate("validation", 1))
    trainer.export(folder / "base", metrics)
    return folder


def test_tuning_writes_a_checkpoint_with_probes(pretrained: Path, tmp_path: Path) -> None:
    options = {"prompts": 10, "answer_tokens": 6, "eval_batches": 1, "dtype": "float32", "seed": 0, "rates": None}
    data, base, out = (pretrained / name for name in ("data", "base", "tuned"))
    options |= {"data": data, "out": out, "work": tmp_path / "work", "stages": "hold", "keep": None}
    main(checkpoint=base, steps="2", **options)

    config, params = load_checkpoint(out)
    assert config == dataclasses.replace(MODEL, exits=dataclasses.replace(MODEL.exits, probes=True))
    _, old = load_checkpoint(base)
    assert not np.array_equal(params["embedding"], old["embedding"])
    for name in config.exit_names:
        probe = params["exits"][name]
        assert np.abs(probe["probe_weight"]).max() > 0
        assert probe["probe_bias"] == pytest.approx(PROBE_START, abs=0.05)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["model"]["exits"]["probes"]
    tuning = metrics["tuning"]
    assert [(stage["name"], stage["steps"]) for stage in tuning["stages"]] == [("hold", 2)]
    assert tuning["answers"] == 10
    assert tuning["before"]["own_answers"]["tokens"] > 0
    card, old_card = (out / "README.md").read_text(), (base / "README.md").read_text()
    assert f"| hold | 2 | {tuning['stages'][0]['tokens']} |" in card
    assert "own greedy answers to 10 prompts" in card
    assert "have a linear probe of their own" in card
    assert "any block can serve as an exit" in old_card
    assert "tun" not in old_card

    with pytest.raises(typer.BadParameter, match="has been tuned already"):
        main(checkpoint=out, steps="2", **options)
    with pytest.raises(ConfigError, match="source and target are the same folder"):
        main(checkpoint=base, steps="2", **options | {"out": base})
    with pytest.raises(typer.BadParameter, match=r"has no metrics\.json"):
        main(checkpoint=data, steps="2", **options)


def test_probes_are_stored_by_exit_and_in_full_size() -> None:
    probes = {"weight": jnp.arange(2.0 * MODEL.hidden_size).reshape(2, -1), "bias": jnp.array([1.0, 2.0])}
    stored = exit_params(MODEL, probes)
    assert list(stored) == ["after_1", "after_2"]
    np.testing.assert_array_equal(stored["after_2"]["probe_weight"], PROBE_SCALE * probes["weight"][1])
    np.testing.assert_array_equal(stored["after_2"]["probe_bias"], [2 * PROBE_SCALE])


def test_stages_are_chosen_and_changed_by_name() -> None:
    assert choose_stages("join,hold", None, None, None, 2) == list(STAGES.items())
    (name, stage), _ = choose_stages("hold,join", "7,8", "0.1,0.2", "0.5,1", 2)
    assert name == "hold"
    assert stage == dataclasses.replace(STAGES["hold"], steps=7, peak_rate=0.1, keep=0.5)
    for wrong, said in (
        (("melt", None, None, None, 2), r"no stages \['melt'\]; there are join, hold"),
        (("join,hold", "7", None, None, 2), "--steps must give 2 numbers"),
        (("join", "x", None, None, 2), "--steps must give 1 numbers .* got 'x'"),
        (("join", None, "0", None, 2), "--rates must give"),
        (("join", None, None, "1.5", 2), r"--keep must give 1 numbers in \(0, 1\]"),
        (("join", None, None, None, 3), "2 early exits, and this one has 3"),
    ):
        with pytest.raises(typer.BadParameter, match=said):
            choose_stages(*wrong)
