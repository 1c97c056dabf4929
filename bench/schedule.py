"""Scheduling policies on the same requests: `python -m bench schedule --model checkpoints/demo`.

Every row answers every request, at full depth and with early exit, with room for everything and with memory as the
limit, all at once and as they arrive; rows take turns in a random order, in one process, over the same weights and the
same compiled programs. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench import machine
from bench.common import finish, model_facts, new_parser, options_of, words
from bench.cost import ModelCost
from bench.drive import Answers
from bench.plots import plot_schedule, require_matplotlib
from bench.schedule_rows import figures, rows_table, with_ratios
from bench.schedule_setup import MODES, REGIMES, ROWS, Bench, parsed, request_options
from bench.step_model import DecodeCall, PrefillCall, StepModel


def rates(text: str) -> tuple[float, ...]:
    """`0.5,0.8` as a tuple, `none` as an empty one."""
    try:
        found = () if text == "none" else tuple(map(float, text.split(",")))
    except ValueError:
        found = (0.0,)
    if any(not 0 < rate < float("inf") for rate in found):
        raise argparse.ArgumentTypeError(f"{text!r} is neither `none` nor a list of numbers above 0 such as 0.5,0.8")
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = new_parser("schedule", __doc__)
    request_options(found, num_iters=5)
    found.add_argument("--rows", type=words(list(ROWS)), help=f"some of {','.join(ROWS)}")
    found.add_argument("--regimes", type=words(REGIMES), default=REGIMES, help="some of roomy,limited")
    found.add_argument("--modes", type=words(MODES), default=MODES, help="some of full_depth,early_exit")
    found.add_argument(
        "--rates",
        type=rates,
        default=(0.5, 0.8, 1.1),
        help="Poisson arrivals in the last regime and first mode, as shares of fcfs's requests/s; or none",
    )
    found.add_argument("--plot", type=Path, metavar="FILE.png", help="draw requests/s and mean latency (matplotlib)")
    return found


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Arrival times in seconds of `count` requests, `rate` a second, the first at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def fitted(rounds: Sequence[Answers]) -> StepModel:
    """The model of these rounds' device calls; the host's share of each engine step is in it."""
    calls = [call for one in rounds for call in one.calls if call.seconds]
    decodes = [call for call in calls if isinstance(call, DecodeCall)]
    return StepModel.fit(decodes, [call for call in calls if isinstance(call, PrefillCall)])


def ceiling(bench: Bench, cost: StepModel, mode: str) -> dict[str, float]:
    """What full batches at the mean context and depth would reach, by the steps measured in this run.

    The best power of two of rows up to the slots, no row ever idle; prompts are prefilled at their measured cost.
    """
    config, answers = bench.llm.config, bench.reference[mode]
    exits = config.model.exit_points
    layers = [layer for output in answers.outputs for layer in output.exit_layers[1:]]
    lengths = [len(output.token_ids) for output in answers.outputs]
    sizes = [(len(prompt), length) for prompt, length in zip(bench.prompts, lengths, strict=True)]
    context = sum((prompt + length / 2) * length for prompt, length in sizes) / sum(lengths)
    depth = sum(layers) / max(1, len(layers)) / config.model.n_layers
    heads = sum(at <= depth * config.model.n_layers for at in exits[:-1]) + 1 if bench.exits[mode] else 1
    steps, pages = config.scheduler.max_chunk_steps, -(-round(context) // config.cache.page_size)
    best, rows = 0.0, 1
    for power in range(bench.args.max_num_seqs.bit_length()):
        count = 1 << power
        call = DecodeCall(steps, steps * pages, steps * depth, steps * depth * count, steps * heads * count)
        best, rows = max((best, rows), (steps * count / cost.decode_seconds(call), count))
    prefill = PrefillCall.of([prompt for prompt, _ in sizes], bench.engine.runner.prefill_buckets[-1])
    seconds = cost.prefill_seconds(prefill) + len(layers) / best
    return {
        "decode_tokens_per_s": best,
        "rows": rows,
        "mean_context": context,
        "mean_depth": depth,
        "requests_per_s": len(sizes) / seconds,
    }


def with_arrivals(bench: Bench, burst: Mapping[str, Any], regime: str, mode: str) -> dict[str, Any]:
    """Requests that come one by one: the paper's rows, fcfs, the fastest of our predictors and the oracle."""
    ours = [name for name in burst if name.startswith("length") and name != "length_oracle"]
    best = min(ours, key=lambda name: burst[name]["latency_mean_s"], default=None)
    names = [name for name in burst if name in ("static", "paper", "fcfs", best, "length_oracle")]
    found = {}
    for share in bench.args.rates if "fcfs" in burst else ():
        rate = share * burst["fcfs"]["requests_per_s"]
        arrivals = {i: poisson(len(bench.prompts), rate, bench.args.seed + i) for i in range(bench.args.num_iters)}
        rounds = bench.interleaved([(regime, mode, name) for name in names], arrivals)
        rows = {name: figures([one.outcome for one in answers]) for (_, _, name), answers in rounds.items()}
        with_ratios(rows)
        found[f"{share:g}"] = {"arrivals_per_s": rate, "rows": rows}
    return found


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    args = parsed(parser(), arguments)
    bench = Bench(args)
    rows = bench.rows()
    for row in rows.values():
        if row.predictor != "oracle":
            bench.predictor(row, MODES[0])  # what is missing is said now
    if args.plot is not None:
        require_matplotlib()
    bench.learn_answers()
    cells = [(regime, mode, name) for regime in args.regimes for mode in args.modes for name in rows]
    rounds = bench.interleaved(cells)
    compiled = bench.engine.runner.compilations
    regimes: dict[str, Any] = {}
    for regime in args.regimes:
        modes = {}
        for mode in args.modes:
            modes[mode] = {name: figures([one.outcome for one in rounds[regime, mode, name]]) for name in rows}
            with_ratios(modes[mode])
        regimes[regime] = {"num_pages": bench.num_pages[regime], "modes": modes}
    last, mode = args.regimes[-1], args.modes[0]
    arriving = with_arrivals(bench, regimes[last]["modes"][mode], last, mode)
    cost = fitted([one for answers in rounds.values() for one in answers])
    result = {
        "bench": "schedule",
        **machine.provenance(),
        "model": model_facts(bench.llm, bench.name, ModelCost.of(bench.llm.config.model, 4)),
        "options": options_of(args),
        "num_requests": len(bench.prompts),
        "answers": {mode: answer_facts(bench, mode) for mode in MODES},
        "ceiling": {mode: ceiling(bench, cost, mode) for mode in args.modes},
        "step_model": cost.to_dict(),
        "regimes": regimes,
        "arriving": {"regime": last, "mode": mode, "rates": arriving},
        "requests_that_differ": {mode: len(found) for mode, found in bench.differing.items()},
        "compilations_while_timed": bench.engine.runner.compilations - compiled,
    }
    _show(result)
    if args.plot is not None:
        plot_schedule(result, args.plot)
    finish(result, args.output_json)


def answer_facts(bench: Bench, mode: str) -> dict[str, float]:
    """Lengths of the answers in tokens, and how many were cut off."""
    lengths = [len(output.token_ids) for output in bench.reference[mode].outputs]
    p10, p50, p90 = np.percentile(lengths, [10, 50, 90]).tolist()
    cut = sum(output.finish_reason == "length" for output in bench.reference[mode].outputs)
    return {"tokens": sum(lengths), "mean": sum(lengths) / len(lengths), "p10": p10, "p50": p50, "p90": p90, "cut": cut}


def _show(result: dict[str, Any]) -> None:
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=180)
    name, count = result["model"]["name"], result["num_requests"]
    for regime, found in result["regimes"].items():
        for mode, rows in found["modes"].items():
            title = f"{name}, {count} requests at once, {regime} ({found['num_pages']} pages), {mode.replace('_', ' ')}"
            console.print(rows_table(title, rows))
    arriving = result["arriving"]
    for share, found in arriving["rates"].items():
        title = f"{arriving['regime']}, {found['arrivals_per_s']:.2f} requests/s arriving ({share} of fcfs at once)"
        console.print(rows_table(title, found["rows"]))
    for mode, top in result["ceiling"].items():
        console.print(
            f"ceiling, {mode.replace('_', ' ')}: {top['rows']} rows always busy at a context of "
            f"{top['mean_context']:.0f} decode {top['decode_tokens_per_s']:.0f} tokens/s, "
            f"{top['requests_per_s']:.2f} requests/s with prefill",
            soft_wrap=True,
        )
    console.print(f"requests whose tokens differ between rows: {result['requests_that_differ']}", soft_wrap=True)
    if result["compilations_while_timed"]:
        console.print("WARNING: something was compiled while the clock ran", style="bold red")
