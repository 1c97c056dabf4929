"""One set of requests, answered again and again at full depth and with early exit in turn."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import track

from bench.cost import TokenCost, decoded_tokens
from eejax import LLM, EarlyExitParams, SamplingParams
from eejax.core import ModelConfig, PromptLike

MODES = ("full_depth", "early_exit")


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's prompt length, the blocks that each answer token ran, and when it ran, in seconds.

    Attributes:
        token_ids: of the answer.
        arrival, first_token, finish: seconds since the round began.
    """

    input_len: int
    exit_layers: tuple[int, ...]
    arrival: float
    first_token: float
    finish: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """All requests answered once. `seconds` of wall time; the counters are what the engine's grew by.

    Attributes:
        steps, blocks_run, heads_run, row_blocks, fills: of decoding (`EngineStats`); prefill, always at full depth, is
            not in them.
        compilations: 0 once everything is warm.
    """

    seconds: float
    answers: tuple[Answer, ...]
    preemptions: int
    steps: int
    blocks_run: int
    heads_run: int
    row_blocks: int
    fills: int
    compilations: int


def run_round(llm: LLM, prompts: list[PromptLike], params: list[SamplingParams]) -> Round:
    """Answer all requests once. A request that cannot be served raises its error."""
    before = llm.stats()
    zero = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.monotonic() - zero
    after = llm.stats()
    answers = []
    for output in outputs:
        if output.error is not None:
            raise output.error
        m = output.metrics
        if m is None or m.first_token_time is None or m.finish_time is None:
            raise RuntimeError(f"request {output.request_id} came back without its times")
        times = (m.arrival_time - zero, m.first_token_time - zero, m.finish_time - zero)
        answer = output.outputs[0]
        answers.append(Answer(len(output.prompt_token_ids), answer.exit_layers, *times, token_ids=answer.token_ids))
    return Round(
        seconds=seconds,
        answers=tuple(answers),
        preemptions=sum(output.metrics.preemptions for output in outputs if output.metrics),
        steps=after.steps - before.steps,
        blocks_run=after.blocks_run - before.blocks_run,
        heads_run=after.heads_run - before.heads_run,
        row_blocks=after.row_blocks - before.row_blocks,
        fills=after.fills - before.fills,
        compilations=after.compilations - before.compilations,
    )


def run_interleaved(
    llm: LLM, prompts: list[PromptLike], params: dict[str, list[SamplingParams]], warmup: int, iterations: int
) -> dict[str, list[Round]]:
    """`iterations` timed rounds of each mode, A B A B ..., after `warmup` untimed ones that compile everything."""
    rounds: dict[str, list[Round]] = {mode: [] for mode in params}
    todo = [mode for _ in range(warmup + iterations) for mode in params]
    console = Console(stderr=True)
    for i, mode in enumerate(track(todo, "rounds", console=console, transient=True, disable=not sys.stderr.isatty())):
        one = run_round(llm, prompts, params[mode])
        if i >= warmup * len(params):
            rounds[mode].append(one)
    return rounds


def request_params(
    count: int, output_len: int, seed: int, early_exit: EarlyExitParams | None, ignore_eos: bool
) -> list[SamplingParams]:
    """Greedy requests; a seed for each, so that every round draws the same exits."""
    return [
        SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=ignore_eos, seed=seed + i, early_exit=early_exit
        )
        for i in range(count)
    ]


def token_costs(one: Round, config: ModelConfig, early_exit: EarlyExitParams | None) -> list[TokenCost]:
    """What each decoded token of a round needed; without `early_exit`, no exit was asked."""
    return [
        token
        for answer in one.answers
        for token in answer_costs(answer.exit_layers, answer.input_len, config, early_exit)
    ]


def answer_costs(
    exit_layers: Sequence[int], input_len: int, config: ModelConfig, early_exit: EarlyExitParams | None
) -> list[TokenCost]:
    """What each decoded token of one answer needed; without `early_exit`, no exit was asked."""
    if early_exit is None:
        thresholds, measure = (math.inf,) * len(config.exits.layers), "softmax"
    else:
        thresholds, measure = early_exit.thresholds_for(config), early_exit.measure
    return decoded_tokens(exit_layers, input_len, config.exit_points, thresholds, measure)
