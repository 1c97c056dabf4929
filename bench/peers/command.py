"""eejax beside other engines: `python -m bench peers --model M --workload b1,b32`.

The same weights (random Llamas, written once as a Hugging Face folder that every engine opens or converts), the same
requests (token ids, fixed lengths, end tokens ignored), greedy, float32 weights and float32 keys and values. An engine
runs in a fresh process a round, which answers everything once untimed and once timed; rounds are interleaved, each
begins with another engine, and each process waits for an idle machine. Prompts count: tokens/s are output tokens over
the time from submitting all requests to the last token. Greedy tokens are compared with those of Transformers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from bench import machine
from bench.common import Ceiling, add_replay, at_least, finish, options_of, replay_params
from bench.peers.engines import (
    EEJAX,
    ENGINES,
    REFERENCE,
    converted,
    install_line,
    is_installed,
    parse_pythons,
    python_of,
    run_engine,
)
from bench.peers.models import MODELS, WORKLOADS, Least, find_model, make_workload
from bench.peers.rounds import NOISY_CORES, Case, Entry, compare, rotated, summary, wait_until_idle
from bench.peers.tables import plot, show
from bench.plots import require_matplotlib
from bench.process import ProcessFailedError
from eejax.core import ConfigError, ModelConfig
from eejax.model import count_params, param_shapes

WORK = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "eejax" / "peers"
IDLE_LIMIT = 120.0
PROCESS_LIMIT = 3600.0
"""Seconds: to wait for an idle machine; that a process may take."""
ATTEMPTS = 3


def names(text: str) -> tuple[str, ...]:
    """`S,M` as a tuple."""
    return tuple(part for part in text.split(",") if part)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m bench peers", description=(__doc__ or "").partition("\n")[0])
    peers = [name for name in ENGINES if name != EEJAX]
    found.add_argument(
        "--model", type=names, default=("M",), help=f"some of {','.join(MODELS)}, or Hugging Face folders (M)"
    )
    found.add_argument(
        "--workload",
        type=names,
        default=tuple(WORKLOADS),
        help='b1, b8, b32, or JSON files of {"requests": [{"prompt": [token, ...], "max_new": tokens}, ...]} (b1,b32)',
    )
    found.add_argument("--peer", type=names, default=tuple(peers), help=f"some of {','.join(peers)} (all)")
    found.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help="a peer's interpreter")
    found.add_argument("--work", type=Path, default=WORK, help="models, their conversions, environments (%(default)s)")
    add_replay(found)
    found.add_argument("--rounds", type=at_least(1), default=3, help="timed processes of each engine (%(default)s)")
    found.add_argument("--threads", type=at_least(1), default=2, help="processors an engine may use (%(default)s)")
    found.add_argument("--no-wait", action="store_true", help="do not wait for an idle machine")
    found.add_argument("--seed", type=at_least(0), default=0, help="of weights and prompts (%(default)s)")
    found.add_argument("--output-json", type=Path, metavar="FILE", help="write the result here too")
    found.add_argument("--plot", type=Path, metavar="FILE", help="draw bars as a PNG")
    return found


def check(args: argparse.Namespace) -> None:
    """Refuse what no model could be run with, before one is written. Raises `ConfigError`."""
    unknown = [name for name in args.peer if name not in ENGINES or name == EEJAX]
    if unknown:
        peers = ", ".join(name for name in ENGINES if name != EEJAX)
        raise ConfigError(f"--peer: there is no {', '.join(unknown)}; there are {peers}")
    parse_pythons(args.peer_python)
    if args.plot is not None:
        require_matplotlib()


def replay_options(shares: Sequence[float], config: ModelConfig) -> dict[str, Any]:
    """Options of eejax's process: exits that part the model evenly, each taken by its share of the tokens."""
    parts = len(shares) + 1
    layers = tuple(round(config.n_layers * part / parts) for part in range(1, parts))
    thresholds = replay_params(shares).thresholds_for(config.with_exit_layers(layers))
    return {"exit_layers": layers, "thresholds": thresholds}


def make_entries(args: argparse.Namespace, config: ModelConfig) -> dict[str, Entry]:
    """The rows of a case, eejax's first."""
    pythons = parse_pythons(args.peer_python)
    rows = {name: Entry(name, {}, python_of(name, pythons, args.work)) for name in (EEJAX, *args.peer)}
    if args.replay is not None:
        label = f"{EEJAX} {'/'.join(f'{share:g}' for share in args.replay)}"
        replay = Entry(EEJAX, replay_options(args.replay, config), rows[EEJAX].python, exact=False)
        rows = {EEJAX: rows[EEJAX], label: replay, **rows}
    return rows


def make_cases(args: argparse.Namespace, say: Console) -> list[Case]:
    """Every model with every workload, written and converted as far as need be."""
    cases = []
    for name in args.model:
        say.print(f"model {name}")
        model = find_model(name, args.work, args.seed)
        workloads = [make_workload(one, model.config, args.seed) for one in args.workload]
        entries = make_entries(args, model.config)
        for label, entry in entries.items():
            if not is_installed(entry.engine, entry.python):
                entry.problem = "not installed"
                continue
            try:
                say.print(f"  {label}: opening or converting {name}")
                entry.model = converted(entry.engine, entry.python, model.folder, args.work / "models", PROCESS_LIMIT)
            except ProcessFailedError as error:
                entry.problem = f"conversion failed: {error}"
        for workload in workloads:
            file = args.work / f"{model.folder.name}-{workload.name}.json"
            file.write_text(json.dumps(workload.to_dict()))
            copies = {
                label: Entry(one.engine, one.options, one.python, one.model, one.problem, one.exact)
                for label, one in entries.items()
            }
            cases.append(Case(model, workload, file, copies))
    return cases


def run_rounds(cases: Sequence[Case], args: argparse.Namespace, say: Console) -> None:
    """Fill the rounds of all rows. A row that fails has its problem noted, and runs no more."""
    for number in range(args.rounds):
        for case in cases:
            for label in rotated(list(case.entries), number):
                entry = case.entries[label]
                if entry.model is None or entry.problem is not None:
                    continue
                where = f"round {number + 1}/{args.rounds}, {case.label}, {label}"
                try:
                    entry.rounds.append(run_once(entry, entry.model, case, number == 0, args, say, where))
                except ProcessFailedError as error:
                    entry.problem = f"round {number + 1} failed: {error}"
                    say.print(f"{where}: {error}", style="red", markup=False)


def run_once(
    entry: Entry, model: Path, case: Case, first: bool, args: argparse.Namespace, say: Console, where: str
) -> dict[str, Any]:
    """One process of a row's engine; up to three where others disturb it, of which the least disturbed one counts."""
    # The gaps between the reference's logits are wanted once; they are computed after the clock has stopped.
    options = {"gaps": True} if entry.engine == REFERENCE and first else entry.options
    found: list[dict[str, Any]] = []
    for _ in range(1 if args.no_wait else ATTEMPTS):
        if not args.no_wait and not wait_until_idle(IDLE_LIMIT):
            say.print(f"{where}: the machine has been busy for {IDLE_LIMIT:.0f} s, going on", style="yellow")
        found.append(
            run_engine(entry.engine, entry.python, model, case.file, args.threads, options, args.work, PROCESS_LIMIT)
        )
        speed = case.workload.output_tokens / found[-1]["seconds"]
        say.print(f"{where}: {speed:.1f} tokens/s, others {found[-1]['other_cores']:.2f} cores", markup=False)
        if found[-1]["other_cores"] <= NOISY_CORES:
            break
    return min(found, key=lambda one: one["other_cores"])


def case_result(case: Case, least: Least, ceiling: Ceiling, work: Path) -> dict[str, Any]:
    """What a case came to, ready for JSON."""
    memory, arithmetic = least.bytes_read / ceiling.bandwidth, least.operations / ceiling.arithmetic
    bound = least.seconds(ceiling.bandwidth, ceiling.arithmetic)
    ran = [label for label, entry in case.entries.items() if entry.rounds]
    reference = REFERENCE if REFERENCE in ran else next(iter(ran), None)
    rows = {}
    for label, entry in case.entries.items():
        row = summary(entry, case.workload, bound)
        if entry.model is None and entry.problem == "not installed":
            row["install"] = install_line(entry.engine, work)
        comparable = reference is not None and entry.rounds and entry.exact
        row["agreement"] = compare(entry, case.entries[reference]) if reference and comparable else None
        rows[label] = row
    return {
        "model": case.model.name,
        "parameters": count_params(param_shapes(case.model.config)),
        "workload": {
            "name": case.workload.name,
            "requests": len(case.workload.requests),
            "prompt_tokens": case.workload.prompt_tokens,
            "output_tokens": case.workload.output_tokens,
        },
        "machine": ceiling.to_dict(),
        "bound_seconds": bound,
        "bound_by": "bandwidth" if memory > arithmetic else "arithmetic",
        "bandwidth_bound_seconds": memory,
        "arithmetic_bound_seconds": arithmetic,
        "reference": reference,
        "rows": rows,
    }


def ceilings(cases: Sequence[Case]) -> Mapping[str, Ceiling]:
    """The machine's rates over what a step of each case's model reads, by model."""
    steps = {case.model.name: Least.of(case.workload, case.model.config).step_bytes for case in cases}
    return {name: Ceiling.measure(step, jnp.dtype("float32")) for name, step in steps.items()}


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    args.work = args.work.expanduser().absolute()
    check(args)
    say = Console(stderr=True, highlight=False, soft_wrap=True)
    cases = make_cases(args, say)
    if not args.no_wait:
        wait_until_idle(IDLE_LIMIT)
    before = ceilings(cases)
    run_rounds(cases, args, say)
    after = ceilings(cases)
    found = {}
    for case in cases:
        ceiling = before[case.model.name].better(after[case.model.name])
        found[case.label] = case_result(case, Least.of(case.workload, case.model.config), ceiling, args.work)
    result = {"bench": "peers", **machine.provenance(), "options": options_of(args), "cases": found}
    show(result)
    if args.plot is not None:
        plot(result, args.plot)
    finish(result, args.output_json)
