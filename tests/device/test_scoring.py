"""Scoring a given text, held to the reference that goes through it token by token."""

from __future__ import annotations

import numpy as np
import pytest

from eejax.core import CacheConfig, EngineConfig, ExitConfig, SchedulerConfig
from eejax.core.errors import InvalidRequestError
from eejax.device.runner import Runner
from tests.cases import CLEAR, draw_case, exit_settings, random_model, random_prompt
from tests.reference import Reference, replay, softmax

MAX_LEN = 160
TOLERANCE = 1e-4  # float32 sums of some 40 terms and a few blocks, against float64


def make_runner(config, params) -> Runner:
    return Runner(EngineConfig(config, CacheConfig(1, 8), SchedulerConfig(1), max_model_len=MAX_LEN), params)


def model_and_runner(shape: str, **overrides):
    config, params = random_model(shape, max_position=MAX_LEN, **overrides)
    return config, params, make_runner(config, params)


@pytest.mark.parametrize(
    ("shape", "measure"),
    [("deep", "softmax"), ("mlp_own", "margin"), ("everything_else", "softmax"), ("window_above", "margin")],
)
def test_an_answer_is_scored_as_it_was_decoded(shape, measure):
    """Blocks, MLPs and windows of exits' own included: every token exits where it exited, and is chosen again."""
    config, params, runner = model_and_runner(shape)
    for name, early_exit, want in exit_settings(config, params, measure):
        if name == "decaying":
            continue
        case = draw_case(config, params, early_exit=early_exit, want_exits=want, prompt_length=5, max_tokens=9)
        text, start = (*case.prompt, *case.expected.token_ids), len(case.prompt)
        scores = runner.score(text, early_exit.thresholds_for(config), measure, start)
        assert tuple(scores.exit_layers[start:-1]) == case.expected.exit_layers[1:], name
        assert set(scores.exit_layers[:start]) == {config.n_layers}
        assert tuple(scores.choices[start - 1 : -1]) == case.expected.token_ids, name
        np.testing.assert_allclose(scores.logprobs[start - 1 : -1], case.expected.logprobs, atol=TOLERANCE)
    assert set(runner._compiled.programs) == {("score", 16, "")}  # one program for all thresholds


@pytest.mark.parametrize("shape", ["gqa", "block_own"])
def test_a_text_that_the_model_did_not_write(shape):
    """The reference is told where tokens exited, since the text is not its own; it then gives what was read there."""
    config, params, runner = model_and_runner(shape)
    text, start = random_prompt(config, 40, 3), 12
    scores = runner.score(text, (0.35,) * len(config.exits.layers), "softmax", start)
    assert set(scores.exit_layers[start:]) == {*config.exits.layers, config.n_layers}
    logits = replay(config, params, text[:start], text[start:], (config.n_layers, *scores.exit_layers[start:-1]))
    expect_read(scores, logits, text, start)


def expect_read(scores, logits, text, start):
    """`logits` are those from which the tokens from `start` on were drawn."""
    first, second = np.sort(logits)[:, :-3:-1].T
    clear = first - second > CLEAR
    assert clear.sum() > len(clear) / 2
    np.testing.assert_array_equal(scores.choices[start - 1 : -1][clear], np.argmax(logits, axis=-1)[clear])
    given = np.log(softmax(logits))[np.arange(len(logits)), text[start:]]
    np.testing.assert_allclose(scores.logprobs[start - 1 : -1], given, atol=TOLERANCE)


def test_without_thresholds_everything_runs_at_full_depth():
    """More tokens than are read at a time, none of them at an exit; what follows the text has no part in it."""
    config, params, runner = model_and_runner("window")
    text = random_prompt(config, 140, 5)
    scores = runner.score(text)
    assert set(scores.exit_layers) == {config.n_layers}
    assert {len(scores.choices), len(scores.logprobs), len(scores.exit_layers)} == {140}
    logits = Reference(config, params).full_depth(text)[config.n_layers]
    expect_read(scores, logits[:-1], text, 1)
    assert scores.choices[-1] == np.argmax(logits[-1])
    assert scores.logprobs[-1] == pytest.approx(np.log(np.max(softmax(logits[-1]))), abs=TOLERANCE)


@pytest.mark.parametrize("measure", ["similarity", "classifier"])
def test_measures_that_ask_no_head(measure):
    """Half the tokens that come to the first exit take it, by a confidence written out here again."""
    config, params, runner = model_and_runner("mqa", exits=ExitConfig((1,), probes=True))
    text = random_prompt(config, 16, 9)
    states = Reference(config, params)
    states.full_depth(text)
    before, after = states.entering[0], states.entering[1]
    if measure == "similarity":
        norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        confidence = np.sum(before * after, axis=1) / norms
    else:
        head = states.params["exits"]["after_1"]
        normed = after / np.sqrt(np.mean(after**2, axis=1, keepdims=True) + config.norm_eps) * states.params["norm"]
        confidence = 1 / (1 + np.exp(-(normed @ head["probe_weight"] + head["probe_bias"])))
    ordered = np.sort(confidence)
    middle = (ordered[7] + ordered[8]) / 2
    assert ordered[8] - ordered[7] > CLEAR
    scores = runner.score(text, (middle,), measure, start=1)
    np.testing.assert_array_equal(scores.exit_layers[1:] == 1, confidence[1:] >= middle)
    expect_read(scores, replay(config, params, text[:1], text[1:], (3, *scores.exit_layers[1:-1])), text, 1)


def test_what_cannot_be_scored_is_refused_before_anything_is_compiled():
    runner = make_runner(*random_model("gqa", max_position=MAX_LEN))
    for arguments, said in (
        (([],), "1 to 160 tokens, got 0"),
        (([1] * 161,), "got 161"),
        (([1, 61],), r"\[61\] are outside the vocabulary \(0..60\)"),
        (([1, 2], (0.5,)), r"1 thresholds \[0.5\] for 2 exits \[1, 3\]"),
        (([1, 2], None, "random"), "softmax, margin, similarity, got 'random'"),
        (([1, 2], None, "classifier"), "got 'classifier'"),
        (([1, 2], None, "softmax", 3), r"start must lie in 0..2, got 3"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            runner.score(*arguments)
    assert not runner._compiled.programs
