"""`eejax train-length` over a tiny random model: its labels, what heads learn, what is reported, what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from eejax import LLM, SamplingParams
from eejax.cli.app import app
from eejax.core import ModelConfig
from eejax.core.errors import ConfigError
from eejax.core.lengths import LEVELS
from eejax.model.weights import load_config
from eejax.model.weights_writer import save_checkpoint
from eejax.schedule.length_heads import HEADS_FILE, load_length_heads
from eejax.schedule.length_predictor import ConstantPredictor, HiddenPredictor, PromptPredictor
from eejax.text.prompts import read_prompts, read_sourced_prompts
from eejax.text.tokenizer_files import CONFIG_FILE, MODEL_FILE
from eejax.tune import length_labels, length_training
from eejax.tune.length_fit import fit_heads, fit_quantiles, scores
from eejax.tune.length_labels import LabelledPrompt, choose_prompts, make_labels, read_labels
from eejax.tune.length_training import LengthOptions, train_length
from tests.cases import random_params
from tests.tokenizer_cases import train_sentencepiece

WORDS = ["one", "two", "three", "four", "and", "words", "of", "a", "text", "b", "c", "d", "e", "f"]
TEMPERATURES = (0.5, 1.0, 2.0)
MAX_TOKENS = 12
PREDICTORS = ["prompt", "hidden", "perception", "constant", "noise floor"]


def jsonl(file: Path, lines: list[dict]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template that ends its answers at one of many tokens."""
    folder = tmp_path_factory.mktemp("length") / "plain"
    tokenizer, vocabulary = train_sentencepiece(texts(40, 1), 300)
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        max_position=128,
    )
    save_checkpoint(folder, config, random_params(config, seed=5))
    (folder / MODEL_FILE).write_bytes(tokenizer)
    (folder / CONFIG_FILE).write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, vocabulary, 7))}))
    return folder


@pytest.fixture(scope="module")
def llm(plain: Path) -> LLM:
    return LLM(plain)


@pytest.fixture
def own(plain: Path, tmp_path: Path) -> Path:
    """A copy of the model to store heads in."""
    shutil.copytree(plain, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Prompts of two kinds: what begins with `one` is answered in 4 to 6 tokens, what begins with `two` in 60 to 90."""
    rng = np.random.default_rng(3)
    lines = []
    for i, text in enumerate(texts(60, 4)):
        short = i % 2 == 0
        lengths = rng.integers(4, 7, 4) if short else rng.integers(60, 91, 4)
        label = LabelledPrompt(
            f"{'one' if short else 'two'} {text}", "ab"[i // 30], 100, (0.5, 1.0, 1.0, 2.0), tuple(lengths.tolist())
        )
        lines.append(dataclasses.asdict(label))
    return jsonl(tmp_path / "labels.jsonl", lines)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train-length", *map(str, arguments)])


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_are_the_lengths_of_the_models_own_answers(llm: LLM, tmp_path: Path) -> None:
    prompts = [(text, "here") for text in texts(10)]
    out = tmp_path / "labels.jsonl"
    found = make_labels(llm, prompts, TEMPERATURES, MAX_TOKENS, 7, out)
    assert [(one.prompt, one.source, one.max_tokens) for one in found] == [(*each, MAX_TOKENS) for each in prompts]
    assert {one.temperatures for one in found} == {(0.5, 1.0, 1.0, 2.0)}
    assert found[0].pair == 1
    assert read_labels(out) == found == make_labels(llm, prompts, TEMPERATURES, MAX_TOKENS, 7)
    lengths = np.array([one.lengths for one in found])
    assert lengths.min() < lengths.max() <= MAX_TOKENS
    assert np.any(lengths[:, 1] != lengths[:, 2])  # two answers at one temperature are two answers
    assert not np.array_equal(lengths, [one.lengths for one in make_labels(llm, prompts, TEMPERATURES, MAX_TOKENS, 8)])
    seeds = np.random.default_rng([7, 1]).integers(2**32, size=(10, 3))[4].tolist()
    lengths = []
    for n, temperature, seed in zip((1, 2, 1), TEMPERATURES, seeds, strict=True):
        params = SamplingParams(n=n, temperature=temperature, max_tokens=MAX_TOKENS, seed=seed)
        lengths += [len(one.token_ids) for one in llm.generate(prompts[4][0], params, use_tqdm=False)[0].outputs]
    assert tuple(lengths) == found[4].lengths


def test_labels_made_before_an_interruption_are_kept(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_labels, "LABEL_BATCH", 4)
    generate, calls = llm.generate, []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(llm, "generate", interrupted)
    prompts, out = [(text, "here") for text in texts(12)], tmp_path / "labels.jsonl"
    with pytest.raises(KeyboardInterrupt):
        make_labels(llm, prompts, (1.0,), MAX_TOKENS, 0, out)
    assert [one.prompt for one in read_labels(out)] == [text for text, _ in prompts[:8]]


def test_prompts_that_leave_no_room_for_the_answer_are_left_out(llm: LLM) -> None:
    prompts = [(text, "here") for text in [*texts(10), "words " * 120]]
    found = make_labels(llm, prompts, (1.0,), MAX_TOKENS, 0)
    assert [one.prompt for one in found] == [text for text, _ in prompts[:10]]


def test_every_file_gives_as_many_prompts_and_none_twice(tmp_path: Path) -> None:
    many, few = [f"many {i}" for i in range(40)], [f"few {i}" for i in range(15)]
    first = jsonl(tmp_path / "first.jsonl", [{"prompt": text} for text in [*many, *many, " "]])
    second = jsonl(tmp_path / "second.jsonl", [{"prompt": text} for text in [*few, many[0]]])
    found = choose_prompts([first, second], 20, 0)
    assert sorted(source for _, source in found) == ["first"] * 10 + ["second"] * 10
    assert len(dict(found)) == 20
    assert found == choose_prompts([first, second], 20, 0) != choose_prompts([first, second], 20, 1)
    everything = choose_prompts([first, second], None, 0)
    assert sorted(text for text, _ in everything) == sorted(many + few)
    assert dict(everything)[many[0]] == "first"


def test_prompts_bring_their_sources(tmp_path: Path) -> None:
    lines = [
        {"instruction": "Add.", "input": "1 2", "source": "sums"},
        {"instruction": "Say\u2028it.", "input": "", "output": "it"},
    ]
    packed = tmp_path / "some.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()))
    assert read_sourced_prompts(packed) == [("Add.\n\n1 2", "sums"), ("Say\u2028it.", "some")]
    assert read_prompts(packed, 1) == ["Add.\n\n1 2"]
    whole = packed.read_bytes()
    for damaged in (whole[:-9], whole[:10] + b"\xff" * 9 + whole[19:], whole[10:]):
        packed.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"cannot read prompts from .*some\.jsonl\.gz"):
            read_prompts(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [1, 2]}, "line 2: expected a label"),
        ({"lengths": [0, 1, 2]}, "line 2: expected a label"),
        ({"lengths": [1, 2, 101]}, "line 2: expected a label"),
        ({"lengths": None}, "line 2: expected a label"),
        ({"temperatures": [0.5, 0.7, 1.0]}, "line 2: expected a label"),  # no two answers to compare
        ({"max_tokens": 99}, r"line 2: temperatures and max_tokens are .*99.*100"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    good = {"prompt": "a", "source": "s", "max_tokens": 100, "temperatures": [0.5, 1.0, 1.0], "lengths": [1, 2, 3]}
    with pytest.raises(ConfigError, match=message):
        read_labels(jsonl(tmp_path / "labels.jsonl", [good, good | change]))


# ------------------------------------------------------------------------------------------------------------ learning


def test_quantiles_are_learnt_with_their_spread() -> None:
    """The spread grows along the first feature, the middle along the second; the third says nothing."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 3))
    noise = rng.standard_normal((600, 4))
    targets = 4 + x[:, 1:2] + (1 + 0.5 * np.tanh(x[:, :1])) * noise
    found = fit_quantiles(7 + 3 * x, 3.0, targets)
    assert found.dtype == np.float32
    predicted = (7 + 3 * x) @ found[:-1] + found[-1]
    below = np.mean(targets[:, :, None] <= predicted[:, None, :], axis=(0, 1))
    np.testing.assert_allclose(below, LEVELS, atol=0.03)
    slopes = 3 * found[:-1]
    np.testing.assert_allclose(slopes[1], 1, atol=0.15)
    assert slopes[0, -1] > 0.25 > -0.25 > slopes[0, 0]
    assert np.abs(slopes[2]).max() < 0.1
    assert np.array_equal(found, fit_quantiles(7 + 3 * x, 3.0, targets))


def test_the_hidden_head_adds_what_the_prompt_does_not_tell() -> None:
    """A prompt is of one kind or another, and only its hidden state tells which of two lengths it has there."""
    rng = np.random.default_rng(1)
    kind, way = rng.integers(2, size=300), rng.integers(2, size=300)
    prompts = [[10 + k, *rng.integers(20, 40, 6).tolist()] for k in kind]
    hidden = rng.standard_normal((300, 16)).astype(np.float32)
    hidden[:, 0] += 6 * way
    length = 10 * 3**kind * 2**way
    lengths = rng.poisson(np.repeat(length[:, None], 3, axis=1)) + 1
    heads = fit_heads(prompts[:200], hidden[:200], lengths[:200], 200)
    constant, prompt, state = ConstantPredictor(heads), PromptPredictor(heads), HiddenPredictor(heads)
    found: dict[str, list] = {"constant": [], "prompt": [], "hidden": []}
    for ids, one in zip(prompts[200:], hidden[200:], strict=True):
        found["constant"].append(constant.predict(ids, 200).quantiles)
        found["prompt"].append((before := prompt.predict(ids, 200)).quantiles)
        found["hidden"].append(state.refine(before, one, 200).quantiles)
    loss = {name: scores(np.array(rows), lengths[200:, 0])["pinball"] for name, rows in found.items()}
    assert loss["hidden"] < 0.8 * loss["prompt"] < 0.8 * 0.8 * loss["constant"]  # pyright: ignore[reportOptionalOperand]


def test_scores_are_what_they_are_called() -> None:
    medians, truth = np.array([10.0, 100, 300, 160]), np.array([20, 151, 180, 40])
    quantiles = np.repeat(medians[:, None], len(LEVELS), axis=1)
    found = scores(quantiles, truth)
    assert found["mean_error"] == (10 + 51 + 120 + 120) / 4
    assert (found["acc_50"], found["acc_100"], found["within_2x"]) == (0.25, 0.5, 0.75)
    assert found["spearman"] == pytest.approx(0.8)  # the ranks are 0 1 3 2 and 0 2 3 1
    assert found["pinball"] == pytest.approx(0.5 * np.mean(np.abs(np.log(medians / truth))))
    assert scores(quantiles[:, ::-1] * 0 + 50, truth)["spearman"] is None
    ties = scores(np.repeat(np.array([[1.0], [1.0], [2.0]]), 5, axis=1), np.array([5, 6, 7]))
    assert ties["spearman"] == pytest.approx(np.sqrt(0.75))


def test_training_tells_kinds_apart_and_says_so(own: Path, labels: Path) -> None:
    report, file = train_length(own, labels=labels, options=LengthOptions(seed=1))
    assert file == own / HEADS_FILE
    assert (report["training_prompts"], report["held_out_prompts"], report["target"]) == (48, 12, "every")
    assert list(report["evaluation"]) == ["a", "b", "all"]
    rows = report["evaluation"]["all"]
    assert list(rows) == PREDICTORS
    for name in ("prompt", "hidden"):
        assert rows[name]["within_2x"] > 0.8 > 0.6 > rows["constant"]["within_2x"]
        assert rows[name]["spearman"] > 0.7
        assert rows[name]["pinball"] < 0.5 * rows["constant"]["pinball"]
    assert rows["constant"]["spearman"] is None
    assert rows["noise floor"]["within_2x"] == 1
    heads = load_length_heads(own, load_config(own))
    assert heads is not None
    assert heads.about["training_prompts"] == 48
    first = file.read_bytes()
    again, _ = train_length(own, labels=labels, options=LengthOptions(seed=1))
    assert again == report
    assert file.read_bytes() == first


def test_the_longest_of_several_answers_can_be_the_target(own: Path, labels: Path) -> None:
    marginals = []
    for target in ("every", "max"):
        report, _ = train_length(own, labels=labels, options=LengthOptions(target=target))
        assert report["target"] == target
        heads = load_length_heads(own, load_config(own))
        assert heads is not None
        marginals.append(np.exp(heads.marginal))
    assert np.all(marginals[1] >= marginals[0])
    assert marginals[1][0] > marginals[0][0]
    assert marginals[1][-1] > marginals[0][-1]


def test_what_the_model_says_is_measured(own: Path, labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it says a number to every second prompt."""

    def say(llm: LLM, prompts: list) -> list[str]:
        return [f"{5 * (i % 3 + 1)} tokens" if i % 2 else "none" for i in range(len(prompts))]

    monkeypatch.setattr(length_training, "ask", say)
    report, _ = train_length(own, labels=labels, options=LengthOptions(hold_out=0.8))
    assert report["numbers_said"] == 24
    heads = load_length_heads(own, load_config(own))
    assert heads is not None
    assert heads.perception is not None
    assert np.exp(heads.perception[0]) < 1 < np.exp(heads.perception[-1])
    report, _ = train_length(own, labels=labels, options=LengthOptions(hold_out=0.5))
    heads = load_length_heads(own, load_config(own))
    assert heads is not None
    assert (report["numbers_said"], heads.perception) == (15, None)  # too few to measure a spread
    assert report["evaluation"]["all"]["perception"] != report["evaluation"]["all"]["constant"]


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_answers_learns_and_reports(own: Path, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "prompts.jsonl", [{"prompt": text, "source": "s"} for text in dict.fromkeys(texts(14))])
    out, found = tmp_path / "labels.jsonl", tmp_path / "report.json"
    options = ("--temperatures", "1.0", "--max-tokens", MAX_TOKENS, "--labels-out", out, "--json", found)
    result = run(own, "--prompts", prompts, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(found.read_text())
    assert report["held_out_prompts"] + report["training_prompts"] == len(read_labels(out)) == 14
    assert list(report["evaluation"]) == ["s", "all"]
    assert all(name in result.output for name in PREDICTORS)
    assert "pinball" in result.output
    assert LLM(own).config.scheduler.policy == "fcfs"  # heads in the folder disturb nobody
    result = run(own, "--labels", out, "--json", found)
    assert result.exit_code == 0, result.output
    relearnt = json.loads(found.read_text())
    assert relearnt["evaluation"] == report["evaluation"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give files of prompts, or labels"),
        (["--prompts", "PROMPTS", "--labels", "LABELS"], "not both"),
        (["--labels", "LABELS", "--labels-out", "OUT"], "leave out labels_out"),
        (["--labels", "nowhere.jsonl"], "cannot read labels from nowhere.jsonl"),
        (["--prompts", "nowhere.jsonl"], "cannot read prompts from nowhere.jsonl"),
        (["--prompts", "PROMPTS"], "3 usable prompts are too few"),
        (["--labels", "LABELS", "--hold-out", "1"], "hold_out must be a number between 0 and 1, got 1.0"),
        (["--labels", "LABELS", "--temperatures", "0.5,x"], "--temperatures must be numbers"),
        (["--labels", "LABELS", "--temperatures", "0"], "temperatures must be numbers above 0"),
        (["--labels", "LABELS", "--target", "mean"], "target must be one of every, max, got 'mean'"),
        (["--labels", "LABELS", "--num-prompts", "0"], "num_prompts must be an integer of at least 1"),
        (["--labels", "LABELS", "--seed", "-1"], "seed must be an integer in 0..2**32-1"),
        (["--prompts", "MANY", "--max-tokens", "128"], "max_tokens must be below the model's 128 positions, got 128"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_model_alone(
    own: Path, labels: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    prompts = jsonl(tmp_path / "three.jsonl", [{"prompt": text} for text in "abc"])
    many = jsonl(tmp_path / "many.jsonl", [{"prompt": text} for text in texts(20)])
    names = {"PROMPTS": prompts, "MANY": many, "LABELS": labels, "OUT": tmp_path / "out"}
    result = run(own, *(names.get(word, word) for word in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stderr.count("error:") == 1
    assert not (own / HEADS_FILE).exists()
