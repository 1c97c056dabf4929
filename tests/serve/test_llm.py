"""The public interface over a tiny random model: every answer asked for, and a clear error for every mistake."""

from __future__ import annotations

import itertools
import json
import logging
import math
from dataclasses import fields
from pathlib import Path

import jax
import pytest

from eejax import (
    LLM,
    CapacityError,
    ConfigError,
    DecayingThreshold,
    EarlyExitParams,
    EejaxError,
    InvalidRequestError,
    SamplingParams,
    TokenizerError,
)
from eejax.cli.app import in_chat_template
from eejax.core import EngineOptions, ExitConfig, ModelConfig
from eejax.model.weights_writer import save_checkpoint
from eejax.schedule.integrity import check_integrity
from eejax.serve.engine import EngineStats
from eejax.text.tokenizer_copy import copy_tokenizer
from eejax.text.tokenizer_files import CONFIG_FILE, MODEL_FILE
from tests.cases import random_model, random_params
from tests.reference import generate as reference
from tests.tokenizer_cases import FOLDERS, train_sentencepiece

DEPTH, EXITS, MAX_LEN, PAGE = 3, (1, 2), 32, 8
TEXTS = ["one two three", "a b c", "three and four"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def ids(*tokens: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(tokens)}


def greedy(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 10, "ignore_eos": True} | changes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose confidences spread over (0, 1), with a sentencepiece tokenizer."""
    folder = tmp_path_factory.mktemp("llm") / "tiny"
    tokenizer, vocabulary = train_sentencepiece(["one two three and four", "a b c d e f", "words of the text"] * 9, 310)
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        n_layers=DEPTH,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        max_position=64,
        exits=ExitConfig(EXITS),
    )
    save_checkpoint(folder, config, random_params(config, seed=5))
    (folder / MODEL_FILE).write_bytes(tokenizer)
    (folder / CONFIG_FILE).write_text(json.dumps({}))
    return folder


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    """Most tests share it; it must be left without requests."""
    return LLM(checkpoint, max_model_len=MAX_LEN, max_num_seqs=2, page_size=PAGE, num_pages=12)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest):
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        for request_id in list(llm.engine._requests):
            llm.engine.abort(request_id)  # so that the next test is not upset
            pytest.fail(f"request {request_id} was left behind")
        assert llm.stats().pages_in_use == 0
        check_integrity(llm.engine.allocator, [])


@pytest.fixture
def no_device_work(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """Whatever runs on the device fails the test."""
    before = llm.stats()
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", lambda *_, **__: pytest.fail("the device was used"))
        yield
    assert llm.stats() == before


def says(error: BaseException, *parts: object) -> None:
    for part in parts:
        assert str(part) in str(error), f"{part!r} is missing in: {error}"


# ------------------------------------------------------------------------------------------------------------- answers


def test_answers_are_the_reference_s_in_prompt_order(llm: LLM, checkpoint: Path):
    """More prompts than slots, of different lengths: they do not finish in the order they came."""
    model = llm.config.model
    prompts = [ids(*range(i, i + n)) for i, n in ((3, 2), (50, 12), (9, 7), (100, 1), (7, 5))]
    params = [greedy(max_tokens=n, early_exit=EarlyExitParams(0.3)) for n in (12, 2, 9, 1, 5)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        expected = reference(
            model,
            jax.device_get(llm.engine.runner.params),
            prompt["prompt_token_ids"],
            max_tokens=one.max_tokens,
            early_exit=one.early_exit,
        )
        assert expected.margins.smallest > 1e-4
        [answer] = output.outputs
        assert (answer.token_ids, answer.exit_layers) == (expected.token_ids, expected.exit_layers)
        assert (answer.index, answer.finish_reason, answer.logprobs) == (0, "length", None)
        assert (output.prompt, output.finished, output.error) == (None, True, None)
        assert output.prompt_token_ids == tuple(prompt["prompt_token_ids"])
        assert answer.text == llm.tokenizer.decode(answer.token_ids)
        assert 0 < output.metrics.time_to_first_token <= output.metrics.latency
    assert len({output.request_id for output in outputs}) == len(prompts)
    assert {e for output in outputs for e in output.outputs[0].exit_layers} == {*EXITS, DEPTH}


def test_text_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]):
    outputs = llm.generate(TEXTS, GREEDY)  # with the progress bar, as by default
    assert capsys.readouterr().out == ""
    for text, output in zip(TEXTS, outputs, strict=True):
        assert output.prompt == text
        assert output.prompt_token_ids == tuple(llm.tokenizer.encode(text))
        [alone] = llm.generate(text, GREEDY, use_tqdm=False)
        assert alone.outputs == output.outputs
        [by_ids] = llm.generate(ids(*output.prompt_token_ids), GREEDY, use_tqdm=False)
        assert by_ids.outputs == output.outputs


def test_default_parameters_and_no_prompts(llm: LLM):
    [output] = llm.generate(ids(1, 2, 3), use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= SamplingParams().max_tokens
    assert llm.generate([], use_tqdm=False) == []


def test_one_bad_prompt_leaves_the_others_unharmed(llm: LLM, caplog: pytest.LogCaptureFixture):
    bad = ["", ids(1, 10**6), ids(*range(MAX_LEN)), "lone \ud800 surrogate", 7]
    good = [ids(4, 5, 6), TEXTS[0]]
    prompts = [good[0], *bad, good[1]]
    with caplog.at_level(logging.WARNING, "eejax"):
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert outputs[0].outputs == llm.generate(good[0], GREEDY, use_tqdm=False)[0].outputs
    assert outputs[-1].outputs == llm.generate(good[1], GREEDY, use_tqdm=False)[0].outputs
    assert outputs[0].error is None and outputs[-1].error is None
    for prompt, output in zip(bad, outputs[1:-1], strict=True):
        assert isinstance(output.error, EejaxError)
        assert (output.outputs, output.finished) == ((), True)
        assert output.prompt == (prompt if isinstance(prompt, str) else None)
    says(outputs[2].error, 10**6)
    assert len(caplog.records) == len(bad)


def test_several_answers_to_one_prompt(llm: LLM):
    params = SamplingParams(n=3, temperature=1.5, max_tokens=8, seed=4, ignore_eos=True)
    [output] = llm.generate(ids(5, 6, 7), params, use_tqdm=False)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len({answer.token_ids for answer in output.outputs}) == 3
    [again] = llm.generate(ids(5, 6, 7), params, use_tqdm=False)
    assert again.outputs == output.outputs
    [one] = llm.generate(
        ids(5, 6, 7), SamplingParams(temperature=1.5, max_tokens=8, seed=4, ignore_eos=True), use_tqdm=False
    )
    assert one.outputs == output.outputs[:1]


def test_a_seed_decides_alone_and_in_a_batch(llm: LLM):
    def seeded(seed: int) -> SamplingParams:
        early_exit = EarlyExitParams(0.6, "random")
        return SamplingParams(temperature=1.5, max_tokens=8, seed=seed, ignore_eos=True, early_exit=early_exit)

    prompt = ids(11, 12, 13, 14)
    [alone] = llm.generate(prompt, seeded(1), use_tqdm=False)
    company = llm.generate(
        [TEXTS[1], prompt, prompt, prompt], [GREEDY, seeded(2), seeded(1), seeded(3)], use_tqdm=False
    )
    assert company[2].outputs == alone.outputs
    assert len({output.outputs[0].token_ids for output in company[1:]}) == 3
    assert len(set(alone.outputs[0].exit_layers)) > 1


def test_requests_without_a_seed_differ(llm: LLM):
    params = SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True)
    outputs = llm.generate([ids(1, 2)] * 3, params, use_tqdm=False)
    assert len({output.outputs[0].token_ids for output in outputs}) == 3


# ------------------------------------------------------------------------------------------------------ where it ends


def test_a_stop_string_may_lie_across_tokens(llm: LLM):
    """And the answer ends with the token that completes it; the text, before it."""
    for prompt in (ids(i, i + 1) for i in range(40)):
        [plain] = llm.generate(prompt, GREEDY, use_tqdm=False)
        tokens, text = plain.outputs[0].token_ids, plain.outputs[0].text
        shown = [llm.tokenizer.decode(tokens[:n]) for n in range(len(tokens) + 1)]
        whole = [n for n in range(2, 9) if all("\ufffd" not in s for s in shown[n - 1 : n + 2])]
        for n in whole:
            # The last character before token n, and the first of token n: neither token holds both.
            stop = text[len(shown[n]) - 1 : len(shown[n]) + 1]
            grows = len(shown[n - 1]) < len(shown[n]) < len(shown[n + 1])
            if grows and len(stop) == 2 and stop not in shown[n]:
                break
        else:
            continue
        break
    else:
        pytest.fail("no answer has a place for such a stop string")
    [found] = llm.generate(prompt, greedy(stop=["never there", stop]), use_tqdm=False)
    assert found.outputs[0].text == text[: text.index(stop)]
    assert found.outputs[0].finish_reason == "stop"
    assert found.outputs[0].token_ids == tokens[: n + 1]
    assert len(found.outputs[0].exit_layers) == n + 1
    deltas = list(llm.stream(prompt, greedy(stop=stop)))
    assert "".join(delta.text for delta in deltas) == found.outputs[0].text
    assert deltas[-1].finish_reason == "stop"


def test_stop_tokens_and_the_end_token(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    prompt = ids(20, 21, 22)
    [plain] = llm.generate(prompt, GREEDY, use_tqdm=False)
    tokens = plain.outputs[0].token_ids
    at = next(i for i in range(2, 9) if tokens[i] not in tokens[:i])
    [stopped] = llm.generate(prompt, greedy(stop_token_ids=[tokens[at]], logprobs=1), use_tqdm=False)
    assert (stopped.outputs[0].token_ids, stopped.outputs[0].finish_reason) == (tokens[: at + 1], "stop")
    assert len(stopped.outputs[0].logprobs) == len(stopped.outputs[0].exit_layers) == at + 1
    # One of several, as Llama 3 has them; the other does not come.
    monkeypatch.setattr(llm.engine, "eos_ids", frozenset({tokens[at], max(tokens) + 1}))
    [ended] = llm.generate(prompt, greedy(ignore_eos=False), use_tqdm=False)
    assert (ended.outputs[0].token_ids, ended.outputs[0].finish_reason) == (tokens[: at + 1], "stop")
    [ignored] = llm.generate(prompt, greedy(ignore_eos=True), use_tqdm=False)
    assert (ignored.outputs[0].token_ids, ignored.outputs[0].finish_reason) == (tokens, "length")


@pytest.mark.parametrize("length", [1, 9, MAX_LEN - 1])
@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_answers_go_as_far_as_the_model(llm: LLM, max_tokens: int | None, length: int):
    [output] = llm.generate(ids(*range(length)), greedy(max_tokens=max_tokens), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == MAX_LEN - length
    assert output.outputs[0].finish_reason == "length"


def test_logprobs(llm: LLM):
    plain, one, five = (greedy(logprobs=n) for n in (None, 0, 5))
    outputs = [llm.generate(ids(30, 31), params, use_tqdm=False)[0].outputs[0] for params in (plain, one, five)]
    assert len({output.token_ids for output in outputs}) == 1
    tokens = outputs[0].token_ids
    assert outputs[0].logprobs is None
    expected = reference(
        llm.config.model, jax.device_get(llm.engine.runner.params), [30, 31], max_tokens=len(tokens)
    ).logprobs
    for answer, count in ((outputs[1], 1), (outputs[2], 5)):
        for at, (token, found) in enumerate(zip(tokens, answer.logprobs, strict=True)):
            assert len(found) == count
            assert (found[token].rank, found[token].logprob) == (1, pytest.approx(expected[at], abs=1e-3))
            assert [one.rank for one in found.values()] == list(range(1, count + 1))
            values = [one.logprob for one in found.values()]
            assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) <= 1 + 1e-5


# ---------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize(
    "params", [GREEDY, greedy(max_tokens=None, early_exit=EarlyExitParams(0.3)), greedy(max_tokens=1)]
)
def test_deltas_make_up_the_answer(llm: LLM, params: SamplingParams):
    deltas = list(llm.stream(TEXTS[0], params))
    [expected] = llm.generate(TEXTS[0], params, use_tqdm=False)[0].outputs
    assert "".join(delta.text for delta in deltas) == expected.text
    assert tuple(t for delta in deltas for t in delta.token_ids) == expected.token_ids
    assert tuple(e for delta in deltas for e in delta.exit_layers) == expected.exit_layers
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert params.max_tokens == 1 or len(deltas) > 1


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_a_stream_closed_early_leaves_nothing(llm: LLM, pieces: int):
    stream = llm.stream(TEXTS[0], greedy(max_tokens=None))
    for _ in itertools.islice(stream, pieces):
        assert llm.stats().pages_in_use > 0
    stream.close()
    assert not llm.engine.has_unfinished
    assert llm.stats().pages_in_use == 0


def limit_idle_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for what never comes fails, instead of lasting for ever."""
    step = llm.engine.step

    def checked(*args):
        assert llm.engine.has_unfinished, "waits although there is nothing to do"
        return step(*args)

    monkeypatch.setattr(llm.engine, "step", checked)


def test_two_streams_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    limit_idle_steps(llm, monkeypatch)
    expected = [llm.generate(text, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for text in TEXTS[:2]]
    found: list[list[int]] = [[], []]
    streams = [llm.stream(text, GREEDY) for text in TEXTS[:2]]
    for pair in itertools.zip_longest(*streams):
        for tokens, delta in zip(found, pair, strict=True):
            tokens.extend(delta.token_ids if delta else ())
    assert [tuple(tokens) for tokens in found] == expected


def test_generating_within_a_stream(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    limit_idle_steps(llm, monkeypatch)
    [expected] = llm.generate(TEXTS[0], GREEDY, use_tqdm=False)[0].outputs
    stream = llm.stream(TEXTS[0], GREEDY)
    tokens = list(next(stream).token_ids)
    [other] = llm.generate(TEXTS[1], greedy(max_tokens=25), use_tqdm=False)
    assert len(other.outputs[0].token_ids) == 25
    for delta in stream:
        tokens += delta.token_ids
    assert tuple(tokens) == expected.token_ids


# -------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", ["empty"]),
        (ids(), ["empty"]),
        (ids(*range(MAX_LEN)), [MAX_LEN, MAX_LEN - 1, "max_model_len"]),
        (ids(*[1] * 5000), [5000, MAX_LEN - 1]),
        (ids(3, -1), [-1, "0.."]),
        (ids(3, 310), [310, "0..309"]),
        (ids(3, 2**70), [2**70, "0..309"]),
        ({"prompt_token_ids": [1, True]}, [True, "integers"]),
        ({"prompt_token_ids": [1, 2.0]}, [2.0, "integers"]),
        ({"prompt_token_ids": [1, "2"]}, ["'2'", "integers"]),
        ({"prompt_token_ids": "123"}, ["123", "integers"]),
        ({"prompt_token_ids": None}, [None, "integers"]),
        ({"prompt": "a"}, ["prompt_token_ids", "'a'"]),
        ({"prompt_token_ids": [1], "prompt": "a"}, ["prompt_token_ids", "'a'"]),
        ({}, ["prompt_token_ids", "{}"]),
    ],
)
def test_prompts_that_cannot_be_served(llm: LLM, no_device_work: None, prompt, parts):
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(prompt, GREEDY, use_tqdm=False)
    says(caught.value, *parts)
    with pytest.raises(InvalidRequestError):
        llm.stream(prompt, GREEDY)
    [output] = llm.generate([prompt], GREEDY, use_tqdm=False)
    says(output.error, *parts)


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        (greedy(stop_token_ids=[5, 310]), [310, "0..309"]),
        (greedy(early_exit=EarlyExitParams(exit_layers=[1, 3])), ["[3]", "[1, 2]"]),
        (greedy(early_exit=EarlyExitParams((0.5, 0.6, 0.7))), ["3 thresholds", "0.7", "2 exits", "[1, 2]"]),
        (greedy(early_exit=EarlyExitParams((0.5, 0.6), exit_layers=[2])), ["2 thresholds", "1 exits"]),
        (greedy(early_exit=EarlyExitParams(DecayingThreshold((0.5,)))), ["1 thresholds", "2 exits"]),
        (greedy(early_exit=EarlyExitParams(min_layers=4)), [4, 3]),
        ({"temperature": 0.0}, ["SamplingParams"]),
        ([None], ["SamplingParams", None]),
        ([GREEDY] * 2, ["2 sampling parameters", "1 prompts"]),
        ([], ["0 sampling parameters", "1 prompts"]),
    ],
)
def test_parameters_that_do_not_fit(llm: LLM, no_device_work: None, params, parts):
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(ids(1, 2), params, use_tqdm=False)
    says(caught.value, *parts)


@pytest.mark.parametrize("params", [0.5, "greedy", {"temperature": 0.0}])
def test_parameters_of_another_kind(llm: LLM, no_device_work: None, params):
    for call in (llm.stream, llm.generate):
        with pytest.raises(InvalidRequestError) as caught:
            call(ids(1, 2), params)
        says(caught.value, "SamplingParams")


@pytest.mark.parametrize("prompts", [7, None])
def test_prompts_of_another_kind(llm: LLM, no_device_work: None, prompts):
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(prompts, GREEDY, use_tqdm=False)
    says(caught.value, prompts, "prompt_token_ids")


def test_parameters_that_fit_some_prompts_only(llm: LLM):
    bad = greedy(early_exit=EarlyExitParams(exit_layers=[3]))
    outputs = llm.generate([ids(1, 2), ids(1, 2)], [bad, GREEDY], use_tqdm=False)
    says(outputs[0].error, "[3]", "[1, 2]")
    assert len(outputs[1].outputs[0].token_ids) == 10


def test_stream_answers_once(llm: LLM, no_device_work: None):
    with pytest.raises(InvalidRequestError, match="n=2"):
        llm.stream(ids(1, 2), greedy(n=2))


@pytest.mark.parametrize(
    ("make", "options", "parts"),
    [
        (SamplingParams, {"temperature": math.nan}, ["temperature", "nan", "[0, 1000]"]),
        (SamplingParams, {"top_p": 1.5}, ["top_p", 1.5, "(0, 1]"]),
        (SamplingParams, {"tempature": 1.0}, ["tempature", "allowed", "temperature"]),
        (SamplingParams, {"stop_token_ids": [True]}, ["stop_token_ids", "True"]),
        (EarlyExitParams, {"treshold": 0.5}, ["treshold", "allowed", "threshold"]),
        (EarlyExitParams, {"threshold": math.nan}, ["threshold", "nan"]),
        (EarlyExitParams, {"measure": "entropy"}, ["measure", "entropy", "softmax, margin"]),
    ],
)
def test_values_that_are_refused_at_once(make, options, parts):
    with pytest.raises(ConfigError) as caught:
        make(**options)
    says(caught.value, *parts)


OPTIONS = [
    ({"page_sise": 8}, ["page_sise", "page_size"]),
    ({"dtype": "float64"}, ["dtype", "float64", "bfloat16"]),
    ({"dtype": 16}, ["dtype", 16, "bfloat16"]),
    ({"page_size": 0}, ["page_size", 0]),
    ({"compaction": "on"}, ["compaction", "on", "auto, always, never"]),
    ({"fill": "late"}, ["fill", "late", "auto, eager, deferred"]),
    ({"rebatching": True}, ["rebatching", "True", "auto, always, never"]),
    ({"num_pages": 0}, ["num_pages", 0]),
    ({"num_pages": 2.5}, ["num_pages", 2.5]),
    ({"max_num_seqs": 0}, ["max_num_seqs", 0]),
    ({"max_model_len": 0}, ["max_model_len", 0]),
    ({"max_model_len": 65}, ["max_model_len", 65, 64]),
    ({"seed": -1}, ["seed", -1]),
    ({"exit_layers": [1, 3]}, ["[3]", "1 to 2"]),
    ({"exit_layers": [0]}, ["layers", 0]),
    ({"exit_layers": [1.5]}, ["layers", 1.5]),
    ({"exit_layers": 2}, ["exit_layers", 2]),
    ({"exit_layers": ["1", 2]}, ["layers", "'1'"]),
]


@pytest.mark.parametrize(("options", "parts"), OPTIONS)
def test_options_that_are_not_allowed(checkpoint: Path, llm: LLM, options, parts):
    with pytest.raises(ConfigError) as caught:
        LLM(checkpoint, **options)
    says(caught.value, *parts)
    with pytest.raises(ConfigError) as caught:
        LLM.from_params(llm.config.model, llm.engine.runner.params, **options)
    says(caught.value, *parts)


def test_help_describes_every_option():
    assert LLM.__doc__ is not None
    assert all(f"        {field.name} (" in LLM.__doc__ for field in fields(EngineOptions))


def test_a_cache_too_small_for_a_request(llm: LLM):
    """One page of 8: a prompt of 5 leaves room for 4 tokens, the last of which is never stored."""
    small = LLM.from_params(llm.config.model, llm.engine.runner.params, num_pages=1, page_size=8, max_model_len=MAX_LEN)
    for params in (greedy(max_tokens=5), greedy(max_tokens=None)):
        with pytest.raises(CapacityError) as caught:
            small.generate(ids(1, 2, 3, 4, 5), params, use_tqdm=False)
        says(caught.value, "5 prompt tokens", "pages of 8 tokens", "has 1")
    assert small.stats().compilations == small.stats().tokens == 0
    small.engine.add_request(ids(1, 2, 3, 4, 5), greedy(max_tokens=4))


def test_text_needs_a_tokenizer(llm: LLM):
    mute = LLM.from_params(llm.config.model, llm.engine.runner.params, max_model_len=MAX_LEN, page_size=8, num_pages=9)
    for prompt, params in (("text", GREEDY), (ids(1), greedy(stop="a"))):
        with pytest.raises(InvalidRequestError, match="tokenizer"):
            mute.generate(prompt, params, use_tqdm=False)


def test_an_interruption_frees_everything(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C in the middle of a device call, with prompts running and waiting."""
    calls = itertools.count()
    run = llm.engine.runner.run

    def interrupted(batch, wants_hidden=False):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return run(batch)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([ids(1, 2, 3)] * 5, greedy(max_tokens=25), use_tqdm=False)
    assert not llm.engine.has_unfinished
    stats = llm.stats()
    assert (stats.pages_in_use, stats.requests_running, stats.requests_waiting) == (0, 0, 0)
    [output] = llm.generate(ids(1, 2, 3), GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 10


def test_abort(llm: LLM):
    running = llm.engine.add_request(ids(1, 2, 3), greedy(max_tokens=25))
    waiting = llm.engine.add_request(ids(1, 2, 3), GREEDY)
    llm.engine.abort(waiting)
    llm.engine.step()
    llm.engine.step()
    output = llm.engine.abort(running)
    assert output.finished and output.outputs[0].finish_reason == "abort"
    expected = llm.generate(ids(1, 2, 3), greedy(max_tokens=25), use_tqdm=False)[0].outputs[0].token_ids
    count = len(output.outputs[0].token_ids)
    assert 0 < count < 25 and output.outputs[0].token_ids == expected[:count]
    with pytest.raises(InvalidRequestError, match=running):
        llm.engine.abort(running)


# ------------------------------------------------------------------------------------------------------------- chat


TALK = [{"role": "user", "content": "  Where is the harbour?"}]
DATED = {"date_string": "1 May 2031"}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model with a tokenizer in the manner of Llama 3: three end tokens, and a template that spells BOS."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    config = ModelConfig(
        vocab_size=690,  # more than the tokenizer has
        hidden_size=16,
        intermediate_size=24,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        max_position=1024,
    )
    save_checkpoint(folder, config, random_params(config, seed=5))
    copy_tokenizer(FOLDERS / "llama3", folder)
    return LLM(folder, max_num_seqs=2, page_size=64, num_pages=24)


def test_a_conversation_is_sent_as_the_template_writes_it(chatty: LLM):
    tokenizer = chatty.tokenizer
    [output] = chatty.chat(TALK, greedy(max_tokens=4), chat_template_kwargs=DATED)  # with the progress bar
    text = tokenizer.apply_chat_template(TALK, **DATED)
    assert text.startswith("<|begin_of_text|>") and text.endswith("assistant<|end_header_id|>\n\n")
    assert output.prompt == text
    assert output.prompt_token_ids == tuple(tokenizer.encode(text, add_bos=False))
    assert output.prompt_token_ids.count(tokenizer.bos_id) == 1
    [by_ids] = chatty.generate(ids(*output.prompt_token_ids), greedy(max_tokens=4), use_tqdm=False)
    assert (by_ids.outputs, by_ids.prompt) == (output.outputs, None)
    [by_text] = chatty.generate(text, greedy(max_tokens=4), use_tqdm=False)  # which spells BOS: no second one
    assert (by_text.outputs, by_text.prompt_token_ids) == (output.outputs, output.prompt_token_ids)
    [plain] = chatty.generate("harbour", greedy(max_tokens=1), use_tqdm=False)
    assert plain.prompt_token_ids == tuple(tokenizer.encode("harbour"))
    assert plain.prompt_token_ids[0] == tokenizer.bos_id


def test_the_template_is_told_what_the_caller_says(chatty: LLM):
    def prompt(**options) -> str:
        return chatty.chat(TALK, greedy(max_tokens=1), use_tqdm=False, **options)[0].prompt

    assert "Today: 1 May 2031" in prompt(chat_template_kwargs=DATED)
    assert '"name": "clock"' in prompt(chat_template_kwargs={"tools": [{"name": "clock"}]})
    assert prompt(add_generation_prompt=False).endswith("harbour?<|eot_id|>")


def test_conversations_in_a_list_do_not_harm_each_other(chatty: LLM, caplog: pytest.LogCaptureFixture):
    endless = [{"role": "user", "content": "words " * 2000}]
    calls = [{"role": "assistant", "content": "", "tool_calls": []}]  # the template wants one call at a time
    talks = [TALK, calls, [], "text", endless, [{"role": "user", "content": "lone \ud800"}], TALK * 2]
    params = [greedy(max_tokens=n) for n in range(2, 9)]
    with caplog.at_level(logging.WARNING, "eejax"):
        outputs = chatty.chat(talks, params, use_tqdm=False, chat_template_kwargs=DATED)
    assert [output.error is None for output in outputs] == [True, False, False, False, False, False, True]
    for talk, one, output in zip(talks, params, outputs, strict=True):
        if output.error is None:
            [alone] = chatty.chat(talk, one, use_tqdm=False, chat_template_kwargs=DATED)
            assert (alone.outputs, alone.prompt) == (output.outputs, output.prompt)
        else:
            assert isinstance(output.error, InvalidRequestError)
            assert (output.outputs, output.finished) == ((), True)
    says(outputs[1].error, "One call at a time!")
    assert [output.prompt is None for output in outputs[1:5]] == [True, True, True, False]
    assert len(caplog.records) == 5
    assert chatty.chat([], use_tqdm=False) == []


@pytest.mark.parametrize(
    ("messages", "options", "said"),
    [
        ([{"role": "assistant", "tool_calls": []}], {}, "One call at a time!"),
        ([{"role": "user"}], {}, "message 0 must be a mapping with role and content"),
        ("text", {}, "messages must be a conversation or a list of them, got 'text'"),
        ({"role": "user", "content": "x"}, {}, "messages must be a conversation"),
        (TALK, {"chat_template_kwargs": {"messages": []}}, r"names other than messages, .* got \['messages'\]"),
        (TALK, {"chat_template_kwargs": {3: 4}}, r"must have names .* got \[3\]"),
        (TALK, {"chat_template_kwargs": {"tools": 3}}, "tools must be a list of mappings"),
        (TALK, {"sampling_params": [GREEDY, GREEDY]}, "2 sampling parameters for 1 prompts"),
    ],
)
def test_a_conversation_that_is_refused(chatty: LLM, messages: list, options: dict, said: str):
    before = chatty.stats()
    with pytest.raises(InvalidRequestError, match=said):
        chatty.chat(messages, use_tqdm=False, **options)
    assert chatty.stats() == before


def test_chat_needs_a_tokenizer_with_a_template(llm: LLM, chatty: LLM):
    for talks in (TALK, [TALK]):
        with pytest.raises(TokenizerError, match="this model has no chat template"):
            llm.chat(talks, use_tqdm=False)
    model, params = random_model("gqa")
    options = {"max_num_seqs": 1, "max_model_len": 16, "page_size": PAGE, "num_pages": 4}
    with pytest.raises(TokenizerError, match="this model has no tokenizer"):
        LLM.from_params(model, params, **options).chat(TALK, use_tqdm=False)
    # The command line sends the same, and a prompt as plain text where there is no template.
    [plain] = llm.generate(["as it is"], greedy(max_tokens=1), use_tqdm=False)
    assert in_chat_template(llm, ["as it is"]) == [{"prompt_token_ids": list(plain.prompt_token_ids)}]
    [output] = chatty.chat([{"role": "user", "content": "Hi"}], greedy(max_tokens=1), use_tqdm=False)
    assert in_chat_template(chatty, ["Hi"]) == [{"prompt_token_ids": list(output.prompt_token_ids)}]


def test_any_end_token_of_the_checkpoint_ends_an_answer(chatty: LLM):
    assert chatty.engine.eos_ids == {677, 680, 681}
    model, params = random_model("gqa")
    options = {"max_num_seqs": 1, "max_model_len": 16, "page_size": PAGE, "num_pages": 4}
    for given, expected in ((None, set()), (3, {3}), ([3, 5], {3, 5})):
        assert LLM.from_params(model, params, eos_id=given, **options).engine.eos_ids == expected


# ------------------------------------------------------------------------------------------------------ other exits


def test_other_exits_for_a_checkpoint_with_shared_heads(llm: LLM, checkpoint: Path, tmp_path: Path):
    """Any block will do: here one where the checkpoint has no exit."""
    folder = tmp_path / "one"
    config = llm.config.model.with_exit_layers((1,))
    save_checkpoint(folder, config, llm.engine.runner.params)
    for name in (MODEL_FILE, CONFIG_FILE):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    other = LLM(folder, exit_layers=[2], max_num_seqs=1, max_model_len=16, page_size=PAGE, num_pages=4)
    assert other.config.model.exits == ExitConfig((2,))
    outputs = [
        one.generate(ids(3, 4, 5), greedy(early_exit=EarlyExitParams((0.0,), exit_layers=[2])), use_tqdm=False)
        for one in (llm, other)
    ]
    assert outputs[0][0].outputs == outputs[1][0].outputs
    assert outputs[1][0].outputs[0].exit_layers == (DEPTH, *[2] * 9)
    with pytest.raises(InvalidRequestError, match=r"\[1\].*\[2\]"):
        other.generate(ids(3, 4), greedy(early_exit=EarlyExitParams(exit_layers=[1])), use_tqdm=False)


def test_a_shared_head_reads_behind_any_block_but_a_probe_does_not():
    model, params = random_model("probes", n_layers=4)
    options = {"max_num_seqs": 1, "max_model_len": 16, "page_size": PAGE, "num_pages": 4}
    one = LLM.from_params(model, params, exit_layers=(2, 3), **options)
    assert one.config.model.exits == ExitConfig((2, 3)) and "exits" not in one.engine.runner.params
    early_exit = EarlyExitParams(0.0, exit_layers=[3])
    [output] = one.generate(ids(3, 4), greedy(max_tokens=5, early_exit=early_exit), use_tqdm=False)
    expected = reference(one.config.model, params, [3, 4], max_tokens=5, early_exit=early_exit)
    assert expected.margins.smallest > 1e-4
    assert (output.outputs[0].token_ids, set(expected.exit_layers[1:])) == (expected.token_ids, {3})
    with pytest.raises(InvalidRequestError, match="classifier"):
        one.generate(ids(3, 4), greedy(early_exit=EarlyExitParams(0.5, "classifier")), use_tqdm=False)


@pytest.mark.parametrize("layers", [(3,), ()])
def test_a_subset_of_trained_exits(layers: tuple[int, ...]):
    """Heads other than `shared` were trained for their place."""
    model, params = random_model("norm_tied")
    assert model.exits.layers == (1, 3)
    options = {"max_num_seqs": 1, "max_model_len": 16, "page_size": PAGE, "num_pages": 4}
    one = LLM.from_params(model, params, exit_layers=layers, **options)
    early_exit = EarlyExitParams(0.0)
    [output] = one.generate(ids(3, 4), greedy(max_tokens=5, early_exit=early_exit), use_tqdm=False)
    expected = reference(one.config.model, {**params}, [3, 4], max_tokens=5, early_exit=early_exit)
    assert expected.margins.smallest > 1e-4
    assert output.outputs[0].token_ids == expected.token_ids
    assert output.outputs[0].exit_layers == (4, *[(*layers, 4)[0]] * 4)
    assert output.outputs[0].text == ""  # there is no tokenizer
    with pytest.raises(ConfigError, match=r"'norm'.*\[2\].*\(1, 3\)"):
        LLM.from_params(model, params, exit_layers=[1, 2], **options)


# ------------------------------------------------------------------------------------------------------------- stats


def test_stats_count_what_was_done(llm: LLM):
    before = llm.stats()
    params = greedy(early_exit=EarlyExitParams(0.0, "random", exit_layers=[2]))
    [output] = llm.generate(ids(1, 2, 3, 4), params, use_tqdm=False)
    after = llm.stats()
    done = {f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(EngineStats)}
    assert done.pop("schedule_seconds") > 0
    steps = len(output.outputs[0].token_ids) - 1  # the first token is the prompt's
    assert done == {
        "tokens": steps + 1,
        "prompt_tokens": 4,
        "steps": steps,
        "blocks_run": 2 * steps,
        "blocks_full_depth": DEPTH * steps,
        "token_blocks": 2 * steps,
        "heads_run": steps,
        "row_steps": steps,
        "row_blocks": 2 * steps,
        "row_heads": steps,
        "fills": (DEPTH - 2) * steps,
        "compilations": 0,
        "preemptions": 0,
        "parkings": 0,
        "requests_running": 0,
        "requests_waiting": 0,
        "pages_in_use": 0,
        "num_pages": 0,
    }
    assert after.num_pages == 12


def test_stats_show_the_present_load(llm: LLM):
    stream = llm.stream(ids(*range(9)), GREEDY)
    next(stream)
    waiting = [llm.engine.add_request(ids(1), GREEDY) for _ in range(2)]
    stats = llm.stats()
    assert (stats.requests_running, stats.requests_waiting) == (1, 2)
    assert stats.pages_in_use >= 2  # nine tokens on pages of eight
    stream.close()
    for request in waiting:
        llm.engine.abort(request)


def test_warm_up_leaves_nothing_to_compile(llm: LLM):
    llm.warm_up()
    compilations = llm.stats().compilations
    llm.generate([ids(1), ids(*range(20)), TEXTS[1]], GREEDY, use_tqdm=False)
    assert llm.stats().compilations == compilations


@pytest.mark.parametrize(("dtype", "found"), [(None, "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_weights_and_cache_have_the_dtype_asked_for(checkpoint: Path, dtype: str | None, found: str):
    one = LLM(checkpoint, dtype=dtype, num_pages=1)
    leaves = {str(leaf.dtype) for leaf in jax.tree.leaves((one.engine.runner.params, one.engine.runner.cache))}
    assert leaves == {found}


def test_the_cache_holds_full_slots_by_default(checkpoint: Path):
    one = LLM(checkpoint, max_num_seqs=3, max_model_len=33, page_size=8)
    assert one.stats().num_pages == 3 * 5
    assert one.config.pages_per_seq == 5
    assert LLM(checkpoint, max_num_seqs=2).config.max_model_len == 64  # the model's own limit
