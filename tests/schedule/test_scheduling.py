"""Length-predicted scheduling through the public interface: same answers, other order, nothing lost."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from bench.paper import PaperScheduler
from eejax import LLM, ConfigError, EarlyExitParams, InvalidRequestError, SamplingParams
from eejax.core import SchedulerConfig
from eejax.core.lengths import LEVELS, LengthEstimate
from eejax.schedule.integrity import check_integrity
from eejax.schedule.length_predictor import LengthPredictor, PerceptionPredictor
from tests.cases import random_model

PAGE, SLOTS, MAX_LEN = 4, 4, 64


def ids(*tokens: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(tokens)}


def make_llm(**options) -> LLM:
    model, params = random_model("norm_tied")
    defaults = {"max_num_seqs": SLOTS, "max_model_len": MAX_LEN, "page_size": PAGE, "num_pages": 40}
    return LLM.from_params(model, params, **(defaults | options))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm()


class Said(LengthPredictor):
    """Says whatever it was told, by the prompt's first token; after prefill, what `later` says."""

    def __init__(self, said: dict[int, tuple[float, ...]], later: tuple[float, ...] | None = None) -> None:
        self.said, self.later, self.needs_hidden = said, later, later is not None
        self.states: list[np.ndarray] = []

    def predict(self, prompt_token_ids, max_tokens):
        return LengthEstimate(self.said.get(prompt_token_ids[0], (5.0,) * len(LEVELS)), max_tokens)

    def refine(self, estimate, hidden, max_tokens):
        self.states.append(hidden)
        return LengthEstimate(self.later or estimate.quantiles, max_tokens)


def exactly(length: float) -> tuple[float, ...]:
    return (length,) * len(LEVELS)


def answer(llm: LLM, requests, order: list[str] | None = None, **each):
    """Run requests to their ends by hand: id -> output; `order` gets the ids as they finish."""
    engine, outputs = llm.engine, {}
    for name, prompt, params in requests:
        options = {key: value[name] for key, value in each.items() if name in value}
        engine.add_request(prompt, params, name, **options)
    while engine.has_unfinished:
        for output in engine.step():
            if output.finished:
                assert output.request_id not in outputs
                outputs[output.request_id] = output
                if order is not None:
                    order.append(output.request_id)
    assert engine.stats().pages_in_use == 0
    check_integrity(engine.allocator, [])
    return outputs


def mixed_requests():
    """Short and long, greedy and sampled, at full depth and with exits."""
    requests = []
    for i in range(10):
        length = (2, 30, 7, 18, 40)[i % 5]
        early = EarlyExitParams(0.5, "random") if i % 2 else None
        params = SamplingParams(temperature=0.7 * (i % 3), max_tokens=length, seed=i, early_exit=early)
        requests.append((f"r{i}", ids(*range(1 + i, 4 + 2 * i)), params))
    return requests


# ------------------------------------------------------------------------------------------------------- same tokens


def test_every_policy_gives_the_same_tokens(llm: LLM):
    def paper(**options):
        return partial(PaperScheduler, paper={"ordered": True, **options})

    def config(**options):
        return SchedulerConfig(max_num_seqs=SLOTS, **options)

    lies = {i: exactly((1.0, 60.0, math.nan, -3.0, math.inf)[i % 5]) for i in range(20)}
    ways = {
        "fcfs": (config(), None, None, None),
        "fcfs, little memory": (config(), None, None, 17),
        "static": (config(policy="static"), None, None, None),
        "length, told lies": (config(policy="length"), None, Said(lies), None),
        "length, little memory": (config(policy="length"), None, Said(lies), 17),
        "length, told more lies after prefill": (config(policy="length"), None, Said({}, exactly(1.0)), 17),
        "length, small window, impatient": (config(policy="length", window=2, max_wait=0.0), None, Said(lies), None),
        "paper": (config(), paper(vbs=True, fcr=True), Said(lies), None),
    }
    answers, preempted, parked = {}, 0, 0
    for name, (config_of, scheduler, predictor, num_pages) in ways.items():
        llm.engine.reschedule(config_of, scheduler=scheduler, predictor=predictor, num_pages=num_pages)
        outputs = answer(llm, mixed_requests())
        answers[name] = {
            key: (one.outputs[0].token_ids, one.outputs[0].exit_layers, one.outputs[0].finish_reason)
            for key, one in outputs.items()
        }
        preempted += llm.stats().preemptions
        parked += llm.stats().parkings
    assert len(answers["fcfs"]) == 10
    assert preempted > 0  # the tight caches were tight
    for name in ways:
        assert answers[name] == answers["fcfs"], name


def test_short_answers_first(llm: LLM):
    lengths = {"long": 40, "short": 3, "middle": 20}
    requests = [
        (name, ids(10 + i), SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
        for i, (name, length) in enumerate(lengths.items())
    ]
    said = {10 + i: exactly(length) for i, length in enumerate(lengths.values())}
    one_slot = {"max_num_seqs": 1}
    order: list[str] = []
    llm.engine.reschedule(SchedulerConfig(policy="length", **one_slot), predictor=Said(said))
    answer(llm, requests, order)
    assert order == ["short", "middle", "long"]
    order.clear()
    llm.engine.reschedule(SchedulerConfig(**one_slot), predictor=Said(said))
    answer(llm, requests, order)
    assert order == ["long", "short", "middle"]


def test_hidden_states_reach_the_predictor(llm: LLM):
    predictor = Said({}, later=exactly(9.0))
    llm.engine.reschedule(SchedulerConfig(max_num_seqs=SLOTS, policy="length"), predictor=predictor)
    [seq] = _sequences(llm, "one", ids(1, 2, 3))
    assert seq.estimate.quantiles == exactly(5.0)
    llm.engine.step()
    assert [state.shape for state in predictor.states] == [(llm.config.model.hidden_size,)]
    assert np.isfinite(predictor.states[0]).all()
    assert seq.estimate.quantiles == exactly(9.0)
    assert llm.engine.abort("one").finished


def test_what_a_predictor_says_is_made_sane(llm: LLM):
    said = {1: exactly(math.nan), 2: exactly(-5.0), 3: exactly(1e30), 4: (50.0, 4.0, 3.0, 2.0, 1.0)}
    llm.engine.reschedule(SchedulerConfig(max_num_seqs=SLOTS, policy="length"), predictor=Said(said))
    estimates = []
    for token in said:
        [seq] = _sequences(llm, str(token), ids(token), max_tokens=20)
        estimates.append(seq.estimate)
        llm.engine.abort(str(token))
    assert estimates[0] == LengthEstimate.unknown(20)
    assert [one.quantiles for one in estimates[1:]] == [exactly(1.0), exactly(20.0), (1.0, 2.0, 3.0, 4.0, 20.0)]


def _sequences(llm: LLM, name: str, prompt, **params):
    llm.engine.add_request(prompt, SamplingParams(temperature=0, **params), name)
    return llm.engine._requests[name].sequences


# ----------------------------------------------------------------------------------------------------- asking the model


class Words:
    """A tokenizer whose text is the token ids."""

    bos_id = None
    cleans_up = False

    def encode(self, text, add_bos=True):
        return [int(word) for word in text.split()]

    def decode(self, ids, skip_special=True):
        return "".join(f" {i}" for i in ids)


class Asking(PerceptionPredictor):
    """Perception with a question of two tokens; understands the answer as `number`."""

    def __init__(self, number: float | None) -> None:
        self.number, self.heard = number, []

    def predict(self, prompt_token_ids, max_tokens):
        return LengthEstimate.unknown(max_tokens)

    def question(self, prompt_token_ids):
        return [*prompt_token_ids, 7, 8]

    def understand(self, text, max_tokens):
        self.heard.append(text)
        return None if self.number is None else LengthEstimate.exactly(self.number, max_tokens)


@pytest.mark.parametrize(("number", "expected"), [(11.0, exactly(11.0)), (None, LengthEstimate.unknown(12).quantiles)])
def test_the_model_is_asked_before_it_answers(number, expected):
    llm = make_llm(tokenizer=Words(), length_predictor=(predictor := Asking(number)), scheduler="length")
    [seq] = _sequences(llm, "one", "3 4 5", max_tokens=12, ignore_eos=True)
    assert llm.stats().requests_waiting == 1  # the question, not yet the request
    outputs = []
    while not predictor.heard:
        outputs += llm.engine.step()
    assert outputs == []  # nobody sees the question
    assert seq.estimate.quantiles == expected
    assert seq.output_token_ids == []
    asked = predictor.heard[0].split()
    assert 1 <= len(asked) <= 8
    while llm.engine.has_unfinished:
        outputs += llm.engine.step()
    plain = make_llm(tokenizer=Words()).generate("3 4 5", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert outputs[-1].outputs[0].token_ids == plain[0].outputs[0].token_ids
    assert llm.stats().tokens == 12  # the question's answer is not counted
    # what was asked is what the model says to the question, greedy
    said = make_llm(tokenizer=Words()).generate("3 4 5 7 8", SamplingParams(temperature=0, max_tokens=8))
    assert said[0].outputs[0].text.split() == asked


def test_a_request_whose_question_is_open_can_be_aborted_and_overdue():
    llm = make_llm(tokenizer=Words(), length_predictor=(predictor := Asking(5.0)), scheduler="length")
    for name, deadline in (("aborted", None), ("late", 1e-9)):
        llm.engine.add_request("3 4 5", SamplingParams(temperature=0), name, deadline=deadline)
    assert llm.engine.abort("aborted").outputs[0].finish_reason == "abort"
    [late] = llm.engine.step()
    assert (late.outputs[0].finish_reason, late.outputs[0].token_ids) == ("deadline", ())
    assert not llm.engine.has_unfinished
    assert not llm.engine.scheduler.has_work
    assert predictor.heard == []


def test_a_question_that_does_not_fit_is_not_asked():
    llm = make_llm(tokenizer=Words(), length_predictor=(predictor := Asking(5.0)), scheduler="length")
    [output] = llm.generate(ids(*range(1, MAX_LEN - 5)), SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 3
    assert predictor.heard == []


# ------------------------------------------------------------------------------------------------ priority and deadline


def test_priority_goes_before_length_and_arrival(llm: LLM):
    for policy in ("fcfs", "length"):
        llm.engine.reschedule(SchedulerConfig(max_num_seqs=1, policy=policy), predictor=Said({1: exactly(2.0)}))
        requests = [(name, ids(i), SamplingParams(temperature=0, max_tokens=3)) for i, name in enumerate("abc", 1)]
        order: list[str] = []
        answer(llm, requests, order, priority={"a": 2, "b": 2, "c": -1})
        assert order[0] == "c", policy
    llm.engine.reschedule(SchedulerConfig(max_num_seqs=SLOTS))
    outputs = llm.generate([ids(1), ids(2)], SamplingParams(max_tokens=2), priority=[1, 0], use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [(1,), (2,)]


def test_deadlines(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    llm.engine.reschedule(SchedulerConfig(max_num_seqs=SLOTS))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    before = llm.stats()
    [past] = llm.generate(ids(1, 2), params, deadline=-1.0, use_tqdm=False)
    assert (past.outputs[0].finish_reason, past.outputs[0].token_ids) == ("deadline", ())
    assert llm.stats().prompt_tokens == before.prompt_tokens  # nothing was run for it
    past, served = llm.generate([ids(1, 2), ids(3, 4)], params, deadline=[0, None], use_tqdm=False)
    assert past.outputs[0].finish_reason == "deadline"
    assert (served.outputs[0].finish_reason, len(served.outputs[0].token_ids)) == ("length", 40)
    # one that passes while the answer is being made leaves what there is
    llm.engine.add_request(ids(3, 4), params, "half", deadline=1000.0)
    llm.engine.step()
    llm.engine.step()
    llm.engine._requests["half"].deadline = 0.0
    [half] = llm.engine.step()
    assert half.finished
    assert half.outputs[0].finish_reason == "deadline"
    assert 0 < len(half.outputs[0].token_ids) < 40
    assert half.outputs[0].token_ids == served.outputs[0].token_ids[: len(half.outputs[0].token_ids)]
    assert llm.stats().pages_in_use == 0


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"priority": 1.5}, "priority must be an integer, got 1.5"),
        ({"priority": True}, "priority must be an integer, got True"),
        ({"deadline": math.nan}, "deadline must be a number of seconds from now, got nan"),
        ({"deadline": "soon"}, "deadline must be a number of seconds from now, got 'soon'"),
        ({"priority": [1, 2]}, "2 priorities for 1 prompts"),
        ({"deadline": []}, "0 deadlines for 1 prompts"),
    ],
)
def test_priorities_and_deadlines_that_make_no_sense(llm: LLM, options, parts):
    with pytest.raises(InvalidRequestError, match=parts):
        llm.generate(ids(1), SamplingParams(max_tokens=2), use_tqdm=False, **options)
    assert not llm.engine.has_unfinished


# ------------------------------------------------------------------------------------------------------- configuration


def test_scheduler_options():
    by_name = make_llm(scheduler="length")
    assert by_name.config.scheduler == SchedulerConfig(max_num_seqs=SLOTS, policy="length")
    config = SchedulerConfig(max_num_seqs=2, policy="length", predictor="constant", quantile=0.9)
    assert make_llm(scheduler=config, max_num_seqs=None).config.scheduler is config
    with pytest.raises(ConfigError, match=r"max_num_seqs is 4, and the scheduler's configuration says 2"):
        make_llm(scheduler=config)


@pytest.mark.parametrize(
    ("scheduler", "parts"),
    [
        ("longest", "policy must be one of fcfs, length, static, got 'longest'"),
        (7, "policy must be one of fcfs, length, static, got 7"),
    ],
)
def test_policies_that_do_not_exist(scheduler, parts):
    with pytest.raises(ConfigError, match=parts):
        make_llm(scheduler=scheduler)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"policy": "sjf"}, "SchedulerConfig.policy must be one of fcfs, length, static, got 'sjf'"),
        ({"predictor": "oracle"}, "SchedulerConfig.predictor must be one of prompt, hidden, perception, constant"),
        ({"window": 0}, "SchedulerConfig.window must be an integer of at least 1, got 0"),
        ({"quantile": 1.0}, "SchedulerConfig.quantile must be a number between 0 and 1, got 1.0"),
        ({"quantile": math.nan}, "SchedulerConfig.quantile must be a number between 0 and 1, got nan"),
        ({"max_wait": -1}, "SchedulerConfig.max_wait must be a number of at least 0, got -1"),
        ({"max_wait": math.inf}, "SchedulerConfig.max_wait must be a number of at least 0, got inf"),
        ({"max_waits": 1}, "SchedulerConfig has no option max_waits; allowed: .*max_wait"),
    ],
)
def test_configurations_that_make_no_sense(options, parts):
    with pytest.raises(ConfigError, match=parts):
        SchedulerConfig(**options)


def test_predictors_that_are_not_there():
    with pytest.raises(ConfigError, match=r"'prompt' needs length heads.*eejax train-length"):
        make_llm(scheduler=SchedulerConfig(max_num_seqs=SLOTS, policy="length", predictor="prompt"))
    with pytest.raises(ConfigError, match=r"'perception' asks the model in words, and it has no tokenizer"):
        make_llm(scheduler=SchedulerConfig(max_num_seqs=SLOTS, policy="length", predictor="perception"))


def test_rescheduling(llm: LLM):
    llm.engine.reschedule(SchedulerConfig(max_num_seqs=SLOTS), num_pages=9)
    assert llm.stats().num_pages == 9
    with pytest.raises(ConfigError, match=r"num_pages must lie in 1..40, got 41"):
        llm.engine.reschedule(SchedulerConfig(max_num_seqs=SLOTS), num_pages=41)
    with pytest.raises(ConfigError, match="compiled for max_chunk_steps 16, got 8"):
        llm.engine.reschedule(SchedulerConfig(max_num_seqs=SLOTS, max_chunk_steps=8))
    llm.engine.add_request(ids(1), SamplingParams(max_tokens=2), "open")
    with pytest.raises(RuntimeError, match="1 requests are unfinished"):
        llm.engine.reschedule(SchedulerConfig(max_num_seqs=SLOTS))
    llm.engine.abort("open")
    llm.engine.reschedule(SchedulerConfig(max_num_seqs=SLOTS))
    assert llm.stats().num_pages == 40
