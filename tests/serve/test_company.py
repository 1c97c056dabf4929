"""Requests served together: the tokens, exit layers and finish reason of each are those it has alone.

`test_equivalence.py` states the promise.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax.core import DecayingThreshold, EarlyExitParams, SamplingParams
from eejax.core.errors import InvalidRequestError
from eejax.core.request import RequestOutput
from tests.cases import CLEAR, Case, draw_case, random_model, random_prompt
from tests.reference import replay, softmax
from tests.serve.engines import (
    ENGINES,
    LOGPROB_TOLERANCE,
    MIXED,
    MODES,
    Asked,
    asked,
    assert_aborted,
    assert_answers,
    model_of,
    reported,
    serve,
    shared_engine,
    thresholds,
)


def random_exits(shape: str, rng: random.Random) -> EarlyExitParams | None:
    """None, or any mix of measure, thresholds, subset of exits and least number of blocks."""
    if rng.random() < 0.2:
        return None
    config, _ = random_model(shape)
    layers = config.exits.layers
    cheap = ["similarity", "classifier"] if config.exits.probes else ["similarity"]
    measure = rng.choice(["softmax", "margin", *cheap])
    per_exit = thresholds(shape, measure, rng.choice([0.2, 0.4, 0.7]))
    subset = tuple(sorted(rng.sample(layers, rng.randint(1, len(layers))))) if rng.random() < 0.3 else None
    value = tuple(t for t, layer in zip(per_exit, layers, strict=True) if subset is None or layer in subset)
    forms = [value, value, value[0], DecayingThreshold(value), DecayingThreshold(0.3, 9.0), 0.0, 1.5]
    return EarlyExitParams(rng.choice(forms), measure, subset, rng.choice([0, 0, 0, layers[0] + 1]))


@functools.cache
def random_request(shape: str, seed: int) -> tuple[Asked, Case]:
    """A request, clear-cut on its own, and when it comes and goes; all of it follows from the seed."""
    rng = random.Random(seed)
    config, params = random_model(shape)
    case = draw_case(
        config,
        params,
        early_exit=random_exits(shape, rng),
        prompt_length=rng.choice([1, 3, 5, 8, 15, 16, 17, 24, 32, 33]),
        max_tokens=rng.choice([1, 6, 13, 14, 15, 15]),
        stop_token_ids=rng.choice([(), (), (), (5, 31)]),
        seeds=range(100 * seed, 100 * seed + 100),  # an unclear prompt gives way to the next
    )
    request = asked(
        case,
        n=rng.choice([1, 1, 1, 2]),
        logprobs=rng.choice([None, 0]),
        arrives=rng.choice([0, 0, 0, 1, 2, 3, 5]),
        aborted_after=rng.choice([None, None, None, None, rng.randint(0, 6)]),
    )
    return request, case


# Requests meet in ever new company, but the reference answers each only once.
REQUESTS = 3 * settings.default.max_examples


@pytest.mark.parametrize("name", (*MODES, *MIXED))
@settings(max_examples=2 * settings.default.max_examples)
@given(seeds=st.lists(st.integers(0, REQUESTS - 1), min_size=3, max_size=8))
def test_company_changes_nothing(name, seeds):
    """Requests arrive, end, are preempted and aborted at any time: each gets the answer that it has alone."""
    found = [random_request(ENGINES[name]["shape"], seed) for seed in seeds]
    outputs = serve(shared_engine(name), [request for request, _ in found])
    for output, (request, case) in zip(outputs, found, strict=True):
        assert len(output.outputs) == request.params.n
        if request.aborted_after is None:
            assert_answers([output], [case])
        else:
            assert_aborted(output, case)


def preemptions(outputs: Sequence[RequestOutput]) -> int:
    return sum(output.metrics.preemptions for output in outputs)


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("name", ["tight", "everything_else"])
def test_preempted_requests_resume_exactly(name, share):
    """Four sequences that need 24 pages together share 13. The KV of their early tokens is restored as it was."""
    config, params = model_of(name)
    early_exit = EarlyExitParams(thresholds(ENGINES[name]["shape"], "softmax", share))
    cases = [
        draw_case(
            config,
            params,
            early_exit=early_exit,
            prompt_length=7,
            max_tokens=17,
            # Only tokens that go deep read what early ones left in the upper blocks.
            wanted=lambda _, r: {1, config.n_layers} <= set(r.exit_layers[8:]) and 1 in r.exit_layers[1:5],
            seeds=range(1000 * i, 1000 * i + 999),
        )
        for i in range(4)
    ]
    outputs = serve(shared_engine(name), [asked(case) for case in cases])
    assert preemptions(outputs) >= 2
    assert_answers(outputs, cases)


def test_preempted_siblings_resume_exactly():
    config, params = model_of("tight")
    early_exit = EarlyExitParams(thresholds("everything", "margin", 0.6), "margin")
    case = draw_case(config, params, early_exit=early_exit, prompt_length=9, max_tokens=17)
    (output,) = serve(shared_engine("tight"), [asked(case, n=4)])
    assert len(output.outputs) == 4 and output.metrics.preemptions >= 1
    assert_answers([output], [case])


def test_aborted_requests_leave_others_untouched():
    """Requests are aborted while they wait, while they run, and when they have only just come."""
    config, params = model_of("norm_own")
    early_exit = EarlyExitParams(thresholds("norm_own", "softmax", 0.5))
    cases = [
        draw_case(config, params, early_exit=early_exit if i % 2 else None, prompt_length=5 + i, max_tokens=15)
        for i in range(8)
    ]
    # Two slots and chunks of three steps: the first two run while the others wait.
    when = [None, 3, None, 6, 0, None, 2, None]
    outputs = serve(shared_engine("norm_own"), [asked(c, aborted_after=a) for c, a in zip(cases, when, strict=True)])
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
    requests = drawn_requests("everything", 6)
    tight = shared_engine("tight")
    alone = [answers(serve(tight, [request]))[0] for request in requests]
    together = serve(tight, requests)
    assert preemptions(together) >= 2
    assert answers(together) == alone
    apart = [replace(request, arrives=2 * i) for i, request in enumerate(reversed(requests))]
    assert answers(serve(tight, apart)) == alone[::-1]
    assert answers(serve(shared_engine("everything"), requests)) == alone  # other pages, chunks and slots


def test_seeds_matter():
    (request,) = drawn_requests("deep", 1)
    found = {
        answers(serve(shared_engine("deep"), [replace(request, params=replace(request.params, seed=seed))]))[0]
        for seed in (1, 2, 3, 1)
    }
    assert len(found) == 3
    (output,) = serve(shared_engine("deep"), [replace(request, params=replace(request.params, n=3))])
    assert len(set(answers([output]))) == 3, "sampled siblings differ"


@pytest.mark.parametrize("name", ["deep", "tight", "everything_else"])
def test_drawn_answers_have_the_reference_s_probabilities(name):
    """The reference follows the answer token by token and exit by exit: each had the probability that was reported."""
    config, params = model_of(name)
    requests = drawn_requests(ENGINES[name]["shape"], 8)
    outputs = serve(shared_engine(name), requests)
    left_at = set()
    for request, output in zip(requests, outputs, strict=True):
        (answer,) = output.outputs
        logits = replay(config, params, request.prompt, answer.token_ids, answer.exit_layers)
        expected = np.log(softmax(logits))[np.arange(len(logits)), list(answer.token_ids)]
        np.testing.assert_allclose(reported(answer), expected, atol=LOGPROB_TOLERANCE)
        if request.params.temperature == 0:
            clear = np.diff(np.sort(logits)[:, -2:])[:, 0] > CLEAR
            assert np.array_equal(np.argmax(logits, axis=1)[clear], np.array(answer.token_ids)[clear])
        left_at |= set(answer.exit_layers[1:])
    assert left_at == set(config.exit_points)
