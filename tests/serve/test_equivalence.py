"""eejax, through its public interface, against the reference: tokens, exit layers and finish reasons, one for one.

Float32 equality is promised where the reference's margins (top-1 minus top-2 logit, confidence minus threshold) exceed
1e-4, because matrix products round differently by shape. `draw_case` looks for prompts with such margins, so every
answer below has to match to the token, whatever the batch, the page size, the chunk length or the order of arrival.
"""

from __future__ import annotations

import functools
import gc
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax.core import CacheConfig, DecodeConfig, EngineConfig, ModelConfig, SchedulerConfig
from eejax.core.errors import ConfigError, InvalidRequestError
from eejax.core.params import DecayingThreshold, EarlyExitParams, SamplingParams
from eejax.core.request import CompletionOutput, RequestOutput
from eejax.serve.engine import Engine
from tests.cases import CLEAR, SHAPES, Case, draw_case, exit_settings, random_model, random_prompt, thresholds_letting
from tests.reference import generate, replay, softmax, threshold_at

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
MAX_LEN = 48
AUTO = DecodeConfig()
PLAIN = DecodeConfig("never", "eager", "never")
LOGPROB_TOLERANCE = 1e-3
"""Logits have a size of about 3, so float32 is off by 1e-5 or so. One wrong K or V shows in the first digits, even
where it leaves the tokens as they are."""


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
        logprobs=kwargs.pop("logprobs", 0),
    )
    return Asked(case.prompt, params, **kwargs)


# An engine compiles for seconds, so tests share these few; between them they vary all that must not change an answer.
ENGINES: dict[str, dict] = {shape: {"shape": shape, "decode": PLAIN} for shape in SHAPES} | {
    "deep": {
        "shape": "deep",
        "max_num_seqs": 4,
        "max_chunk_steps": 16,
        "page_size": 16,
        "num_pages": 32,
        "decode": DecodeConfig("always", "deferred", "always"),
    },
    "mlp_own": {
        "shape": "mlp_own",
        "max_num_seqs": 3,
        "max_chunk_steps": 1,
        "page_size": 5,
        "decode": DecodeConfig("never", "deferred"),
    },
    "norm_own": {"shape": "norm_own", "max_chunk_steps": 3, "max_prefill_tokens": 16},
    # The longest sequence takes 12 pages of 4: two long ones cannot stay together.
    "tight": {"shape": "everything", "max_num_seqs": 4, "max_chunk_steps": 5, "page_size": 4, "num_pages": 13},
    "everything_else": {
        "shape": "everything_else",
        "max_num_seqs": 4,
        "max_chunk_steps": 4,
        "page_size": 4,
        "num_pages": 13,
        "decode": DecodeConfig("never", "deferred"),
    },
    **{
        f"modes {compaction} {fill} {rebatching}": {
            "shape": "probes",
            "max_num_seqs": 4,
            "max_chunk_steps": 5,
            "decode": DecodeConfig(compaction, fill, rebatching),
        }
        # Every pair of settings once.
        for compaction, fill, rebatching in (
            ("always", "eager", "always"),
            ("always", "deferred", "never"),
            ("never", "eager", "never"),
            ("never", "deferred", "always"),
        )
    },
    "gqa with eos": {"shape": "gqa", "eos_ids": (20,)},
    "gqa without exits": {"shape": "gqa", "exit_layers": ()},
}
MIXED = ("deep", "mlp_own", "norm_own", "tight", "everything_else")
MODES = [name for name in ENGINES if name.startswith("modes")]


def new_engine(
    shape: str,
    *,
    page_size: int = 8,
    num_pages: int = 64,
    max_num_seqs: int = 2,
    max_chunk_steps: int = 6,
    max_prefill_tokens: int = 64,
    eos_ids: tuple[int, ...] = (),
    exit_layers: tuple[int, ...] | None = None,
    decode: DecodeConfig = AUTO,
) -> Engine:
    model, params = random_model(shape)
    config = EngineConfig(
        model=model if exit_layers is None else model.with_exit_layers(exit_layers),
        cache=CacheConfig(num_pages, page_size),
        scheduler=SchedulerConfig(max_num_seqs, max_chunk_steps, max_prefill_tokens),
        decode=decode,
        max_model_len=MAX_LEN,
        prefill_chunk=16,
    )
    return Engine(config, params, eos_ids=eos_ids)


@functools.lru_cache(maxsize=8)
def shared_engine(name: str) -> Engine:
    """One of `ENGINES`. `serve` leaves none of them dirty.

    Few live at a time: XLA:CPU maps every kernel by itself, and a process may have 65,530 mappings.
    """
    gc.collect()
    return new_engine(**ENGINES[name])


def model_of(name: str) -> tuple[ModelConfig, dict]:
    """The model of one of `ENGINES`."""
    return random_model(ENGINES[name]["shape"])


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
            if answer.logprobs is not None:
                np.testing.assert_allclose(
                    reported(answer), case.expected.logprobs, atol=LOGPROB_TOLERANCE, err_msg=about
                )


def reported(answer: CompletionOutput) -> list[float]:
    """The log-probability that came with each token."""
    return [found[token].logprob for found, token in zip(answer.logprobs, answer.token_ids, strict=True)]


def assert_aborted(output: RequestOutput, case: Case) -> None:
    """What an aborted request got is a beginning of what it would have got."""
    assert output.finished
    for answer in output.outputs:
        assert answer.finish_reason in ("abort", case.expected.finish_reason)
        count = len(answer.token_ids)
        assert answer.token_ids == case.expected.token_ids[:count]
        assert answer.exit_layers == case.expected.exit_layers[:count]


# ------------------------------------------------------------------------------------------- every model, every setting


@pytest.mark.parametrize(
    ("shape", "measure"),
    [
        (shape, measure)
        for shape in SHAPES  # in this order, since few engines live at a time
        for measure in (
            "softmax",
            "margin",
            *(["similarity"] if shape in ("deep", "mlp_own", "block_own", "probes") else []),
            *(["classifier"] if shape in ("probes", "everything_else") else []),
        )
    ],
)
def test_every_shape_equals_the_reference(shape, measure):
    """All forms of thresholds in one batch; prompts shorter and longer than a prefill chunk (16) and a page (8)."""
    config, params = random_model(shape)
    lengths = itertools.cycle((7, 19, 1, 16, 33))
    cases = [
        draw_case(config, params, early_exit=early_exit, want_exits=exits, prompt_length=next(lengths))
        for _, early_exit, exits in exit_settings(config, params, measure)
    ]
    cases += [draw_case(config, params, early_exit=e, prompt_length=9) for e in (None, EarlyExitParams(1.5, measure))]
    requests = [asked(case, logprobs=(None, 0)[i % 3 > 0]) for i, case in enumerate(cases)]
    assert_answers(serve(shared_engine(shape), requests), cases)


def test_a_gate_asks_the_head_only_where_the_probe_says_so():
    config, params = random_model("probes")
    settings = [early_exit for _, early_exit, _ in exit_settings(config, params, "classifier")]
    gates = [early_exit.threshold for early_exit in settings if isinstance(early_exit.threshold, float)]
    gates = [gate for gate in gates if 0 < gate < 1]
    asking = [EarlyExitParams(threshold, "margin", gate=gate) for gate in gates for threshold in (0.0, 0.05)]
    cases = [draw_case(config, params, early_exit=early_exit, prompt_length=9) for early_exit in asking]
    assert len({layer for case in cases for layer in case.expected.exit_layers}) > 1, "some pass, and some do not"
    engine = shared_engine("probes")
    assert_answers(serve(engine, [asked(case) for case in cases]), cases)
    # No probability reaches 1: no exit's head is asked, which a threshold that nobody passes would ask.
    before = engine.stats()
    shut = draw_case(config, params, early_exit=EarlyExitParams(0.0, "softmax", gate=1.0), prompt_length=9)
    assert_answers(serve(engine, [asked(shut)]), [shut])
    after = engine.stats()
    assert after.heads_run - before.heads_run == after.steps - before.steps > 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"gate": 1.5}, "EarlyExitParams.gate must be a number in [0, 1], got 1.5"),
        ({"gate": 0.5, "measure": "classifier"}, "softmax and margin, and this is 'classifier'"),
        ({"gate": 0.5, "threshold": "calibrated"}, "certified without a gate"),
    ],
)
def test_gates_that_mean_nothing_are_refused(options, part):
    with pytest.raises(ConfigError, match=re.escape(part)):
        EarlyExitParams(**options)


def test_a_gate_needs_probes():
    with pytest.raises(InvalidRequestError, match=r"gate 0\.5 needs a probe"):
        EarlyExitParams(0.5, gate=0.5).thresholds_for(random_model("gqa")[0])


def test_no_exits_at_all():
    """A model without exits serves requests that would leave early if they could."""
    engine = shared_engine("gqa without exits")
    config, params = engine.config.model, random_model("gqa")[1]
    cases = [
        draw_case(config, params, early_exit=e) for e in (None, EarlyExitParams(0.0), EarlyExitParams(0.3, "margin"))
    ]
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


@functools.cache
def thresholds(shape: str, measure: str, share: float) -> tuple[float, ...]:
    return thresholds_letting(*random_model(shape), measure, share)


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


@pytest.mark.parametrize("name", (*MODES, *MIXED))
@settings(max_examples=2 * settings.default.max_examples)
@given(seeds=st.lists(st.integers(0, 10**6), min_size=3, max_size=8))
def test_company_changes_nothing(name, seeds):
    """Whoever else is served, whenever they come, go, are preempted or aborted: everybody's answer is their own."""
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


@pytest.mark.parametrize("budget", [1, 2, 6, 7, 8, 13])
def test_no_step_and_no_block_is_wasted(budget):
    """Alone, a request takes a step per token behind the first, in full chunks, and only the blocks that those ran."""
    config, params = random_model("gqa")
    early_exit = EarlyExitParams(thresholds("gqa", "softmax", 0.5))
    case = draw_case(config, params, early_exit=early_exit, max_tokens=budget)
    engine = shared_engine("gqa")
    before = engine.stats()
    engine.add_request({"prompt_token_ids": list(case.prompt)}, asked(case).params)
    outputs = []
    while engine.has_unfinished:
        outputs.append(engine.step()[0])
    assert_answers(outputs[-1:], [case])
    after = engine.stats()
    assert [len(output.outputs[0].token_ids) for output in outputs] == [
        1,
        *range(7, budget, 6),
        *([budget] * (budget > 1)),
    ]
    assert after.steps - before.steps == budget - 1
    assert after.blocks_run - before.blocks_run == sum(case.expected.exit_layers[1:])
    assert after.token_blocks - before.token_blocks == sum(case.expected.exit_layers[1:])
    assert after.tokens - before.tokens == budget


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
    outputs = serve(shared_engine("gqa with eos"), [asked(ending), ignoring])
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


# ------------------------------------------------------------------------------------------------------- the demo model


DEMO_TEXTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "A farmer has 12 sheep and buys 7 more. How many sheep does the farmer have now?",
    "Explain why leaves turn red in autumn.",
    "My washing machine makes a loud noise. What can I do?",
    "List three things to pack for a day in the mountains.",
)


def test_demo_equals_the_reference():
    """The weights that ship, loaded and served as a user would, on the first texts that are clear-cut."""
    from eejax import LLM
    from eejax.model.weights import load_checkpoint

    llm = LLM(DEMO, max_model_len=128, max_num_seqs=2)
    config, params = load_checkpoint(DEMO)
    texts = [tuple(llm.tokenizer.encode(text)) for text in DEMO_TEXTS]
    share = {m: thresholds_letting(config, params, m, 0.5, texts) for m in ("softmax", "margin")}
    cases = []
    for early_exit in (
        EarlyExitParams(share["softmax"]),
        EarlyExitParams(share["margin"], "margin"),
        EarlyExitParams(DecayingThreshold(share["softmax"])),
    ):
        answered = (
            Case(text, 24, early_exit, generate(config, params, text, max_tokens=24, early_exit=early_exit))
            for text in texts
        )
        cases += itertools.islice((case for case in answered if case.expected.margins.smallest > CLEAR), 2)
    assert len(cases) == 6
    outputs = llm.generate(
        [{"prompt_token_ids": list(case.prompt)} for case in cases],
        [replace(asked(case).params, ignore_eos=True) for case in cases],
        use_tqdm=False,
    )
    assert_answers(outputs, cases)
    assert {layer for case in cases for layer in case.expected.exit_layers[1:]} == set(config.exit_points)
