"""`eejax tune-exits` over a tiny random model: what it learns, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from eejax import LLM, EarlyExitParams, SamplingParams
from eejax.cli.tune_exits import tune_exits as command
from eejax.core import ExitConfig, ModelConfig
from eejax.core.errors import ConfigError
from eejax.model.dense import exit_features
from eejax.model.lazy import load_lazily
from eejax.model.param_tree import leaves
from eejax.model.transformer import bind
from eejax.model.weights import load_checkpoint
from eejax.model.weights_writer import save_checkpoint
from eejax.text.tokenizer import load_tokenizer
from eejax.text.tokenizer_files import CONFIG_FILE, MODEL_FILE
from eejax.tune import exit_tuning
from eejax.tune.exit_objective import head_loss, separated
from eejax.tune.exit_tuner import Tuner, TuningOptions, optimiser
from eejax.tune.exit_tuning import REPORT_FILE, ExitChoice, choose_exits, start_exits, tune_exits
from eejax.tune.tuning_data import pack
from tests.cases import random_params
from tests.hf_folders import make_folder, plain_config
from tests.reference import Reference, softmax
from tests.reference import generate as reference
from tests.tokenizer_cases import train_sentencepiece

DEPTH = 3
WORDS = ["one", "two", "three", "four", "and", "words", "of", "a", "text", "b", "c", "d", "e", "f"]
QUICK = TuningOptions(steps=30, batch_tokens=256, seq_len=32, lr=0.02, eval_share=0.2)

app = typer.Typer()
app.command("tune-exits")(command)


def text_lines(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [{"text": " ".join(rng.choice(WORDS, rng.integers(5, 30)))} for _ in range(count)]


def jsonl(file: Path, lines: list[dict]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def data(home: Path) -> Path:
    return jsonl(home / "text.jsonl", text_lines(60))


@pytest.fixture(scope="module")
def plain(home: Path) -> Path:
    """A model without exits, stored in bfloat16, with a sentencepiece tokenizer and a file about it."""
    tokenizer, vocabulary = train_sentencepiece([line["text"] for line in text_lines(40, 1)], 300)
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        n_layers=DEPTH,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        max_position=64,
    )
    save_checkpoint(home / "plain", config, random_params(config, seed=5), jnp.bfloat16)
    (home / "plain" / MODEL_FILE).write_bytes(tokenizer)
    (home / "plain" / CONFIG_FILE).write_text("{}")
    (home / "plain" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (home / "plain" / "README.md").write_text("about the old model")
    return home / "plain"


@pytest.fixture(scope="module")
def tuned(plain: Path, data: Path) -> tuple[dict, Path]:
    """Everything as it comes by default, but for the size of the run."""
    report, folder = tune_exits(plain, data, options=QUICK)
    assert folder == plain.with_name("plain-exits")
    return report, folder


def by_name(folder: Path) -> dict[str, np.ndarray]:
    return {name: leaf.read() for name, leaf in leaves(load_lazily(folder)[1])}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# -------------------------------------------------------------------------------------------------------------- results


def test_the_backbone_stays_as_it_is_to_the_bit(plain: Path, tuned: tuple[dict, Path]) -> None:
    before, after = by_name(plain), by_name(tuned[1])
    assert before.keys() == {name for name in after if not name.startswith("exits.")}
    for name, leaf in before.items():
        assert leaf.dtype == after[name].dtype == jnp.bfloat16
        assert leaf.tobytes() == after[name].tobytes(), name


def test_exits_come_closer_to_full_depth_and_probes_learn_how_close(plain: Path, tuned: tuple[dict, Path]) -> None:
    report, folder = tuned
    config, params = load_checkpoint(folder)
    assert config.exits == ExitConfig((1, 2), "norm", probes=True)
    held_out = [np.asarray(load_tokenizer(plain).encode(line["text"])) for line in text_lines(20, 2)]
    [batch] = pack(held_out, 20, 32)

    @jax.jit
    def divergence(exits: dict) -> jax.Array:
        return head_loss(config, params, *separated(exits), batch, 128)[0]

    assert divergence(params["exits"]) < 0.95 * divergence(start_exits(config, *load_checkpoint(plain))["exits"])
    found = report["evaluation"]
    assert found["before"]["full_depth"] == found["after"]["full_depth"]
    for layer in ("1", "2"):
        assert "classifier" not in found["before"]["exits"][layer]["confidence"]
        assert found["after"]["exits"][layer]["confidence"]["classifier"]["auroc"] > 0.6
    assert report == json.loads((folder / REPORT_FILE).read_text())


def test_what_is_reported_is_true_of_what_is_written(plain: Path, data: Path, tuned: tuple[dict, Path]) -> None:
    """Exits are stored in the backbone's dtype; the evaluation knows. Evaluating again gives the same figures."""
    report, folder = tuned
    again, written = tune_exits(folder, data, options=TuningOptions(0, 256, 32, eval_share=0.2))
    assert written is None
    assert again["evaluation"] == {
        **{name: report["evaluation"][name] for name in ("documents", "tokens", "bytes")},
        "before": report["evaluation"]["after"],
    }


def test_tuning_goes_on_from_the_exits_that_are_there(data: Path, tuned: tuple[dict, Path], tmp_path: Path) -> None:
    options = TuningOptions(steps=1, batch_tokens=256, seq_len=32, lr=1e-12, eval_share=0.2)
    _, folder = tune_exits(tuned[1], data, out=tmp_path / "more", exits=ExitChoice((2,)), options=options)
    assert folder is not None
    assert load_checkpoint(folder)[0].exits == ExitConfig((2,), "norm", probes=True)
    before, after = by_name(tuned[1]), by_name(folder)
    for name in after:
        assert before[name].tobytes() == after[name].tobytes()  # a step that small leaves no trace


def test_the_new_checkpoint_decodes_early_with_its_own_heads(tuned: tuple[dict, Path]) -> None:
    llm = LLM(tuned[1], dtype="float32", max_num_seqs=1, num_pages=8, page_size=8, max_model_len=32)
    prompt = llm.tokenizer.encode("one two three")
    assert llm.engine.eos_ids == {2, 7}
    params = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, early_exit=EarlyExitParams(0.3, exit_layers=(1, 2))
    )
    [answer] = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs
    own = jax.device_get(llm.engine.runner.params)
    expected = reference(llm.config.model, own, prompt, max_tokens=12, early_exit=params.early_exit)
    assert expected.margins.smallest > 1e-4
    assert set(answer.exit_layers) > {DEPTH}
    assert (answer.token_ids, answer.exit_layers) == (expected.token_ids, expected.exit_layers)
    shared = {**own, "exits": {name: {**one, "norm": own["norm"]} for name, one in own["exits"].items()}}
    other = reference(llm.config.model, shared, prompt, max_tokens=12, early_exit=params.early_exit)
    assert other.token_ids != answer.token_ids


def test_two_runs_write_the_same(plain: Path, data: Path, tuned: tuple[dict, Path], tmp_path: Path) -> None:
    _, again = tune_exits(plain, data, out=tmp_path / "again", options=QUICK)
    assert again is not None
    names = sorted(file.name for file in again.iterdir())
    assert names == sorted([REPORT_FILE, "config.json", "weights", MODEL_FILE, CONFIG_FILE, "generation_config.json"])
    for name in names:
        if name != "weights":
            assert (again / name).read_bytes() == (tuned[1] / name).read_bytes()
    one, two = by_name(tuned[1]), by_name(again)
    assert one.keys() == two.keys()
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


@pytest.mark.parametrize(
    ("head", "tie_output"), [("shared", True), ("norm", True), ("norm", False), ("mlp", True), ("mlp", False)]
)
def test_every_exit_begins_as_the_shared_head(plain: Path, head: str, tie_output: bool) -> None:
    model, params = load_checkpoint(plain)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, 9))
    wanted_config = model.with_exit_layers((1, 2))
    config = choose_exits(model, ExitChoice((2, 1), head, tie_output, True))
    got_params = start_exits(config, model, params)
    assert config.exits == ExitConfig((1, 2), head, tie_output=tie_output, probes=True)
    want, got = bind(wanted_config, params), bind(config, got_params)
    features, others = exit_features(want, tokens), exit_features(got, tokens)
    for layer in (1, 2, DEPTH):
        np.testing.assert_array_equal(got.logits(layer, others[layer]), want.logits(layer, features[layer]))
    for layer in (1, 2):
        assert not np.any(got.probe_logit(layer, others[layer]))


def test_mlp_heads_with_matrices_of_their_own_learn_more(plain: Path, data: Path, tmp_path: Path) -> None:
    # So many documents in so few tokens are learnt by heart; that is what is asked here.
    report, folder = tune_exits(
        plain,
        data,
        out=tmp_path / "mlp",
        exits=ExitChoice((2,), "mlp", tie_output=False, probes=False),
        eval_data=data,
        options=TuningOptions(steps=60, batch_tokens=256, seq_len=32, lr=0.02),
    )
    before, after = (report["evaluation"][when]["exits"]["2"] for when in ("before", "after"))
    assert after["agreement"] > before["agreement"] + 0.2
    assert "classifier" not in after["confidence"]
    assert report["training_documents"] == report["evaluation"]["documents"] == 60
    assert folder is not None
    assert set(by_name(folder)) - set(by_name(plain)) == {
        f"exits.after_2.{name}" for name in ("norm", "output", "mlp.gate_up", "mlp.down")
    }


def test_shared_heads_only_get_probes(plain: Path, data: Path, tmp_path: Path) -> None:
    report, folder = tune_exits(plain, data, out=tmp_path / "probed", exits=ExitChoice((2,), "shared"), options=QUICK)
    before, after = (report["evaluation"][when]["exits"]["2"] for when in ("before", "after"))
    assert folder is not None
    assert set(by_name(folder)) - set(by_name(plain)) == {"exits.after_2.probe_weight", "exits.after_2.probe_bias"}
    assert after["agreement"] == before["agreement"]
    assert after["confidence"]["classifier"]["auroc"] > 0.6


def test_a_head_without_a_norm_is_tuned_without_one(home: Path, plain: Path, data: Path, tmp_path: Path) -> None:
    """EE-LLM's, which has an output matrix of its own."""
    model, _ = load_checkpoint(plain)
    config = ModelConfig.from_dict(
        model.to_dict() | {"exits": {"layers": [2], "head": "norm", "norm": False, "tie_output": False}}
    )
    save_checkpoint(tmp_path / "bare", config, random_params(config, seed=5))
    shutil.copyfile(plain / MODEL_FILE, tmp_path / "bare" / MODEL_FILE)
    shutil.copyfile(plain / CONFIG_FILE, tmp_path / "bare" / CONFIG_FILE)
    report, folder = tune_exits(tmp_path / "bare", data, exits=ExitChoice(probes=False), options=QUICK)
    before, after = (report["evaluation"][when]["exits"]["2"] for when in ("before", "after"))
    assert after["agreement"] > before["agreement"]
    assert folder is not None
    assert load_checkpoint(folder)[0] == config
    with pytest.raises(ConfigError, match=r"no norm, so none can be added after blocks \[1\]"):
        tune_exits(tmp_path / "bare", data, out=tmp_path / "more", exits=ExitChoice((1, 2)), options=QUICK)


def test_a_hugging_face_folder_gets_exits_too(plain: Path, data: Path, tmp_path: Path) -> None:
    vocabulary = load_tokenizer(plain).vocab_size
    make_folder(tmp_path / "hf", plain_config(n_layers=2, vocab_size=vocabulary), dtype="bfloat16")
    for name in (MODEL_FILE, CONFIG_FILE):
        shutil.copyfile(plain / name, tmp_path / "hf" / name)
    options = TuningOptions(steps=1, batch_tokens=64, seq_len=16)
    _, folder = tune_exits(tmp_path / "hf", data, exits=ExitChoice(probes=False), options=options)
    assert folder == tmp_path / "hf-exits"
    before, after = by_name(tmp_path / "hf"), by_name(folder)
    assert after.keys() - before.keys() == {"exits.after_1.norm"}
    for name, leaf in before.items():
        assert leaf.dtype == after[name].dtype == jnp.bfloat16
        assert leaf.tobytes() == after[name].tobytes()
    for text in ("one two", "<s>three four"):
        assert load_tokenizer(folder).encode(text) == load_tokenizer(tmp_path / "hf").encode(text)


def test_bits_are_those_of_the_text_whatever_it_is_packed_with(plain: Path) -> None:
    model, params = load_checkpoint(plain)
    config = choose_exits(model, ExitChoice((2,), "norm", True, False))
    params = start_exits(config, model, params)
    tuner = Tuner(config, params, QUICK)
    ids = np.asarray(load_tokenizer(plain).encode("one two three four"))
    logits = Reference(config, params).full_depth(ids[:-1])
    wanted = {point: -np.sum(np.log2(softmax(logits[point])[np.arange(len(ids) - 1), ids[1:]])) for point in (2, DEPTH)}
    for count in (1, 3):
        found = tuner.evaluate([ids] * count, 10 * count)
        assert found["full_depth"]["bits_per_byte"] == pytest.approx(wanted[DEPTH] / 10, rel=1e-5)
        assert found["exits"]["2"]["bits_per_byte"] == pytest.approx(wanted[2] / 10, rel=1e-5)


def test_probes_are_trained_over_the_heads_that_are_saved(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = load_checkpoint(plain)
    config = choose_exits(model, ExitChoice((2,)))
    tuner = Tuner(config, start_exits(config, model, params), QUICK)
    seen = {}

    def descend(self: Tuner, name: str, loss: object, trained: dict, fixed: dict, batches: object) -> dict:
        seen[name] = fixed
        return jax.tree.map(lambda leaf: leaf + 1e-3, trained)

    monkeypatch.setattr(Tuner, "_descend", descend)
    tuner.train([np.arange(9)], jnp.bfloat16)
    assert list(seen) == ["heads", "probes"]
    assert seen["probes"] is tuner.heads
    for leaf in jax.tree.leaves(tuner.exits):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, leaf.astype(jnp.bfloat16).astype(jnp.float32))


def test_steps_are_relative_to_what_is_learnt() -> None:
    """At the peak of the rate, for gains as well as for small and large matrices; zeros move as small matrices do."""
    params = {
        "norm": np.full(64, 3.0),
        "large": np.full((4, 64), -0.5),
        "small": np.full((4, 64), 0.01),
        "probe": np.zeros(64),
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    rule = optimiser(TuningOptions(steps=1, lr=0.02), hidden_size=64)
    with jax.numpy_dtype_promotion("standard"):
        steps, _ = rule.update(jax.tree.map(jnp.ones_like, params), rule.init(params), params)
    for name, size in {"norm": 3.0, "large": 0.5, "small": 0.125, "probe": 0.125}.items():
        np.testing.assert_allclose(steps[name], -0.02 * size, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- command line


def test_the_command_prints_what_it_found(plain: Path, data: Path, tmp_path: Path) -> None:
    arguments = "--exit-layers 1,2 --exit-head norm --no-probes --steps 2 --batch-tokens 64 --seq-len 16 --seed 4"
    found = run(plain, "--data", data, "--out", tmp_path / "new", "--eval-data", data, "--lr", 0.1, *arguments.split())
    assert found.exit_code == 0, found.stderr
    assert f"wrote {tmp_path / 'new'}" in found.stderr
    report = json.loads((tmp_path / "new" / REPORT_FILE).read_text())
    assert report["settings"] == {
        "steps": 2, "batch_tokens": 64, "seq_len": 16, "lr": 0.1, "eval_share": 0.05, "seed": 4, "dtype": "float32",
    }  # fmt: skip
    assert report["exits"] == {
        "layers": [1, 2], "head": "norm", "tie_output": True, "norm": True, "probes": False,
    }  # fmt: skip
    for layer in ("1", "2"):
        before, after = (report["evaluation"][when]["exits"][layer] for when in ("before", "after"))
        assert f"{before['agreement']:.2%} → {after['agreement']:.2%}" in found.stdout
        assert f"{before['bits_per_byte']:.4f} → {after['bits_per_byte']:.4f}" in found.stdout
        assert f"{after['confidence']['softmax']['auroc']:.3f}" in found.stdout


def test_no_steps_only_evaluate(plain: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    before = sorted(plain.parent.iterdir())
    found = run(plain, "--data", data, "--steps", 0, "--exit-layers", "2", "--seq-len", 16, "--batch-tokens", 64)
    assert found.exit_code == 0, found.stderr
    assert "agreement with full depth" in found.stdout
    assert "wrote" not in found.stderr
    assert sorted(plain.parent.iterdir()) == before


BAD = {
    "head": (["--exit-head", "block"], ["'block' cannot be tuned", "'norm'"]),
    "unknown_head": (["--exit-head", "big"], ["shared, norm, mlp, block", "'big'"]),
    "layer_0": (["--exit-layers", "0"], ["ExitConfig.layers must be an integer of at least 1", "0"]),
    "layer_beyond": (["--exit-layers", "2,3"], ["[3] do not exist", "1 to 2"]),
    "layers": (["--exit-layers", "2;3"], ["--exit-layers must be integers", "2;3"]),
    "shared_untied": (["--exit-head", "shared", "--untie-output"], ["tie_output must be true"]),
    "nothing_to_tune": (["--exit-head", "shared", "--no-probes"], ["'shared' exits without probes have nothing"]),
    "steps": (["--steps", "-1"], ["steps must be an integer of at least 0", "-1"]),
    "batch_tokens": (["--batch-tokens", "0"], ["batch_tokens must be", "at least 1", "0"]),
    "seq_len": (["--seq-len", "0"], ["seq_len must be", "at least 1", "0"]),
    "seq_len_long": (["--seq-len", "65"], ["seq_len 65", "64 positions"]),
    "seq_len_batch": (["--seq-len", "32", "--batch-tokens", "31"], ["batch_tokens (31)", "seq_len (32)"]),
    "lr": (["--lr", "0"], ["lr must be positive", "0.0"]),
    "lr_nan": (["--lr", "nan"], ["lr must be positive", "nan"]),
    "share": (["--eval-share", "1"], ["eval_share must lie between 0 and 1", "1.0"]),
    "seed": (["--seed", "-3"], ["seed must be an integer of at least 0", "-3"]),
    "dtype": (["--dtype", "int8"], ["dtype must be one of float32, bfloat16, float16", "int8"]),
    "no_file": (["--data", "{tmp}/none.txt"], ["cannot read {tmp}/none.txt"]),
    "no_eval_file": (["--eval-data", "{tmp}/none.txt"], ["cannot read {tmp}/none.txt"]),
    "no_json": (["--data", "{tmp}/bad.jsonl"], ["{tmp}/bad.jsonl, line 2", "not valid JSON"]),
    "one_document": (["--data", "{tmp}/one.txt"], ["1 document", "two"]),
    "zero_steps_out": (["--steps", "0", "--out", "{tmp}/x"], ["steps 0", "out cannot be given"]),
    "zero_steps_probes": (["--steps", "0", "--probes"], ["steps 0", "no probes are trained"]),
    "out_is_path": (["--out", "{plain}"], ["same folder", "{plain}"]),
    "out_inside": (["--out", "{plain}/new"], ["{plain}/new lies inside the source"]),
    "out_around": (["--out", "{plain}/..", "--overwrite"], ["source lies inside the target"]),
    "out_is_file": (["--out", "{tmp}/one.txt", "--overwrite"], ["{tmp}/one.txt exists and is no checkpoint"]),
    "out_no_checkpoint": (["--out", "{tmp}/full", "--overwrite"], ["{tmp}/full exists and is no checkpoint"]),
    "out_exists": (["--out", "{tmp}/old"], ["{tmp}/old exists", "overwrite"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_before_any_work(
    case: str, plain: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, parts = BAD[case]
    (tmp_path / "bad.jsonl").write_text('{"text": "fine here"}\n{"text": oops}\n')
    (tmp_path / "one.txt").write_text("only one paragraph")
    for name in ("full/something", "old/config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    before = sorted(tmp_path.rglob("*")) + sorted(plain.parent.iterdir())
    monkeypatch.setattr(exit_tuning, "load_checkpoint", lambda *_: pytest.fail("the weights were loaded"))
    flags = [flag.format(tmp=tmp_path, plain=plain) for flag in flags]
    given = [] if "--data" in flags else ["--data", data]
    where = [] if "--out" in flags or case == "zero_steps_probes" else ["--out", tmp_path / "new"]
    found = run(plain, *given, *where, *flags)
    assert found.exit_code == 2
    for part in parts:
        assert part.format(tmp=tmp_path, plain=plain) in found.stderr
    assert found.stdout == ""
    assert sorted(tmp_path.rglob("*")) + sorted(plain.parent.iterdir()) == before


def test_a_default_target_that_exists_is_not_replaced(plain: Path, data: Path, tuned: tuple[dict, Path]) -> None:
    found = run(plain, "--data", data)
    assert found.exit_code == 2
    assert f"{tuned[1]} exists" in found.stderr


def test_token_ids_beyond_the_model_are_refused(plain: Path, data: Path, tmp_path: Path) -> None:
    model, _ = load_checkpoint(plain)
    config = ModelConfig.from_dict(model.to_dict() | {"vocab_size": 100})
    save_checkpoint(tmp_path / "small", config, random_params(config))
    for name in (MODEL_FILE, CONFIG_FILE):
        shutil.copyfile(plain / name, tmp_path / "small" / name)
    found = run(tmp_path / "small", "--data", data)
    assert found.exit_code == 2
    assert "token id" in found.stderr
    assert "below 100" in found.stderr


def test_without_optax_the_way_to_get_it_is_named_first(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    found = run(plain, "--data", plain.parent / "none.txt", "--out", plain.parent / "never")
    assert found.exit_code == 2
    assert "pip install 'eejax[train]'" in found.stderr


def test_a_rate_that_is_too_high_writes_nothing(plain: Path, data: Path) -> None:
    flags = ["--exit-layers", 2, "--no-probes", "--steps", 3, "--batch-tokens", 64, "--seq-len", 16, "--lr", 1e30]
    found = run(plain, "--data", data, "--out", plain.parent / "never", *flags)
    assert found.exit_code == 2
    assert "lr must be lower than 1e+30" in found.stderr
    assert not (plain.parent / "never").exists()


@pytest.mark.parametrize("where", ["train", "write"])
def test_an_interruption_leaves_nothing_behind(
    where: str, plain: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("{}")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "evaluate", lambda *_: {"full_depth": {}, "exits": {}})
    if where == "train":
        monkeypatch.setattr(Tuner, "_descend", interrupted)
    else:
        monkeypatch.setattr(Tuner, "train", lambda *_: None)
        monkeypatch.setattr(exit_tuning, "write_checkpoint", interrupted)
    found = run(plain, "--data", data, "--out", old, "--overwrite")
    assert found.exit_code == 130
    assert sorted(tmp_path.rglob("*")) == [old, old / "config.json"]
    assert run(plain, "--data", data, "--out", tmp_path / "new").exit_code == 130
    assert sorted(tmp_path.iterdir()) == [old]


def test_overwriting_replaces_the_whole_checkpoint(
    plain: Path, data: Path, tuned: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tuner, "train", lambda *_: None)
    shutil.copytree(tuned[1], tmp_path / "old")
    (tmp_path / "old" / "stray").write_text("gone")
    (tmp_path / "empty").mkdir()
    for name, flag in (("old", ["--overwrite"]), ("empty", [])):
        found = run(plain, "--data", data, "--out", tmp_path / name, "--exit-layers", 2, *flag)
        assert found.exit_code == 0, found.stderr
        assert load_checkpoint(tmp_path / name)[0].exits.layers == (2,)
        assert not (tmp_path / name / "stray").exists()


# ---------------------------------------------------------------------------------------------------- which exits, how


def config_with(n_layers: int = 12, **exits: object) -> ModelConfig:
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads"), 4)
    return ModelConfig(**sizes, n_layers=n_layers, head_dim=2, exits=ExitConfig(**exits))


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        (config_with(), {}, ExitConfig((3, 6, 9), "norm", probes=True)),
        (config_with(2), {}, ExitConfig((1,), "norm", probes=True)),
        (config_with(32), {"head": "mlp"}, ExitConfig((8, 16, 24), "mlp", probes=True)),
        (config_with(layers=(4, 8)), {}, ExitConfig((4, 8), "shared", probes=True)),
        (config_with(layers=(4, 8)), {"head": "norm", "probes": False}, ExitConfig((4, 8), "norm")),
        (config_with(layers=(4,), head="norm"), {"layers": (8, 4, 8)}, ExitConfig((4, 8), "norm", probes=True)),
        (
            config_with(layers=(4,), head="mlp", tie_output=False, norm=False),
            {},
            ExitConfig((4,), "mlp", norm=False, tie_output=False, probes=True),
        ),
        (
            config_with(layers=(4,), head="mlp", tie_output=False, norm=False),
            {"head": "norm"},
            ExitConfig((4,), "norm", probes=True),
        ),
        (config_with(layers=(4,), head="block"), {"head": "mlp"}, ExitConfig((4,), "mlp", probes=True)),
    ],
)
def test_exits_not_asked_for_are_the_model_s_own(model: ModelConfig, given: dict, expected: ExitConfig) -> None:
    assert choose_exits(model, ExitChoice(**given)).exits == expected


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (config_with(layers=(4,), head="block"), "kind 'block' cannot be tuned"),
        (config_with(1), "a model of 1 blocks has no place for an exit"),
    ],
)
def test_exits_that_cannot_be_are_refused(model: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_exits(model, ExitChoice())
