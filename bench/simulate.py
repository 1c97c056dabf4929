"""The scheduler simulated: its error against a real run, and what this machine cannot run.

`python -m bench simulate --fit` answers requests with a model, fits `StepModel` to the device calls, and simulates the
very same requests; `--step-model FILE` takes both from the JSON of such a run. Then come long queues and a fleet.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import machine
from bench.common import at_least, finish, median, new_parser, options_of
from bench.drive import Answers
from bench.plots import plot_bars, require_matplotlib
from bench.schedule import fitted
from bench.schedule_rows import Outcome, figures, rows_table, with_ratios
from bench.schedule_setup import MODES, REGIMES, ROWS, Bench, paper_scheduler, parsed, request_options
from bench.simulator import SimulatedRequest, simulate
from bench.step_model import DecodeCall, StepModel
from eejax.core import LEVELS, CacheConfig, ConfigError, LengthEstimate, SchedulerConfig
from eejax.schedule import StepCost

CHECKED = ("static", "paper", "fcfs", "length_prompt")
SIMULATED = (*CHECKED, "length_oracle")
FLEET_SLOTS = 256
FLEET = StepModel(
    call=2e-4, step=0.0, blocks=5e-3, row=2e-5, page=3e-6, head=0.0, prefill_call=5e-3, prefill_token=2e-5
)
"""An assumed device, not a measured one: reading the weights takes 5 ms, so that a row more costs next to nothing (7
billion parameters in 16 bits at 3 TB/s; a page of 64 tokens holds 8 MB)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is simulated: a device's costs, slots (and rows of the paper's batches at most), and pages."""

    cost: StepModel
    slots: int
    paper_rows: int
    num_pages: int
    page_size: int
    exits: tuple[int, ...] = (12,)
    prefill_chunk: int = 512
    compacts: bool = True


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = new_parser("simulate", __doc__)
    request_options(found, num_iters=3)
    source = found.add_mutually_exclusive_group(required=True)
    source.add_argument("--fit", action="store_true", help="measure steps and answers on the model")
    source.add_argument("--step-model", type=Path, metavar="FILE", help="take them from this JSON of an earlier --fit")
    found.add_argument("--queues", type=_counts, default=(1000, 10000), help="requests at once (1000,10000)")
    found.add_argument("--plot", type=Path, metavar="FILE.png", help="draw requests/s and mean latency (matplotlib)")
    return found


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(at_least(1), text.split(",")))


def run(name: str, requests: Sequence[SimulatedRequest], on: Machine, paper_quantile: float) -> Outcome:
    """Simulate one of the rows of `bench.schedule`. The oracle's rows see the lengths; others see the estimates."""
    row = ROWS[name]
    if row.predictor == "oracle":
        requests = [replace(one, estimate=LengthEstimate.exactly(one.length, one.max_tokens)) for one in requests]
    return simulate(
        requests,
        SchedulerConfig(on.slots, policy=row.policy),
        cache=CacheConfig(on.num_pages, on.page_size),
        cost=on.cost,
        scheduler=paper_scheduler(row, max_rows=on.paper_rows, quantile=paper_quantile),
        learnt=StepCost(compacts=on.compacts),
        exits=on.exits,
        prefill_chunk=on.prefill_chunk,
    )


def known_requests(bench: Bench, mode: str) -> list[SimulatedRequest]:
    """The requests of a real run, with the answers that it gave and what the predictor says of their prompts."""
    predictor = bench.predictor(ROWS["paper"], mode)
    found = []
    for prompt, output in zip(bench.prompts, bench.reference[mode].outputs, strict=True):
        limit = min(bench.args.max_tokens, bench.llm.config.max_model_len - len(prompt))
        layers = output.exit_layers if bench.exits[mode] else ()
        estimate = predictor.predict(prompt, limit)
        found.append(SimulatedRequest(len(prompt), len(output.token_ids), limit, estimate, exit_layers=layers))
    return found


def checked(bench: Bench) -> tuple[StepModel, dict[str, Any]]:
    """Fit the step model to a real run of `CHECKED`, and compare every row of that run with its simulation."""
    names = [name if bench.heads is not None else name.replace("prompt", "constant") for name in CHECKED]
    rounds = bench.interleaved([(regime, mode, name) for regime in REGIMES for mode in MODES for name in names])
    everything = [one for answers in rounds.values() for one in answers]
    cost, config = fitted(everything), bench.llm.config
    found: dict[str, Any] = {}
    for (regime, mode, name), answers in rounds.items():
        on = Machine(
            cost,
            bench.args.max_num_seqs,
            bench.args.vbs_num_seqs,
            bench.num_pages[regime],
            config.cache.page_size,
            config.model.exit_points,
            bench.engine.runner.prefill_buckets[-1],
            bench.engine.runner.compacts,
        )
        simulated = figures([run(name, known_requests(bench, mode), on, bench.args.paper_quantile)])
        rows = found.setdefault(regime, {}).setdefault(mode, {})
        rows[name] = {"measured": figures([one.outcome for one in answers]), "simulated": simulated}
    return cost, {"rows": found, "call_error": _call_errors(cost, everything)}


def _call_errors(cost: StepModel, rounds: Sequence[Answers]) -> dict[str, float]:
    """Of single decode calls: the median of the relative error's size, and the error of their sum."""
    calls = [call for one in rounds for call in one.calls if isinstance(call, DecodeCall)]
    total = sum(map(cost.decode_seconds, calls)) / sum(call.seconds for call in calls)
    return {"median": median([abs(error) for error in cost.errors(calls)]), "sum": total - 1}


def resampled(requests: Sequence[SimulatedRequest], count: int, seed: int) -> list[SimulatedRequest]:
    """`count` requests drawn from these with replacement."""
    return random.Random(seed).choices(requests, k=count)


def to_json(requests: Sequence[SimulatedRequest]) -> list[list[Any]]:
    """Prompt length, answer length, limit and the estimate's quantiles of each request; all at full depth."""
    return [
        [one.prompt_len, one.length, one.max_tokens, *(one.estimate.quantiles if one.estimate else ())]
        for one in requests
    ]


def from_json(file: Path) -> tuple[StepModel, list[SimulatedRequest], int]:
    """Step model, requests and page size of an earlier `--fit`.

    Raises:
        ConfigError: the file is none of these.
    """
    try:
        stored = json.loads(file.read_text().splitlines()[-1])
        cost, page_size = StepModel(**stored["step_model"]), int(stored["options"]["page_size"])
        requests = [
            SimulatedRequest(prompt, length, limit, LengthEstimate.of(quantiles, limit))
            for prompt, length, limit, *quantiles in stored["requests"]
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{file} is no result of `python -m bench simulate --fit`: {error!r}") from error
    return cost, requests, page_size


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    args = parsed(parser(), arguments)
    if args.plot is not None:
        require_matplotlib()
    check: dict[str, Any] = {}
    if args.fit:
        bench = Bench(args)
        bench.learn_answers()
        cost, check = checked(bench)
        requests, page_size = known_requests(bench, MODES[0]), args.page_size
        requests = [replace(one, exit_layers=()) for one in requests]
    else:
        cost, requests, page_size = from_json(args.step_model)
    each = max(-(-(one.prompt_len + one.max_tokens) // page_size) for one in requests)
    slots, paper_rows = args.max_num_seqs, args.vbs_num_seqs
    machines = {
        "this_machine": Machine(cost, slots, paper_rows, max(each, each * slots // 4), page_size),
        "fleet": Machine(FLEET, FLEET_SLOTS, FLEET_SLOTS * paper_rows // slots, each * FLEET_SLOTS // 4, page_size),
    }
    found: dict[str, Any] = {}
    for name, on in machines.items():
        for count in args.queues:
            many = resampled(requests, count, args.seed)
            rows = {row: figures([run(row, many, on, args.paper_quantile)]) for row in SIMULATED}
            with_ratios(rows)
            found[f"{name}_{count}"] = {"slots": on.slots, "num_pages": on.num_pages, "rows": rows}
    result = {
        "bench": "simulate",
        **machine.provenance(),
        "options": options_of(args),
        "levels": LEVELS,
        "step_model": cost.to_dict(),
        "fleet_step_model": FLEET.to_dict(),
        "requests": to_json(requests),
        "check": check,
        "queues": found,
    }
    _show(result)
    if args.plot is not None:
        plot_bars({name: {"simulated": one["rows"]} for name, one in found.items()}, args.plot)
    finish(result, args.output_json)


def _show(result: Mapping[str, Any]) -> None:
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=180)
    if result["check"]:
        console.print(_check_table(result["check"]["rows"]))
        errors = result["check"]["call_error"]
        console.print(f"decode calls: error {errors['median']:.1%} in the median, {errors['sum']:+.1%} in the sum")
    for name, found in result["queues"].items():
        title = (
            f"simulated: {name.replace('_', ' ')} requests at once, {found['slots']} slots, {found['num_pages']} pages"
        )
        console.print(rows_table(title, found["rows"]))


def _check_table(regimes: Mapping[str, Any]) -> Table:
    table = Table(title="simulated beside measured", title_justify="left")
    for i, heading in enumerate(("", "req/s", "simulated", "error", "mean latency, s", "simulated", "error")):
        table.add_column(heading, justify="right" if i else "left")
    for regime, modes in regimes.items():
        for mode, rows in modes.items():
            for name, row in rows.items():
                cells = []
                for key in ("requests_per_s", "latency_mean_s"):
                    real, virtual = row["measured"][key], row["simulated"][key]
                    cells += [f"{real:.2f}", f"{virtual:.2f}", f"{virtual / real - 1:+.1%}"]
                table.add_row(f"{regime}, {mode.replace('_', ' ')}, {name}", *cells)
    return table
