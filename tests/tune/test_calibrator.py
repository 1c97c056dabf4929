"""Calibration from a tiny model's own answers: losses, what is certified and stored, and who may use it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from eejax import LLM, ConfigError, EarlyExitParams, InvalidRequestError, SamplingParams
from eejax.cli.app import app
from eejax.core import MODEL_MEASURES, ExitConfig, ModelConfig
from eejax.model.weights import load_checkpoint
from eejax.model.weights_writer import save_checkpoint
from eejax.serve.calibration import CALIBRATION_FILE, load_calibration, save_calibration
from eejax.text.tokenizer_files import CONFIG_FILE, MODEL_FILE
from eejax.tune import calibrator
from eejax.tune.answer_losses import LOSSES, AnswerPair, Losses, LossMeter, agreement, rouge_l
from eejax.tune.calibrator import CalibrationOptions, calibrate, certify
from tests.cases import CLEAR, random_model, random_params, random_prompt
from tests.reference import Reference, generate
from tests.tokenizer_cases import train_sentencepiece

MAX_TOKENS = 8
EARLY = EarlyExitParams(0.7)
TEXTS = [f"{a} {b}" for a in ("one", "two", "three", "a") for b in ("and four", "words", "b c")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and a file of prompts."""
    folder = tmp_path_factory.mktemp("calibrator") / "tiny"
    tokenizer, vocabulary = train_sentencepiece([*TEXTS, "a b c d e f g"] * 9, 300)
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        max_position=32,
        exits=ExitConfig((1, 2)),
    )
    save_checkpoint(folder, config, random_params(config, seed=5))
    (folder / MODEL_FILE).write_bytes(tokenizer)
    (folder / CONFIG_FILE).write_text(json.dumps({}))
    (folder.parent / "prompts.txt").write_text("\n".join([*TEXTS, "far too long " * 12]) + "\n")
    return folder


@pytest.fixture
def folder(made: Path):
    yield made
    (made / CALIBRATION_FILE).unlink(missing_ok=True)


def meter(folder: Path, prompts: Sequence[Sequence[int]], loss=LOSSES["agreement"], **options) -> LossMeter:
    return LossMeter(LLM(folder, **{"max_num_seqs": 1} | options), prompts, loss, MAX_TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 2, "page_size": 8, "num_pages": 3},  # too little memory for two long rows
        {"max_num_seqs": 2, "compaction": "always", "fill": "deferred", "rebatching": "always"},
    ],
    ids=["alone", "batch", "held"],
)
def test_losses_are_the_reference_s_in_every_batch(made: Path, options):
    """Neither the batch nor how it takes its exits changes a loss, so what one certifies holds in all of them."""
    seen: list[tuple[AnswerPair, tuple[int, ...]]] = []

    def looks(pair: AnswerPair) -> float:
        seen.append((pair, tuple(pair.choices())))
        return LOSSES["agreement"](pair)

    answers = reference_answers(made)
    losses = meter(made, [one[0] for one in answers], looks, **options).measure(EARLY)
    layers = []
    for (pair, choices), loss, known in zip(seen, losses.values, answers, strict=True):
        prompt, early, full, right = known
        assert (pair.prompt, pair.early, pair.full_depth) == (prompt, early.token_ids, full.token_ids)
        assert choices == right
        assert loss == pytest.approx(np.mean(np.array(early.token_ids[1:]) != right[1:]))
        layers += early.exit_layers[1:]
    assert len(set(losses.values)) > 2
    assert losses.mean_exit_layer == pytest.approx(np.mean(layers))


@functools.cache
def reference_answers(folder: Path) -> list[tuple]:
    """Eight clear-cut cases: prompt, early-exit answer, full-depth answer, full depth's choices along the former."""
    model, params = load_checkpoint(folder)
    found = []
    for seed in itertools.count():
        prompt = random_prompt(model, 4 + seed % 3, seed)
        early = generate(model, params, prompt, max_tokens=MAX_TOKENS, early_exit=EARLY)
        full = generate(model, params, prompt, max_tokens=MAX_TOKENS)
        if min(early.margins.smallest, full.margins.smallest) < CLEAR:
            continue
        logits = Reference(model, params).full_depth([*prompt, *early.token_ids])[model.n_layers]
        found.append((tuple(prompt), early, full, tuple(np.argmax(logits, axis=-1)[len(prompt) - 1 : -1].tolist())))
        if len(found) == 8:
            break
    assert len({early.token_ids == full.token_ids for _, early, full, _ in found}) == 2
    return found


def test_the_losses_that_come_with_it():
    pair = AnswerPair((1,), (5, 6, 7, 8), (5, 6, 9, 8), "a b c d", "a b x d", lambda: (5, 6, 9, 8))
    same = AnswerPair((1,), (5, 6), (5, 6), "", "", lambda: (5, 6))
    losses = LOSSES
    assert losses["agreement"](pair) == pytest.approx(1 / 3) == 1 - agreement(pair.early, pair.choices())
    assert losses["rouge-l"](pair) == pytest.approx(1 / 4) == 1 - rouge_l(pair.early_text, pair.full_depth_text)
    assert losses["exact"](pair) == 1.0
    assert [loss(same) for loss in losses.values()] == [0.0, 0.0, 0.0]


def test_certifying_stops_behind_the_first_failure():
    """Losses that rise as the threshold falls; what is not tested is not answered either."""
    asked = []

    class Meter(LossMeter):
        def __init__(self) -> None:
            pass

        def measure(self, early_exit: EarlyExitParams) -> Losses:
            asked.append((early_exit.threshold, early_exit.measure))
            return Losses((1 - early_exit.threshold,) * 60, 3 * early_exit.threshold)

    options = CalibrationOptions(0.2, 0.9, grid=(0.5, 0.98, 0.9, 1.0, 0.7), loss="exact", max_tokens=5)
    found = certify(Meter(), "margin", random_model("mqa")[0], options)
    assert asked == [(1.0, "margin"), (0.98, "margin"), (0.9, "margin"), (0.7, "margin")]
    assert (found.threshold, found.risk, found.mean_exit_layer) == (0.9, pytest.approx(0.1), pytest.approx(2.7))
    assert (found.num_prompts, found.loss, found.max_tokens) == (60, "exact", 5)
    assert found.grid == (1.0, 0.98, 0.9, 0.7, 0.5)
    assert len(found.p_values) == len(found.risks) == len(found.mean_exit_layers) == 4
    assert found.p_values[2] <= 0.1 < found.p_values[3]


def test_a_loss_out_of_range_is_refused_by_value(made: Path):
    one = meter(made, [[5, 6]], lambda _: -0.5)
    with pytest.raises(ConfigError, match=r"a number in \[0, 1\], got -0.5"):
        one.measure(EARLY)


@pytest.mark.parametrize("measure", MODEL_MEASURES)
def test_grids_go_down_from_the_most_cautious(measure):
    grid = calibrator.GRIDS[measure]
    assert list(grid) == sorted(set(grid), reverse=True)
    assert 0 <= grid[-1] < 0.5 + 1e-9 < 0.99 <= grid[0] <= 1


# ------------------------------------------------------------------------------------------------------- a checkpoint


OPTIONS = {"max_risk": 0.9, "confidence": 0.6, "grid": (1.0, 0.6, 0.3), "max_tokens": MAX_TOKENS}


def test_what_is_certified_is_stored_and_served(folder: Path):
    said: list[str] = []
    prompts = [folder.parent / "prompts.txt"]
    first, file = calibrate(folder, prompts, CalibrationOptions(**OPTIONS), max_num_seqs=1, say=said.append)
    assert file == folder / CALIBRATION_FILE
    assert load_calibration(folder) == first
    found = first.measures["softmax"]
    assert (found.threshold, found.num_prompts) == (0.3, len(TEXTS))
    assert found.mean_exit_layers[0] == 3 > found.mean_exit_layer
    assert "12 prompts, 1 too long" in said[0]

    llm = LLM(folder, max_num_seqs=1)
    params = [
        SamplingParams(temperature=0, max_tokens=MAX_TOKENS, early_exit=EarlyExitParams(one))
        for one in (0.3, "calibrated")
    ]
    answers = [[o.outputs[0] for o in llm.generate(TEXTS, one, use_tqdm=False)] for one in params]
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]
    assert [a.exit_layers for a in answers[0]] == [a.exit_layers for a in answers[1]]
    with pytest.raises(
        InvalidRequestError, match=r"after blocks \[1, 2\], and this model has 'shared' exits after \[2\]"
    ):
        LLM(folder, exit_layers=[2], max_num_seqs=1).generate("one", params[1])
    with pytest.raises(InvalidRequestError, match="other weights, or another dtype"):
        LLM(folder, dtype="bfloat16", max_num_seqs=1).generate("one", params[1])

    # Another measure joins; what was found for other exits goes.
    margin = CalibrationOptions(**OPTIONS | {"measures": ("margin",)})
    both, _ = calibrate(folder, prompts, margin, max_num_seqs=1, say=said.append)
    assert set(both.measures) == {"softmax", "margin"}
    assert both.measures["softmax"] == found
    assert not any("dropped" in line for line in said)
    save_calibration(folder, dataclasses.replace(both, exit_layers=(1,)))
    other, _ = calibrate(folder, prompts, margin, max_num_seqs=1, say=said.append)
    assert (set(other.measures), other.exit_layers) == ({"margin"}, (1, 2))
    assert "dropped what was stored for softmax" in said[-1]


def test_where_nothing_can_be_certified_it_says_so_and_runs_at_full_depth(folder: Path):
    def always_bad(pair: AnswerPair) -> float:
        return 1.0

    options = CalibrationOptions(**OPTIONS | {"loss": always_bad})
    stored, _ = calibrate(folder, [folder.parent / "prompts.txt"], options, max_num_seqs=1)
    found = stored.measures["softmax"]
    assert (found.threshold, found.loss, found.p_values) == (None, "always_bad", (1.0,))
    assert found.mean_exit_layer == 3
    shown = run("generate", folder, "one", "--threshold", "calibrated", "--max-num-seqs", "1", "--json")
    assert shown.exit_code == 0, shown.output
    assert set(json.loads(shown.stdout)["outputs"][0]["exit_layers"]) == {3}
    assert "no threshold of measure softmax was certified: full depth" in shown.stderr


def run(*arguments: object):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_the_command_line(folder: Path):
    shown = run(
        "calibrate", folder, "--prompts", folder.parent / "prompts.txt", "--max-risk", "0.9", "--confidence", "0.6",
        "--measure", "margin", "--measure", "similarity", "--loss", "exact", "--grid", "1,0.5", "--max-tokens", "4",
        "--max-num-seqs", "1",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    stored = load_calibration(folder)
    assert stored is not None
    assert [(name, one.loss, one.grid, one.max_risk) for name, one in stored.measures.items()] == [
        (name, "exact", (1.0, 0.5), 0.9) for name in ("margin", "similarity")
    ]
    assert "in every batch" in shown.stdout
    assert "margin" in run("info", folder).stdout
    refused = run("generate", folder, "one", "--threshold", "calibrated")
    assert refused.exit_code == 2
    assert "for measure 'softmax', only for margin, similarity; make one with: eejax calibrate" in refused.stderr


def test_bad_input_is_refused_before_a_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrator, "LLM", lambda *_, **__: pytest.fail("a model was loaded"))
    prompts = folder.parent / "prompts.txt"
    for arguments, said in (
        (("--max-risk", "0.02"), "13 usable prompts can certify nothing: a risk of at most 0.02 with confidence 0.95 "
         "needs 149, even if no answer errs"),
        (("--max-risk", "0"), "max_risk must be a number between 0 and 1, got 0.0"),
        (("--confidence", "1"), "confidence must be a number between 0 and 1, got 1.0"),
        (("--measure", "random"), "must be of softmax, margin, similarity, classifier, got 'random'"),
        (("--loss", "bleu"), "must be one of agreement, rouge-l, exact, or a function, got 'bleu'"),
        (("--grid", "0.5,1.5"), "thresholds in [0, 1], got (0.5, 1.5)"),
        (("--grid", "high"), "--grid must be numbers"),
        (("--max-tokens", "32", "--max-risk", "0.9"), "must be below the model's 32 positions, got 32"),
    ):  # fmt: skip
        shown = run("calibrate", folder, "--prompts", prompts, *arguments)
        assert (shown.exit_code, said in " ".join(shown.stderr.split())) == (2, True), shown.output


def test_bad_input_is_refused_before_anything_is_answered(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LLM, "generate", lambda *_, **__: pytest.fail("a prompt was answered"))
    prompts = [folder.parent / "prompts.txt"]
    with pytest.raises(InvalidRequestError, match="needs a probe"):
        calibrate(folder, prompts, CalibrationOptions(**OPTIONS | {"measures": ("classifier",)}))
    # Thirteen texts would do, but one leaves no room for an answer.
    with pytest.raises(ConfigError, match=r"12 usable prompts .* needs 13"):
        calibrate(folder, prompts, CalibrationOptions(**OPTIONS | {"max_risk": 0.17, "confidence": 0.9}))
    with pytest.raises(ConfigError, match="no exits"):
        calibrate(folder, prompts, CalibrationOptions(**OPTIONS), exit_layers=[])
