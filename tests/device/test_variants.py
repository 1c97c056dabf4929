"""Programs without what no row of a batch asks for, as GPUs run them: which there are, and that their tokens agree."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from eejax.core import (
    CacheConfig,
    DecodeConfig,
    EarlyExitParams,
    EngineConfig,
    ExitConfig,
    SamplingParams,
    SchedulerConfig,
)
from eejax.core.errors import ConfigError
from eejax.device.decode_state import Asks
from eejax.device.runner import Runner
from eejax.serve.engine import Engine
from pallas_kernels import control_flow
from tests.cases import random_model, random_prompt

MODEL, PARAMS = random_model("mha", n_layers=2, exits=ExitConfig((1,)))
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, seed=5, ignore_eos=True)
SOFTMAX, RANDOM = EarlyExitParams(0.3), EarlyExitParams(0.5, "random")


@pytest.mark.parametrize(
    ("changes", "asks"),
    [
        ([{}], ("none", "greedy")),
        ([{"temperature": 0.8, "top_k": 1}], ("none", "greedy")),
        ([{}, {"temperature": 0.8}], ("none", "any")),
        ([{"logprobs": 0}], ("none", "any")),
        ([{}, {"early_exit": SOFTMAX}], ("heads", "greedy")),
        ([{"early_exit": EarlyExitParams(0.1, "margin")}], ("heads", "greedy")),
        ([{"early_exit": SOFTMAX}, {"early_exit": RANDOM}, {"logprobs": 2}], ("any", "any")),
    ],
)
def test_what_requests_ask_for(changes, asks):
    assert Asks.of(replace(GREEDY, **change) for change in changes) == Asks(*asks)


def engine(**decode: str) -> Engine:
    options = {"scheduler": SchedulerConfig(max_num_seqs=2, max_chunk_steps=4), "max_model_len": 32}
    return Engine(
        EngineConfig(MODEL, CacheConfig(16, 8), decode=DecodeConfig(**decode), prefill_chunk=16, **options), PARAMS
    )


def answers(engine: Engine, *params: SamplingParams) -> list[tuple]:
    ids = [
        engine.add_request({"prompt_token_ids": random_prompt(MODEL, 5, place)}, one)
        for place, one in enumerate(params)
    ]
    finished = {}
    while engine.has_unfinished:
        finished |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
    return [(finished[i].token_ids, finished[i].exit_layers, finished[i].logprobs) for i in ids]


BATCHES = {
    "exits-none-choice-greedy": [{}, {}],
    "exits-none-choice-any": [{"temperature": 1.0}, {"logprobs": 2}],
    "exits-heads-choice-greedy": [{"early_exit": SOFTMAX}, {}],
    "exits-heads-choice-any": [{"early_exit": SOFTMAX, "temperature": 1.0}, {"early_exit": SOFTMAX, "logprobs": 1}],
    "exits-any-choice-greedy": [{"early_exit": RANDOM}, {"early_exit": SOFTMAX}],
    "exits-any-choice-any": [{"early_exit": RANDOM, "temperature": 1.0}, {"early_exit": SOFTMAX}],
}


def test_every_variant_yields_the_tokens_of_the_whole_program(monkeypatch):
    """In the form of branches that GPUs get, with rows that exit at different depths."""
    batches = [[replace(GREEDY, **change) for change in changes] for changes in BATCHES.values()]
    whole = engine(compaction="never")
    expected = [answers(whole, *batch) for batch in batches]
    assert {key for key in whole.runner._compiled.programs if key[0] == "decode"} == {("decode", 2, "")}

    monkeypatch.setattr(Runner, "variants", property(lambda self: Asks.every(self.config.model)))
    monkeypatch.setenv(control_flow.VARIABLE, "cond")
    special = engine(compaction="never")
    for name, batch, known in zip(BATCHES, batches, expected, strict=True):
        assert answers(special, *batch) == known, name
        assert ("decode", 2, name) in special.runner._compiled.programs
    layers = [layer for batch in expected for _, layers, _ in batch for layer in layers]
    assert set(layers) == {1, 2}, "some rows exit, and some do not"


def test_warming_up_compiles_every_variant_of_every_bucket(monkeypatch):
    monkeypatch.setattr(Runner, "variants", property(lambda self: Asks.every(self.config.model)))
    asked = []
    monkeypatch.setattr(Runner, "decode_program", lambda self, bucket, asks: asked.append((bucket, str(asks))))
    monkeypatch.setattr(Runner, "_prefill_program", lambda self, bucket: None)
    engine().runner.warm_up()
    assert asked == [(rows, name) for rows in (1, 2) for name in BATCHES]


def test_a_model_without_exits_has_no_programs_with_exits():
    plain = replace(MODEL, exits=replace(MODEL.exits, layers=()))
    assert [str(asks) for asks in Asks.every(plain)] == ["exits-none-choice-greedy", "exits-none-choice-any"]
    assert [str(asks) for asks in Asks.every(MODEL)] == list(BATCHES)


def branches(predicate: bool) -> str:
    return str(jax.make_jaxpr(lambda x: control_flow.run_if(x > 0, lambda y: y + 1, x))(float(predicate)))


@pytest.mark.parametrize(("platform", "form"), [("cpu", "while"), ("gpu", "cond"), ("tpu", "while")])
def test_the_device_decides_on_the_form_of_branches(monkeypatch, platform, form):
    monkeypatch.delenv(control_flow.VARIABLE, raising=False)
    monkeypatch.setattr(control_flow, "default_platform", lambda: platform)
    assert control_flow.branch_form() == form
    assert ("while[" in branches(True)) == (form == "while")
    assert ("cond[" in branches(True)) == (form == "cond")
    for wish in ("while", "cond"):
        monkeypatch.setenv(control_flow.VARIABLE, wish)
        assert control_flow.branch_form() == wish


@pytest.mark.parametrize("form", ["cond", "while"])
def test_a_branch_runs_where_its_predicate_holds(monkeypatch, form):
    monkeypatch.setenv(control_flow.VARIABLE, form)
    run = jax.jit(lambda x: control_flow.run_if(x > 0, lambda y: y + 10, x))
    assert (int(run(1)), int(run(-1))) == (11, -1)


def test_an_unknown_form_is_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setenv(control_flow.VARIABLE, "switch")
    with pytest.raises(ConfigError, match="EEJAX_BRANCHES must be one of auto, cond, while, got 'switch'"):
        engine()
