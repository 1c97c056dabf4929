"""Engines that tests share, over tiny models; requests to them, served to their end and compared with the reference."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eejax.core import CacheConfig, DecodeConfig, EngineConfig, ModelConfig, SamplingParams, SchedulerConfig
from eejax.core.request import CompletionOutput, RequestOutput
from eejax.schedule.integrity import check_integrity
from eejax.serve.engine import Engine
from tests.cases import SHAPES, Case, random_model, thresholds_letting

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
        check_integrity(engine.allocator)
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


@functools.cache
def thresholds(shape: str, measure: str, share: float) -> tuple[float, ...]:
    return thresholds_letting(*random_model(shape), measure, share)
