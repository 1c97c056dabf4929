"""The speed half of `bench.exits`: the same requests at full depth and under every rule and threshold, in turn."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from bench.common import Ceiling, median
from bench.cost import ModelCost, TokenCost
from bench.latency import decode_window, speedups
from bench.rounds import Round, request_params, run_round, token_costs
from eejax import LLM, EarlyExitParams
from eejax.core import DecodeConfig, PromptLike

RULES = {"rows": DecodeConfig(), "all": DecodeConfig("never", "eager", "never")}
"""Ours, and that of Miao et al. (arXiv 2407.20272): a step's rows go on until all are resolved, and what they did not
run is filled in before the step ends."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is timed: a rule, an early-exit setting (None: full depth), and the number of requests in a batch."""

    rule: str
    early_exit: EarlyExitParams | None
    batch: int


type Run = tuple[Round, ...]
"""All requests of a cell answered once: full batches, one after another."""


def prompts_at(batch: int, least: int) -> int:
    """Requests that a batch size answers: full batches, `least` requests or a few more."""
    return -(-least // batch) * batch


def time_cells(
    llms: Mapping[str, LLM],
    cells: Sequence[Cell],
    prompts: Sequence[PromptLike],
    *,
    least: int,
    output_len: int,
    warmup: int,
    iterations: int,
    seed: int,
) -> dict[Cell, list[Run]]:
    """`iterations` timed runs of each cell, every round in another order, after `warmup` untimed rounds.

    Args:
        llms: an engine for each rule, over the same weights.
        prompts: enough for `prompts_at` of every batch size; small batches answer the first of them.
        least: the fewest requests that a cell answers.
        output_len: tokens of every answer, whatever they say.
    """
    rng = random.Random(seed)
    todo = [(i, cell) for i in range(warmup + iterations) for cell in rng.sample(cells, len(cells))]
    found: dict[Cell, list[Run]] = {cell: [] for cell in cells}
    console = Console(stderr=True)
    for i, cell in track(todo, "rounds", console=console, transient=True, disable=not sys.stderr.isatty()):
        params = request_params(len(prompts), output_len, seed, cell.early_exit, ignore_eos=True)
        run = tuple(
            run_round(llms[cell.rule], list(prompts[at : at + cell.batch]), params[at : at + cell.batch])
            for at in range(0, prompts_at(cell.batch, least), cell.batch)
        )
        if i >= warmup:
            found[cell].append(run)
    return found


def steps_of(run: Run) -> int:
    """The fewest decode steps that give the run's answers: in each batch, those of its longest answer."""
    return sum(max(len(answer.exit_layers) for answer in one.answers) - 1 for one in run)


def step_seconds(runs: Sequence[Run]) -> list[float]:
    """Of each run, seconds of decoding per token of a row. Prefill is left out."""
    return [sum(decode_window(one)[1] for one in run) / steps_of(run) for run in runs]


def figures(cell: Cell, runs: Sequence[Run], tokens: Sequence[TokenCost], cost: ModelCost, ceiling: Ceiling) -> dict:
    """What a cell came to; medians over its runs, and counts of its first run.

    Args:
        tokens: what one run's decoded tokens needed, the same in every run.
    """
    run, steps, times = runs[0], steps_of(runs[0]), step_seconds(runs)
    step = median(times)
    blocks, heads, rows = (sum(getattr(one, name) for one in run) for name in ("blocks_run", "heads_run", "row_blocks"))
    kv = sum(map(cost.kv_positions, tokens)) / steps
    layers = Counter(token.exit_layer for token in tokens)
    read = cost.step_bytes(blocks / steps, heads / steps, kv, cost.mean_head(tokens))
    bound = max(read / ceiling.bandwidth, sum(map(cost.token_ops, tokens)) / steps / ceiling.arithmetic)
    return {
        "output_tokens_per_s": cell.batch / step,
        "time_per_output_token_ms": 1e3 * step,
        "mean_exit_layer": sum(layers.elements()) / len(tokens),
        "tokens_at_exit": {str(layer): layers[layer] for layer in sorted(cost.head_params)},
        "blocks_run_over_full_depth": blocks / (steps * cost.n_layers),
        "row_blocks_over_full_depth": rows / (len(tokens) * cost.n_layers),
        "heads_per_step": heads / steps,
        "fills_per_step": sum(one.fills for one in run) / steps,
        "bound_ms": 1e3 * bound,
        "share_of_bound": bound / step,
        "rounds_ms_per_token": [1e3 * seconds for seconds in times],
        "compilations_while_timed": sum(one.compilations for run in runs for one in run),
    }


def compare(
    llms: Mapping[str, LLM], runs: Mapping[Cell, Sequence[Run]], cost: ModelCost, ceiling: Ceiling
) -> dict[int, dict[str, Any]]:
    """Figures by batch size: `full_depth` by rule, `early_exit` as a list of settings, each by rule.

    Full depth is the fastest of the rules' own full-depth medians, the same for all; so no rule gains by making full
    depth slow. The ideal is of the rule's own tokens (`bench.cost`), at the rates of `ceiling` in a batch.
    """
    config = next(iter(llms.values())).config.model
    found: dict[int, dict[str, Any]] = {}
    for batch in dict.fromkeys(cell.batch for cell in runs):
        settings: dict[EarlyExitParams | None, dict[str, Any]] = {}
        full = min(
            median(step_seconds(one)) for cell, one in runs.items() if cell.batch == batch and cell.early_exit is None
        )
        for cell, mine in runs.items():
            if cell.batch != batch:
                continue
            tokens = [token for one in mine[0] for token in token_costs(one, config, cell.early_exit)]
            known = figures(cell, mine, tokens, cost, ceiling)
            if cell.early_exit is not None:
                known |= speedups(cost, tokens, ceiling, batch, full, known["time_per_output_token_ms"] / 1e3)
            settings.setdefault(cell.early_exit, {})[cell.rule] = known
        found[batch] = {
            "full_depth": settings.pop(None),
            "early_exit": list(settings.values()),
            "requests_that_differ": differing({cell: one for cell, one in runs.items() if cell.batch == batch}),
        }
    return found


def differing(runs: Mapping[Cell, Sequence[Run]]) -> int:
    """Answers, over all settings of one batch size, that were not the same tokens in every run and under every rule."""
    count = 0
    for setting in dict.fromkeys(cell.early_exit for cell in runs):
        all_runs = [run for cell, mine in runs.items() if cell.early_exit == setting for run in mine]
        answers = [[answer.token_ids for one in run for answer in one.answers] for run in all_runs]
        count += sum(len(set(same)) > 1 for same in zip(*answers, strict=True))
    return count
