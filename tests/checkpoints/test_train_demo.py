"""Training of the demo model, in miniature: its gradients, its data, resuming, and the folder that it writes."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import demo_data
from checkpoints.demo_objective import CONFIDENCES, Numerics, Objective, exit_features, exit_scores, loss_and_grads
from checkpoints.demo_optimiser import orthogonalised
from checkpoints.demo_trainer import PRESETS, Trainer, learning_rate
from checkpoints.train_demo import main
from eejax.model.transformer import bind, init_params
from eejax.model.weights import load_checkpoint
from eejax.text.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = PRESETS["tiny"].model
FRUIT = ("apples", "pears", "plums", "figs", "grapes", "melons", "cherries", "lemons")


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def write_data(folder: Path) -> None:
    """Text in the layout of the real sets: counting fruit."""
    for split, count in (("train", 60), ("validation", 6)):
        for name in (*demo_data.INSTRUCT, *demo_data.MEASURE_ONLY):
            if (name, split) == ("dolly", "train"):
                continue
            rows = [
                {
                    "instruction": f"What are {i} and {j} {FRUIT[i % 8]}?",
                    "input": "" if i % 2 else "Count them.",
                    "output": f"{i + j} {FRUIT[i % 8]}, says {name}.",
                }
                for i, j in ((k, 3 * k % 7) for k in range(count))
            ]
            write(folder / "instruct" / name / f"{split}.jsonl.gz", rows)
        texts = [{"text": f"I like {FRUIT[k % 8]} more than {FRUIT[k % 5]}. " * 3} for k in range(count)]
        write(folder / "lm_text" / "oasst1_en_messages" / f"{split}.jsonl.gz", texts)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def work(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a tokenizer in it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tokenizer").mkdir()
    demo_data.train_tokenizer(data, folder / "tokenizer", MODEL.vocab_size)
    return folder


def some_batch(rows: int = 2, length: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, MODEL.vocab_size, (rows, length), dtype=np.int32),
        "targets": rng.integers(0, MODEL.vocab_size, (rows, length), dtype=np.int32),
        "weights": rng.choice([0.0, 0.25, 1.0], (rows, length)).astype(np.float32),
        "segments": np.sort(rng.integers(0, 3, (rows, length), dtype=np.int32), axis=1),
    }


def random_params() -> dict:
    """Parameters large enough for attention and exits to matter."""
    return jax.tree.map(lambda p: p * 4 if p.ndim > 1 else p, init_params(MODEL, 1))


def features(params: dict, batch: dict[str, np.ndarray], serial: bool) -> jax.Array:
    numerics = Numerics(jnp.float32, serial, chunk=16)
    return jax.jit(lambda p, b: exit_features(MODEL, numerics, p, b)[0])(params, batch)


@pytest.mark.parametrize("serial", [True, False])
def test_gradients_are_those_of_the_plain_objective(serial: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints.demo_objective.ATTENTION_TILE", 12)
    objective, batch, params = Objective((0.2, 0.3, 0.5), 0.4), some_batch(), random_params()
    numerics = Numerics(jnp.float32, serial, chunk=16)

    def attend(q, k, v, cache):
        heads, dim, _, length = q.shape
        k, v = (jnp.repeat(x, heads // x.shape[0], axis=0) for x in (k, v))
        scores = jnp.einsum("hcbt,hcbs->hbts", q, k) / math.sqrt(dim)
        segments = jnp.asarray(batch["segments"])
        seen = (segments[:, :, None] == segments[:, None]) & jnp.tril(jnp.ones((length, length), bool))
        return jnp.einsum("hbts,hcbs->hcbt", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1), v), cache

    def plain(params):
        model, x, logits = bind(MODEL, params), None, []
        x = model.embed(batch["tokens"])
        turn = model.rotation(jnp.broadcast_to(jnp.arange(x.shape[2]), x.shape[1:]))
        for number, block in enumerate(model.blocks, start=1):
            x, middle, _ = block(x, turn, attend, None)
            if number in MODEL.exit_points:
                logits.append(model.logits(number, model.features(number, x, middle)))
        log_probs = [jax.nn.log_softmax(one, axis=0) for one in logits]
        last = jax.lax.stop_gradient(jnp.exp(log_probs[-1]))
        hit = jax.nn.one_hot(batch["targets"], MODEL.vocab_size, axis=0)
        share = batch["weights"] / batch["weights"].sum()
        nll = [-jnp.sum(share * jnp.sum(hit * one, axis=0)) for one in log_probs]
        like_last = [-jnp.sum(share * jnp.sum(last * one, axis=0)) for one in log_probs[:-1]]
        joint = 0.2 * (0.6 * nll[0] + 0.4 * like_last[0]) + 0.3 * (0.6 * nll[1] + 0.4 * like_last[1]) + 0.5 * nll[2]
        return joint, jnp.stack(nll)

    (_, nll), wanted = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    losses, grads = jax.jit(lambda p, b: loss_and_grads(MODEL, objective, numerics, p, b))(params, batch)
    np.testing.assert_allclose(losses, nll, rtol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        # Sums of some thousand float32 products.
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5 * float(jnp.abs(want).max()))


def test_packed_documents_do_not_see_each_other() -> None:
    batch, params = some_batch(rows=1), random_params()
    batch["segments"][0] = [1] * 16 + [2] * 16
    apart = {name: array.reshape(2, 16) for name, array in batch.items()}

    for serial in (True, False):
        # Rotary attention sees only distances, so a document's place in its row does not matter.
        np.testing.assert_allclose(features(params, batch, serial), features(params, apart, serial), atol=2e-4)


def test_scores_count_what_they_say() -> None:
    batch, params = some_batch(), random_params()
    numerics = Numerics(jnp.float32, True, chunk=16)
    scores = jax.device_get(jax.jit(lambda p, b: exit_scores(MODEL, numerics, p, b))(params, batch))
    flat = features(params, batch, serial=True)
    probs = np.asarray(jax.nn.softmax(jnp.einsum("vd,edn->evn", params["embedding"], flat), axis=1))
    scored = batch["weights"].reshape(-1) == 1
    for e in range(3):
        nll = -np.log(probs[e, batch["targets"].reshape(-1), np.arange(scored.size)])[scored].sum()
        assert scores["nll"][e] == pytest.approx(nll, rel=1e-4)
        for c, confidence in enumerate(CONFIDENCES):
            sure = scored & (probs[e].max(0) >= confidence)
            assert scores["tokens"][e, c] == sure.sum()
            assert scores["agree"][e, c] == (sure & (probs[e].argmax(0) == probs[-1].argmax(0))).sum()


def test_orthogonalised_has_singular_values_near_one() -> None:
    for shape in ((24, 64), (64, 24)):
        values = np.linalg.svd(
            orthogonalised(jax.random.normal(jax.random.key(0), shape), jnp.float32), compute_uv=False
        )
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_packing_keeps_every_answer_token(data: Path, work: Path) -> None:
    tokenizer = load_tokenizer(work / "tokenizer")
    rows = demo_data.read_rows(data / "instruct" / "gsm8k" / "train.jsonl.gz")
    documents = demo_data.tokenise([*rows, {"text": "figs and plums. " * 30}], tokenizer)
    order = [(0, i) for i in reversed(range(len(documents)))]
    seen: list[tuple[int, int]] = []
    answers = 0
    for batch in demo_data.pack([documents], order, rows=3, length=64):
        real = batch["weights"] > 0
        seen += zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True)
        answers += int((batch["weights"] == 1).sum())
        assert ((batch["segments"] > 0) == real).all()
        for row in range(3):
            used = int(real[row].sum())
            assert real[row, :used].all()
            inside = batch["segments"][row, 1:used] == batch["segments"][row, : used - 1]
            assert (batch["tokens"][row, 1:used] == batch["targets"][row, : used - 1])[inside].all()
    wanted = []
    for _, i in order:
        ids = documents.ids[documents.starts[i] : documents.starts[i + 1]].tolist()
        wanted += pairwise(ids)
    assert seen == wanted
    assert answers == int((~documents.prompt).sum()) - 1  # the plain text's BOS is never a target
    question = tokenizer.encode(
        tokenizer.apply_chat_template([{"role": "user", "content": demo_data.question(rows[0])}])
    )
    assert documents.ids[: len(question)].tolist() == question
    assert documents.prompt[: len(question) + 1].tolist() == [True] * len(question) + [False]
    assert documents.ids[documents.starts[1] - 1] == tokenizer.eos_id


def test_bytes_per_token_adds_up(work: Path) -> None:
    tokenizer = load_tokenizer(work / "tokenizer")
    sizes = demo_data.bytes_per_token(work / "tokenizer")
    text = "What are 3 apples?\n\n\tFigs \u6f22 \u00e9"
    ids = tokenizer.encode(f"<|user|>{text}<|assistant|></s>")
    assert sizes[ids].sum() == len(text.encode())


def test_text_that_is_measured_only_is_never_trained_on(data: Path, work: Path) -> None:
    tokenizer = load_tokenizer(work / "tokenizer")
    file = work / "tokenizer" / "tokenizer.model"
    with pytest.raises(ValueError, match="dolly may not be trained on"):
        demo_data.load_documents(data, work / "cache", file, tokenizer, "dolly", "train")


def test_plain_text_is_shared_out_over_the_rounds(work: Path, data: Path) -> None:
    tokenizer = load_tokenizer(work / "tokenizer")
    lm = demo_data.tokenise([{"text": f"text {i}"} for i in range(8)], tokenizer)
    stream = demo_data.TrainingData([], [lm], rows=1, length=64, lm_share=0.25, seed=0)
    rounds = [sorted(number for _, number in stream._order(r)) for r in range(5)]
    assert sorted(number for one in rounds[:4] for number in one) == list(range(8))
    assert rounds[4] == rounds[0]


def test_learning_rate_rises_then_falls_to_zero() -> None:
    preset = PRESETS["tiny"]
    rates = [learning_rate(preset, done) for done in np.linspace(0, 1, 101)]
    top = int(np.argmax(rates))
    assert rates[0] == rates[-1] == 0
    assert 0 < top <= 3
    assert (np.diff(rates[top:]) < 0).all()


def trained(data: Path, tokenizer: Path, folder: Path, *stops: int | None) -> Trainer:
    """State after 6 of 8 steps, with a fresh process's worth of state between the given stops."""
    folder.mkdir()
    (folder / "tokenizer").symlink_to(tokenizer / "tokenizer")
    for stop in stops:
        options = {"preset": "tiny", "steps": 8, "dtype": "float32", "export_minutes": 60.0, "eval_batches": 1}
        main(data, folder / "out", work=folder, minutes=None, resume=True, stop_after=stop, seed=0, **options)
    trainer = Trainer(PRESETS["tiny"], data, folder, 0, jnp.float32)
    trainer.resume()
    return trainer


def test_a_resumed_run_equals_an_uninterrupted_one(data: Path, work: Path, tmp_path: Path) -> None:
    whole = trained(data, work, tmp_path / "whole", 6)
    parts = trained(data, work, tmp_path / "parts", 3, 6)
    assert (whole.at.step, whole.at.tokens, whole.at.position) == (parts.at.step, parts.at.tokens, parts.at.position)
    assert whole.at.step == 6
    for a, b in zip(jax.tree.leaves(whole._arrays()), jax.tree.leaves(parts._arrays()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_from_the_command_line_writes_a_whole_checkpoint(data: Path, work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tokenizer").symlink_to(work / "tokenizer")
    command = [sys.executable, "-W", "error", str(REPOSITORY / "checkpoints" / "train_demo.py")]
    options = ["--data", data, "--out", tmp_path / "demo", "--work", folder, "--preset", "tiny", "--steps", "30"]
    run = subprocess.run([*command, *map(str, options)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    config, params = load_checkpoint(tmp_path / "demo", jnp.bfloat16)
    assert config == MODEL
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert load_tokenizer(tmp_path / "demo").vocab_size == config.vocab_size
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics["finished"]
    assert metrics["training"]["steps"] == 30
    assert set(metrics["evaluation"]) == {*demo_data.INSTRUCT, *demo_data.LM_TEXT, *demo_data.MEASURE_ONLY}
    scored = metrics["evaluation"]["gsm8k"]
    guessing = math.log2(MODEL.vocab_size) * scored["tokens"] / scored["bytes"]
    assert all(0 < of["bits_per_byte"] < 0.8 * guessing for of in scored["exits"].values())
    assert metrics["evaluation"]["gsm8k"]["exits"]["3"]["at_0"] == {"share": 1.0, "agreement": 1.0}
    card = (tmp_path / "demo" / "README.md").read_text()
    assert "CC BY 4.0. Modified: turned into question/answer form." in card
    assert f"{metrics['training']['tokens']:,} tokens in 30 steps" in card
    assert f"{metrics['evaluation']['tldr']['exits']['1']['bits_per_byte']:.3f}" in card


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "huge", "--steps", "1"], "no preset 'huge'"),
        ([], "give --minutes or --steps"),
        (["--steps", "1", "--minutes", "1"], "give --minutes or --steps"),
        (["--steps", "1", "--dtype", "int8"], "--dtype must be"),
    ],
)
def test_bad_options_are_named(data: Path, tmp_path: Path, options: list[str], said: str) -> None:
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--data", str(data), "--out", str(tmp_path / "o"), *options])
    assert result.exit_code == 2
    assert said in result.output
