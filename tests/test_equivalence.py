"""eejax, through its public interface, against the reference: tokens, exit layers and finish reasons, one for one.

Float32 equality is promised where the reference's margins (top-1 minus top-2 logit, confidence minus threshold) exceed
1e-4, because matrix products round differently by shape. `draw_case` looks for prompts with such margins, so every
answer below has to match to the token, whatever the batch, the page size, the chunk length or the order of arrival.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax.config import CacheConfig, EngineConfig, SchedulerConfig
from eejax.engine import Engine
from eejax.errors import InvalidRequestError
from eejax.params import DecayingThreshold, EarlyExitParams, SamplingParams
from eejax.request import RequestOutput
from tests.cases import CLEAR, SHAPES, Case, draw_case, exit_settings, random_model, random_prompt, thresholds_letting
from tests.reference import generate, replay, softmax, threshold_at

DEMO = Path(__file__).parent.parent / "checkpoints" / "demo"
MAX_LEN = 48


@dataclass(frozen=True)
class Asked:
    """A request and when it comes and goes, counted in calls of `Engine.step`."""

    prompt: tuple[int, ...]
    params: SamplingParams
    arrives: int = 0
    aborted_after: int | None = None


def asked(case: Case, **kwargs) -> Asked:
    """The greedy request of a case."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=case.max_tokens,
        early_exit=case.early_exit,
        stop_token_ids=case.stop_token_ids,
        n=kwargs.pop("n", 1),
    )
    return Asked(case.prompt, params, **kwargs)


def new_engine(
    shape: str,
    *,
    page_size: int = 8,
    num_pages: int = 64,
    max_num_seqs: int = 4,
    max_chunk_steps: int = 6,
    max_prefill_tokens: int = 64,
    max_model_len: int = MAX_LEN,
    eos_id: int | None = None,
) -> Engine:
    config, params = random_model(shape)
    engine_config = EngineConfig(
        model=config,
        cache=CacheConfig(num_pages, page_size),
        scheduler=SchedulerConfig(max_num_seqs, max_chunk_steps, max_prefill_tokens),
        max_model_len=max_model_len,
        prefill_chunk=16,
    )
    return Engine(engine_config, params, eos_id=eos_id)


@functools.cache
def shared_engine(shape: str, **options) -> Engine:
    """An engine compiles for seconds, so tests and hypothesis' examples share them; `serve` leaves none dirty."""
    return new_engine(shape, **options)


def serve(engine: Engine, requests: Sequence[Asked]) -> list[RequestOutput]:
    """Run requests to their end. Returns the last output of each, in the order given; the engine is left empty."""
    outputs: dict[str, RequestOutput] = {}
    waiting = dict(enumerate(requests))
    try:
        for step in itertools.count():
            assert step < 1000, "the engine makes no progress"
            for i in [i for i, request in waiting.items() if request.arrives <= step]:
                request = waiting.pop(i)
                engine.add_request({"prompt_token_ids": list(request.prompt)}, request.params, request_id=str(i))
            for i, request in enumerate(requests):
                gives_up = request.aborted_after is not None and step == request.arrives + request.aborted_after
                if gives_up and engine.is_unfinished(str(i)):
                    outputs[str(i)] = engine.abort(str(i))
            if not waiting and not engine.has_unfinished:
                break
            for output in engine.step():
                outputs[output.request_id] = output
        assert engine.allocator.num_used == 0, "pages leaked"
        engine.allocator.check_integrity()
    except BaseException:
        shared_engine.cache_clear()  # it may hold half-served requests, which would upset the next test
        raise
    return [outputs[str(i)] for i in range(len(requests))]


def assert_answers(outputs: Sequence[RequestOutput], cases: Sequence[Case]) -> None:
    for number, (output, case) in enumerate(zip(outputs, cases, strict=True)):
        assert output.finished and output.error is None
        assert output.prompt_token_ids == case.prompt
        for index, answer in enumerate(output.outputs):
            about = f"request {number}, answer {index}: {case}"
            assert answer.index == index
            assert answer.token_ids == case.expected.token_ids, about
            assert answer.exit_layers == case.expected.exit_layers, about
            assert answer.finish_reason == case.expected.finish_reason, about


def assert_aborted(output: RequestOutput, case: Case) -> None:
    """What an aborted request got is a beginning of what it would have got."""
    assert output.finished
    for answer in output.outputs:
        assert answer.finish_reason in ("abort", case.expected.finish_reason)
        count = len(answer.token_ids)
        assert answer.token_ids == case.expected.token_ids[:count]
        assert answer.exit_layers == case.expected.exit_layers[:count]


# ------------------------------------------------------------------------------------------- every model, every setting


@pytest.mark.parametrize("measure", ["softmax", "margin"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_equals_the_reference(shape, measure):
    """All forms of thresholds in one batch; prompts shorter and longer than a prefill chunk (16) and a page (8)."""
    config, params = random_model(shape)
    lengths = itertools.cycle((7, 19, 1, 16, 33))
    cases = [
        draw_case(config, params, early_exit=early_exit, want_exits=exits, prompt_length=next(lengths))
        for _, early_exit, exits in exit_settings(config, params, measure)
    ]
    cases += [draw_case(config, params, early_exit=e, prompt_length=9) for e in (None, EarlyExitParams(1.5, measure))]
    assert_answers(serve(shared_engine(shape), [asked(case) for case in cases]), cases)


@pytest.mark.parametrize("measure", ["softmax", "margin"])
def test_no_exits_at_all(measure):
    """A model without exits serves requests that would leave early if they could."""
    config, params = random_model("gqa")
    config = config.with_exit_layers(())
    engine = Engine(
        EngineConfig(config, CacheConfig(32, 8), SchedulerConfig(2, 4), max_model_len=MAX_LEN, prefill_chunk=16), params
    )
    cases = [draw_case(config, params, early_exit=e) for e in (None, EarlyExitParams(0.0, measure))]
    assert all(set(case.expected.exit_layers) == {config.n_layers} for case in cases)
    assert_answers(serve(engine, [asked(case) for case in cases]), cases)


@pytest.mark.parametrize("wrong", ["counts from 1", "counts the prompt", "ignores tau", "mixes 0.8 and 0.2"])
def test_decaying_thresholds_follow_calm(wrong):
    """CALM eq. 5 to the letter: on this case each likely misreading of it gives another answer."""
    config, params = random_model("gqa")
    early_exit = EarlyExitParams(DecayingThreshold(0.45, tau=6.0), "softmax")

    def misread(early_exit, config, layer, t, n):
        if wrong == "counts from 1":
            return threshold_at(early_exit, config, layer, t + 1, n)
        if wrong == "counts the prompt":
            return threshold_at(early_exit, config, layer, t, n + 7)
        if wrong == "ignores tau":
            return threshold_at(EarlyExitParams(DecayingThreshold(0.45, tau=0.0)), config, layer, t, n)
        return 0.8 * 0.45 + 0.2 * np.exp(-6.0 * t / n)

    def tells(prompt, result):
        other = generate(config, params, prompt, max_tokens=14, early_exit=early_exit, threshold_at=misread)
        return other.exit_layers != result.exit_layers

    case = draw_case(config, params, early_exit=early_exit, wanted=tells)
    assert_answers(serve(shared_engine("gqa"), [asked(case)]), [case])


@pytest.mark.parametrize("shape", ["deep", "mlp_own"])
def test_thresholds_above_one_are_full_depth(shape):
    """To the token and to the block: the plain model's answer, however the threshold is written."""
    config, params = random_model(shape)
    first, *others = config.exits.layers
    settings_ = [
        None,
        EarlyExitParams(1.01),
        EarlyExitParams(2.0, "margin"),
        EarlyExitParams((1.5,) * len(config.exits.layers)),
        EarlyExitParams(DecayingThreshold(1.5, tau=50.0)),
        EarlyExitParams(0.0, exit_layers=(first,), min_layers=first + 1),
    ]
    plain = draw_case(config, params, early_exit=None)
    cases = [replace(plain, early_exit=early_exit) for early_exit in settings_]
    assert set(plain.expected.exit_layers) == {config.n_layers}
    assert_answers(serve(shared_engine(shape), [asked(case) for case in cases]), cases)
    # Only the exits above 1 are closed.
    mixed = EarlyExitParams((1.5, *(0.0 for _ in others)))
    case = draw_case(config, params, early_exit=mixed)
    assert set(case.expected.exit_layers[1:]) == {others[0]}
    assert_answers(serve(shared_engine(shape), [asked(case)]), [case])


# ----------------------------------------------------------------------------------------------------- batch invariance

# Few distinct engines, since each compiles anew; between them they vary all that must not change an answer.
SETUPS = {
    "roomy": {"shape": "deep", "max_num_seqs": 4, "max_chunk_steps": 16, "page_size": 16, "num_pages": 32},
    "step by step": {"shape": "mlp_own", "max_num_seqs": 3, "max_chunk_steps": 1, "page_size": 5, "num_pages": 64},
    # The longest sequence needs 12 pages of 4: two long ones cannot stay together.
    "tight": {"shape": "everything", "max_num_seqs": 4, "max_chunk_steps": 5, "page_size": 4, "num_pages": 13},
    "short of prefill": {"shape": "norm_own", "max_num_seqs": 2, "max_chunk_steps": 3, "max_prefill_tokens": 16},
}


@functools.cache
def thresholds(shape: str, measure: str, share: float) -> tuple[float, ...]:
    return thresholds_letting(*random_model(shape), measure, share)


@st.composite
def early_exits(draw: st.DrawFn, shape: str) -> EarlyExitParams | None:
    """None, or any mix of measure, thresholds, subset of exits and least number of blocks."""
    if draw(st.integers(0, 3)) == 0:
        return None
    config, _ = random_model(shape)
    layers = config.exits.layers
    measure = draw(st.sampled_from(["softmax", "margin"]))
    subset = draw(st.none() | st.sets(st.sampled_from(layers), min_size=1).map(lambda s: tuple(sorted(s))))
    share = draw(st.sampled_from([0.2, 0.5, 0.8]))
    per_exit = thresholds(shape, measure, share)
    value = tuple(t for t, layer in zip(per_exit, layers, strict=True) if subset is None or layer in subset)
    threshold = draw(
        st.sampled_from([value, value[0], 0.0, 1.5, DecayingThreshold(value), DecayingThreshold(0.3, 9.0)])
    )
    return EarlyExitParams(threshold, measure, subset, draw(st.sampled_from([0, 0, 0, layers[0] + 1])))


@st.composite
def traffic(draw: st.DrawFn, shape: str) -> list[tuple[Asked, Case]]:
    """Up to six requests, each clear-cut on its own, and when they come and go."""
    config, params = random_model(shape)
    found = []
    for _ in range(draw(st.integers(1, 6))):
        seed = draw(st.integers(0, 5000))
        case = draw_case(
            config,
            params,
            early_exit=draw(early_exits(shape)),
            prompt_length=draw(st.sampled_from([1, 3, 5, 15, 16, 17, 32, 33])),
            max_tokens=draw(st.integers(1, 15)),
            stop_token_ids=draw(st.sampled_from([(), (), (5, 11, 20, 31)])),
            seeds=range(seed, seed + 100),  # an unclear prompt gives way to a neighbour
        )
        request = asked(
            case,
            n=draw(st.sampled_from([1, 1, 1, 2])),
            arrives=draw(st.integers(0, 6)),
            aborted_after=draw(st.none() | st.none() | st.integers(0, 6)),
        )
        found.append((request, case))
    return found


@pytest.mark.parametrize("setup", SETUPS)
@settings(max_examples=15)
@given(data=st.data())
def test_company_changes_nothing(setup, data):
    """Whoever else is served, whenever they come, go, are preempted or aborted: everybody's answer is their own."""
    found = data.draw(traffic(SETUPS[setup]["shape"]))
    outputs = serve(shared_engine(**SETUPS[setup]), [request for request, _ in found])
    for output, (request, case) in zip(outputs, found, strict=True):
        assert len(output.outputs) == request.params.n
        if request.aborted_after is None:
            assert_answers([output], [case])
        else:
            assert_aborted(output, case)


def preemptions(outputs: Sequence[RequestOutput]) -> int:
    return sum(output.metrics.preemptions for output in outputs)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_preempted_requests_resume_exactly(share):
    """Four sequences that need 24 pages together share 13. The KV of their early tokens is restored as it was."""
    setup = SETUPS["tight"]
    config, params = random_model(setup["shape"])
    early_exit = EarlyExitParams(thresholds(setup["shape"], "softmax", share))
    cases = [
        draw_case(
            config, params, early_exit=early_exit, prompt_length=7, max_tokens=17, seeds=range(100 * i, 100 * i + 99)
        )
        for i in range(4)
    ]
    assert all(np.mean(case.expected.exit_layers[1:]) < config.n_layers for case in cases)
    outputs = serve(shared_engine(**setup), [asked(case) for case in cases])
    assert preemptions(outputs) >= 2
    assert_answers(outputs, cases)


def test_preempted_siblings_resume_exactly():
    setup = SETUPS["tight"]
    config, params = random_model(setup["shape"])
    early_exit = EarlyExitParams(thresholds(setup["shape"], "margin", 0.6), "margin")
    case = draw_case(config, params, early_exit=early_exit, prompt_length=9, max_tokens=17)
    (output,) = serve(shared_engine(**setup), [asked(case, n=4)])
    assert len(output.outputs) == 4 and output.metrics.preemptions >= 1
    assert_answers([output], [case])


def test_aborted_requests_leave_others_untouched():
    """Requests are aborted while they wait, while they run, and when they have only just come."""
    config, params = random_model("deep")
    early_exit = EarlyExitParams(thresholds("deep", "softmax", 0.5))
    cases = [
        draw_case(config, params, early_exit=early_exit if i % 2 else None, prompt_length=5 + i, max_tokens=15)
        for i in range(8)
    ]
    # Four slots and chunks of three steps: 0..3 run while 4..7 wait.
    engine = shared_engine("deep", max_num_seqs=4, max_chunk_steps=3)
    when = [None, 3, None, 6, 0, None, 2, None]
    outputs = serve(engine, [asked(c, aborted_after=a) for c, a in zip(cases, when, strict=True)])
    for output, case, after in zip(outputs, cases, when, strict=True):
        if after is None:
            assert_answers([output], [case])
        else:
            assert_aborted(output, case)
            assert output.outputs[0].finish_reason == "abort"
            assert len(output.outputs[0].token_ids) < case.max_tokens


def test_abort_of_what_is_not_there_is_refused():
    config, params = random_model("deep")
    case = draw_case(config, params, early_exit=None)
    engine = shared_engine("deep")
    with pytest.raises(InvalidRequestError, match="'nobody'"):
        engine.abort("nobody")
    assert_answers(serve(engine, [asked(case)]), [case])
    with pytest.raises(InvalidRequestError, match="'0'"):
        engine.abort("0")  # finished by now


# ---------------------------------------------------------------------------------------------------- stops and budgets


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7, 8])
def test_stop_token_anywhere_in_a_chunk(at):
    """A stop token ends the answer at every place of a chunk of six steps, and behind the prompt."""
    config, params = random_model("gqa")
    early_exit = EarlyExitParams(thresholds("gqa", "softmax", 0.5))
    free = draw_case(
        config, params, early_exit=early_exit, wanted=lambda _, r: r.token_ids[at - 1] not in r.token_ids[: at - 1]
    )
    unused = set(range(config.vocab_size)) - set(free.expected.token_ids)
    stop = (min(unused), free.expected.token_ids[at - 1])
    expected = generate(config, params, free.prompt, max_tokens=14, early_exit=early_exit, stop_token_ids=stop)
    assert len(expected.token_ids) == at and expected.finish_reason == "stop"
    case = replace(free, expected=expected, stop_token_ids=stop)
    mate = draw_case(config, params, early_exit=None, max_tokens=13)
    assert_answers(serve(shared_engine("gqa"), [asked(case), asked(mate)]), [case, mate])


@pytest.mark.parametrize("budget", range(1, 9))
def test_budget_anywhere_in_a_chunk(budget):
    config, params = random_model("gqa")
    early_exit = EarlyExitParams(thresholds("gqa", "margin", 0.5), "margin")
    case = draw_case(config, params, early_exit=early_exit, max_tokens=budget)
    mate = draw_case(config, params, early_exit=early_exit, max_tokens=13)
    assert len(case.expected.token_ids) == budget and case.expected.finish_reason == "length"
    assert_answers(serve(shared_engine("gqa"), [asked(case), asked(mate)]), [case, mate])


def test_many_stop_tokens():
    """However many ids stop an answer, the largest of them does so too, and nothing is delivered behind it."""
    config, params = random_model("gqa")
    early_exit = EarlyExitParams(thresholds("gqa", "softmax", 0.5))
    free = draw_case(
        config,
        params,
        early_exit=early_exit,
        wanted=lambda _, r: r.token_ids[3] > 40 and r.token_ids.index(r.token_ids[3]) == 3,
    )
    unused = sorted(set(range(40)) - set(free.expected.token_ids))
    stop = (*unused[:20], free.expected.token_ids[3])
    expected = generate(config, params, free.prompt, max_tokens=14, early_exit=early_exit, stop_token_ids=stop)
    assert len(expected.token_ids) == 4 and len(stop) == 21
    case = replace(free, expected=expected, stop_token_ids=stop)
    assert_answers(serve(shared_engine("gqa"), [asked(case, n=2), asked(free)]), [case, free])


def test_stop_token_as_the_last_of_the_budget_is_a_stop():
    config, params = random_model("gqa")
    free = draw_case(config, params, early_exit=None, max_tokens=5, wanted=lambda _, r: len(set(r.token_ids)) == 5)
    expected = replace(free.expected, finish_reason="stop")
    case = replace(free, stop_token_ids=free.expected.token_ids[-1:], expected=expected)
    assert_answers(serve(shared_engine("gqa"), [asked(case)]), [case])


def test_eos_ends_an_answer_unless_ignored():
    config, params = random_model("gqa")
    early_exit = EarlyExitParams(thresholds("gqa", "softmax", 0.5))
    eos = 20
    ending = draw_case(config, params, early_exit=early_exit, eos_id=eos, wanted=lambda _, r: 3 < len(r.token_ids) < 10)
    going_on = replace(
        ending, eos_id=None, expected=generate(config, params, ending.prompt, max_tokens=14, early_exit=early_exit)
    )
    assert ending.expected.finish_reason == "stop" and going_on.expected.finish_reason == "length"
    assert going_on.expected.margins.smallest > CLEAR
    ignoring = asked(going_on)
    ignoring = replace(ignoring, params=replace(ignoring.params, ignore_eos=True))
    outputs = serve(new_engine("gqa", eos_id=eos), [asked(ending), ignoring])
    assert_answers(outputs, [ending, going_on])


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_answers_end_at_the_length_of_the_model(max_tokens):
    """The last token that fits is delivered: prompt and answer together take `max_model_len` tokens."""
    config, params = random_model("gqa")
    case = draw_case(config, params, early_exit=None, prompt_length=40, max_tokens=MAX_LEN - 40)
    request = asked(case)
    request = replace(request, params=replace(request.params, max_tokens=max_tokens))
    assert_answers(serve(shared_engine("gqa"), [request]), [case])


# ------------------------------------------------------------------------------------- what the reference cannot choose


def drawn_requests(shape: str, count: int) -> list[Asked]:
    """Requests whose tokens are sampled or whose exits are drawn at random, each with a seed of its own."""
    config, _ = random_model(shape)
    layers = config.exits.layers
    exit_choices = [
        None,
        EarlyExitParams(thresholds(shape, "softmax", 0.5)),
        EarlyExitParams(tuple(np.linspace(0.8, 0.3, len(layers))), "random"),
        EarlyExitParams(thresholds(shape, "margin", 0.7), "margin", min_layers=layers[0] + 1),
    ]
    found = []
    for i in range(count):
        params = SamplingParams(
            temperature=(0.7, 1.0, 0.0)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            top_k=(0, 12)[i % 2],
            max_tokens=17,
            seed=100 + i,
            logprobs=0,
            early_exit=exit_choices[i % len(exit_choices)],
        )
        found.append(Asked(tuple(random_prompt(config, 4 + i, i)), params))
    return found


def answers(outputs: Sequence[RequestOutput]) -> list[tuple]:
    return [(a.token_ids, a.exit_layers, a.finish_reason) for output in outputs for a in output.outputs]


def test_seeded_requests_do_not_depend_on_company():
    """Sampled tokens and random exits: the same alone, together, arriving apart, and under preemption."""
    setup = SETUPS["tight"]
    requests = drawn_requests(setup["shape"], 6)
    tight = shared_engine(**setup)
    alone = [answers(serve(tight, [request]))[0] for request in requests]
    together = serve(tight, requests)
    assert preemptions(together) >= 2
    assert answers(together) == alone
    apart = [replace(request, arrives=2 * i) for i, request in enumerate(reversed(requests))]
    assert answers(serve(tight, apart)) == alone[::-1]
    roomy = {**setup, "page_size": 16, "num_pages": 32, "max_chunk_steps": 2, "max_num_seqs": 2}
    assert answers(serve(shared_engine(**roomy), requests)) == alone


def test_seeds_matter():
    (request,) = drawn_requests("deep", 1)
    found = {
        answers(serve(shared_engine("deep"), [replace(request, params=replace(request.params, seed=seed))]))[0]
        for seed in (1, 2, 3, 1)
    }
    assert len(found) == 3
    (output,) = serve(shared_engine("deep"), [replace(request, params=replace(request.params, n=3))])
    assert len(set(answers([output]))) == 3, "sampled siblings differ"


@pytest.mark.parametrize("setup", ["roomy", "tight"])
def test_drawn_answers_have_the_reference_s_probabilities(setup):
    """The reference follows the answer token by token and exit by exit: each had the probability that was reported."""
    shape = SETUPS[setup]["shape"]
    config, params = random_model(shape)
    requests = drawn_requests(shape, 8)
    outputs = serve(shared_engine(**SETUPS[setup]), requests)
    left_at = set()
    for request, output in zip(requests, outputs, strict=True):
        (answer,) = output.outputs
        logits = replay(config, params, request.prompt, answer.token_ids, answer.exit_layers)
        expected = np.log(softmax(logits))[np.arange(len(logits)), list(answer.token_ids)]
        found = [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        # Logits of size 3, float32: errors of 1e-5; one wrong K or V anywhere shows in the first digits.
        np.testing.assert_allclose(found, expected, atol=1e-3)
        if request.params.temperature == 0:
            clear = np.diff(np.sort(logits)[:, -2:])[:, 0] > CLEAR
            assert np.array_equal(np.argmax(logits, axis=1)[clear], np.array(answer.token_ids)[clear])
        left_at |= set(answer.exit_layers[1:])
    assert left_at == set(config.exit_points)


# ------------------------------------------------------------------------------------------------------- the demo model


@pytest.mark.skipif(not (DEMO / "config.json").exists(), reason="checkpoints/demo is not there")
def test_demo_equals_the_reference():
    """The weights that ship, read by the package, answering as the reference does."""
    from eejax import LLM
    from eejax.weights import load_checkpoint

    config, params = load_checkpoint(DEMO, np.float32)
    llm = LLM(str(DEMO), max_model_len=128, max_num_seqs=4)
    cases = []
    for early_exit in (
        EarlyExitParams(0.5),
        EarlyExitParams(0.3, "margin"),
        EarlyExitParams(DecayingThreshold(0.4)),
        None,
    ):
        cases.append(draw_case(config, params, early_exit=early_exit, prompt_length=12, max_tokens=24, seeds=range(20)))
    outputs = llm.generate(
        [{"prompt_token_ids": list(case.prompt)} for case in cases],
        [replace(asked(case).params, ignore_eos=True) for case in cases],
        use_tqdm=False,
    )
    assert_answers(outputs, cases)
    assert len(set(itertools.chain(*(case.expected.exit_layers for case in cases)))) > 1
