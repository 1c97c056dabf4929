"""The engine over Hopper's kernels, interpreted, and over those for CPUs: both answer as XLA's implementation does."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from eejax import LLM, EarlyExitParams, SamplingParams
from eejax.core import CacheConfig, DecodeConfig, EngineConfig, ExitConfig, ModelConfig, SchedulerConfig
from eejax.core.buckets import cut_prefill
from eejax.core.request import CompletionOutput
from eejax.device import runner
from eejax.model.transformer import init_params
from eejax.serve.engine import Engine
from pallas_kernels.implementation import VARIABLE
from tests.cases import random_model, random_prompt, thresholds_letting
from tests.native_env import needs_native

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    n_layers=3,
    n_heads=2,
    n_kv_heads=1,
    head_dim=64,
    max_position=128,
    exits=ExitConfig((1, 2)),
)
TOKENS = 10
# A short row, and one whose answer goes on into its second page; which exits they take is drawn.
PROMPTS = [{"prompt_token_ids": list(range(count))} for count in (13, 62)]
PARAMS = [
    SamplingParams(
        temperature=0.0,
        max_tokens=TOKENS,
        ignore_eos=True,
        logprobs=0,
        early_exit=EarlyExitParams(shares, "random", exit_layers=(1, 2)),
        seed=seed,
    )
    for seed, shares in enumerate([(0.4, 0.5), (0.6, 0.2)])
]


def weights() -> dict:
    """Matrices that are large enough for answers to depend on the text."""
    return jax.tree.map(lambda a: (8 * a if a.ndim > 1 else a).astype(jnp.float16), init_params(CONFIG, 1))


def test_answers_do_not_depend_on_the_kernels(monkeypatch):
    """Deferred, so that fill-in gets several tokens of a row; eagerly it gets one of each."""
    found = {}
    for kernels in ("xla", "mosaic"):
        monkeypatch.setenv(VARIABLE, kernels)
        interpreted = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())
        with interpreted if kernels == "mosaic" else contextlib.nullcontext():
            options = {"max_model_len": 128, "max_num_seqs": 2, "page_size": 64}
            llm = LLM.from_params(CONFIG, weights(), dtype="float16", compaction="never", fill="deferred", **options)
            answers = [output.outputs[0] for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
            assert llm.stats().fills > 0
            found[kernels] = answers
    depths = [depth for answer in found["xla"] for depth in answer.exit_layers]
    assert set(depths) == {1, 2, 3}
    for one, other in zip(found["xla"], found["mosaic"], strict=True):
        assert (one.token_ids, one.exit_layers) == (other.token_ids, other.exit_layers)
        for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
            # float16 rounds to 11 bits, and log-probabilities have a size of 4.
            assert [x.logprob for x in ours.values()] == pytest.approx([x.logprob for x in theirs.values()], abs=0.02)


# ------------------------------------------------------------------------------------- rows together, rows one by one

# Three blocks, the last two with sliding windows: what is frozen after the first shows in the third.
WINDOWS, WINDOWS_PARAMS = random_model("window_above", sliding_from=1)
LONGEST, CHUNK = 96, 16
# Shorter than a page, a chunk, longer than several; the last twice, so that both share the pages of the prompt.
LENGTHS = [3, 6, 37, CHUNK, 54, 1, 21]


def asked() -> list[tuple[list[int], SamplingParams]]:
    exits = EarlyExitParams(thresholds_letting(WINDOWS, WINDOWS_PARAMS, "softmax", 0.4), "softmax")
    options = {"temperature": 0.0, "max_tokens": 14, "ignore_eos": True, "logprobs": 0, "early_exit": exits}
    return [
        (random_prompt(WINDOWS, length), SamplingParams(**options, n=2 if length == LENGTHS[-1] else 1))
        for length in LENGTHS
    ]


def serve(engine: Engine, *requests: tuple[list[int], SamplingParams]) -> list[CompletionOutput]:
    ids = [engine.add_request({"prompt_token_ids": prompt}, params) for prompt, params in requests]
    finished = {}
    while engine.has_unfinished:
        finished |= {output.request_id: output.outputs for output in engine.step() if output.finished}
    return [answer for i in ids for answer in finished[i]]


def new_engine(num_pages: int) -> Engine:
    config = EngineConfig(
        WINDOWS,
        CacheConfig(num_pages, 4),
        SchedulerConfig(max_num_seqs=4, max_chunk_steps=4),
        DecodeConfig("never", "eager", "never"),
        max_model_len=LONGEST,
        prefill_chunk=CHUNK,
    )
    return Engine(config, WINDOWS_PARAMS)


def assert_alike(ones: list[CompletionOutput], others: list[CompletionOutput]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert (one.token_ids, one.exit_layers) == (other.token_ids, other.exit_layers)
        for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
            # Logits of size 3, in float32.
            assert [x.logprob for x in ours.values()] == pytest.approx([x.logprob for x in theirs.values()], abs=1e-3)


@needs_native
def test_prompts_prefilled_together_are_answered_as_one_by_one(monkeypatch):
    """With native attention rows share calls, and with too few pages some are prefilled again, frozen where they were.

    The pages of a cache that serves one request after another hold what former ones left there.
    """
    calls: list[list[int]] = []

    def watched(*arguments) -> list:
        found = cut_prefill(*arguments)
        calls.extend([piece.length for piece in pieces] for pieces in found)
        return found

    monkeypatch.setattr(runner, "cut_prefill", watched)
    monkeypatch.setenv(VARIABLE, "xla")
    xla = new_engine(num_pages=100)
    expected = serve(xla, *asked())
    assert {depth for answer in expected for depth in answer.exit_layers} == {1, 2, 3}
    assert xla.stats().preemptions == 0
    assert {len(call) for call in calls} == {1}

    calls.clear()
    monkeypatch.setenv(VARIABLE, "native")
    native = new_engine(num_pages=20)
    assert_alike(serve(native, *asked()), expected)
    assert native.stats().preemptions > 0
    assert max(len(call) for call in calls) >= 3
    assert all(sum(call) <= CHUNK for call in calls)
    assert any(len(call) > 1 and sum(call) == CHUNK for call in calls), "no row was cut at the end of a call"

    preemptions = native.stats().preemptions
    one_by_one = [answer for request in asked() for answer in serve(native, request)]
    assert_alike(one_by_one, expected)
    assert native.stats().preemptions == preemptions
