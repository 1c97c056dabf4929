"""eejax, through its public interface, against the reference: tokens, exit layers and finish reasons, one for one.

Float32 equality is promised where the reference's margins (top-1 minus top-2 logit, confidence minus threshold) exceed
1e-4, because matrix products round differently by shape. `draw_case` looks for prompts with such margins, so every
answer below has to match to the token, whatever the batch, the page size, the chunk length or the order of arrival.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eejax.core import DecayingThreshold, EarlyExitParams
from eejax.core.errors import ConfigError, InvalidRequestError
from tests.cases import CLEAR, SHAPES, Case, draw_case, exit_settings, random_model, thresholds_letting
from tests.reference import generate, threshold_at
from tests.serve.engines import (
    MAX_LEN,
    asked,
    assert_answers,
    serve,
    shared_engine,
    thresholds,
)

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


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
        ({"gate": 0.5, "measure": "classifier"}, "softmax and margin; with 'classifier' it must be 0"),
        ({"gate": 0.5, "threshold": "calibrated"}, "calibration ran without a gate"),
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
