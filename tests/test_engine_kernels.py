"""The engine over Hopper's kernels, interpreted: the answers are those that XLA's implementation gives."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from eejax import LLM, EarlyExitParams, SamplingParams
from eejax.config import ExitConfig, ModelConfig
from eejax.model import init_params
from pallas_kernels.implementation import VARIABLE

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
