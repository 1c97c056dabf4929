"""Decoding of a model with random weights in bfloat16: at full depth, with replayed exits, with exits never taken.

    python -m bench.gpu.decoding --model llama-7b --batch 1 --runs full,eager-cond,deferred-cond,eager-while,asked

The runs are interleaved in one process, over the same weights. `--compile-only` compiles their programs into the
compilation cache, from shapes alone, so that the process that measures finds them there. The bounds and ideals are by
the rates that the first stage measured: those of a large copy and of a square product.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from bench.common import Ceiling, median, random_params, random_prompts, replay_params
from bench.cost import ModelCost
from bench.gpu.record import RESULTS, report, results
from bench.latency import decode_window, speedups, summary
from bench.rounds import Round, request_params, run_round, token_costs
from bench.shapes import SHAPES, shape
from eejax import LLM, EarlyExitParams
from eejax.core import MIN_PREFILL_BUCKET, EngineConfig, EngineOptions, FillMode, bucket_of
from eejax.device import Runner, default_num_pages, resolve_dtype
from eejax.model import param_shapes
from pallas_kernels.control_flow import VARIABLE

REPLAY = (0.7, 0.2)


@dataclass(frozen=True, slots=True)
class Run:
    """One way to decode: when K and V are filled in, the form of branches, which tokens may exit."""

    fill: FillMode = "eager"
    branches: str = "cond"
    early_exit: EarlyExitParams | None = None


RUNS = {
    "full": Run(),
    "eager-cond": Run(early_exit=replay_params(REPLAY)),
    "deferred-cond": Run("deferred", early_exit=replay_params(REPLAY)),
    "eager-while": Run(branches="while", early_exit=replay_params(REPLAY)),
    # No margin reaches 1: every head is computed, and no token exits.
    "asked": Run(early_exit=EarlyExitParams(1.0, "margin")),
}
"""A step of `full` has no branch, so their form does not matter there."""


def options_of(batch: int, length: int, run: Run) -> EngineOptions:
    """Options of the engine for this run."""
    return EngineOptions(dtype="bfloat16", max_model_len=length, max_num_seqs=batch, fill=run.fill, rebatching="never")


def build(model: str, params: dict, batch: int, length: int, run: Run) -> LLM:
    """The model in an engine for this run, whose programs are still to be compiled."""
    os.environ[VARIABLE] = run.branches
    return LLM.from_params(shape(model), params, **asdict(options_of(batch, length, run)))


def engine_config(model: str, batch: int, length: int, run: Run) -> EngineConfig:
    """The configuration that `build` arrives at, without weights."""
    config, options = shape(model), options_of(batch, length, run)
    itemsize = resolve_dtype(options.dtype).itemsize
    return options.engine_config(config, default_num_pages(config, length, batch, options.page_size, itemsize))


def compile_ahead(model: str, batch: int, lengths: tuple[int, int], names: list[str]) -> int:
    """Compile prefill and the programs of the runs. Returns how many were not in the cache."""
    dtype, compiled = resolve_dtype("bfloat16"), 0
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), param_shapes(shape(model)))
    for name in names:
        run = RUNS[name]
        os.environ[VARIABLE] = run.branches
        runner = Runner(engine_config(model, batch, sum(lengths), run), weights)
        runner.decode_program_for(request_params(batch, 2, 0, run.early_exit, ignore_eos=True))
        tokens = min(lengths[0] * batch, runner.prefill_buckets[-1])
        runner._prefill_program(bucket_of(tokens if runner._prefill_rows > 1 else lengths[0], MIN_PREFILL_BUCKET))
        compiled += runner.compilations
    return compiled


def known_ceiling() -> Ceiling | None:
    """The rates that the check's first stage measured; None where it did not."""
    path = Path(os.environ.get(RESULTS, ""))
    known = results(path.parent) if path.is_file() else []
    found = {one["name"]: one for one in known if one["stage"] == "environment"}
    if not {"copy", "product"} <= found.keys():
        return None
    return Ceiling(1e9 * found["copy"]["gb_s"], 0, 1e12 * found["product"]["tflop_s"])


def measure(model: str, batch: int, lengths: tuple[int, int], names: list[str], rounds: int) -> None:
    """Report every run after every round, with its speed-up over `full`. The first round compiles and is not timed."""
    config = shape(model)
    params = random_params(config, resolve_dtype("bfloat16"), seed=0)
    prompts = random_prompts(batch, lengths[0], config.vocab_size, seed=0)
    cost = ModelCost.of(config, 2)
    ceiling = known_ceiling() or Ceiling.measure(cost.step_bytes(cost.n_layers, 1, 0), resolve_dtype("bfloat16"))
    engines: dict[tuple[str, str], LLM] = {}  # runs that differ only in their exits share one
    done: dict[str, list[Round]] = {}
    for number in range(1 + rounds):
        for name in names:
            run = RUNS[name]
            key = run.fill, run.branches
            if key not in engines:
                engines[key] = build(model, params, batch, sum(lengths), run)
            os.environ[VARIABLE] = run.branches  # programs are traced when they are first used
            requests = request_params(batch, lengths[1], 0, run.early_exit, ignore_eos=True)
            one = run_round(engines[key], prompts, requests)
            done[name] = [*done.get(name, []), one] if number else []
            _report(model, batch, name, done[name] or [one], done.get("full", []), cost, ceiling)


def _report(
    model: str, batch: int, name: str, rounds: list[Round], full: list[Round], cost: ModelCost, ceiling: Ceiling
) -> None:
    tokens = token_costs(rounds[0], shape(model), RUNS[name].early_exit)
    found = summary(rounds, tokens, cost, ceiling, batch)
    keys = ("time_per_output_token_ms", "output_tokens_per_s", "share_of_bandwidth_bound", "mean_exit_layer")
    beside = {}
    if full:
        steps = len(tokens) // batch
        times = [median([decode_window(one)[1] / steps for one in many]) for many in (full, rounds)]
        beside = speedups(cost, tokens, ceiling, batch, *times)
    counts = {key: found[key] for key in ("blocks_run_over_full_depth", "heads_per_step")}
    figures = {key: found[key] for key in keys}
    report("decode", f"{model} {batch} {name}", rounds=len(rounds), **figures, **counts, **beside)


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.decoding")
    parser.add_argument("--model", choices=sorted(SHAPES), required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", default="full,eager-cond", help="of " + ", ".join(RUNS))
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="few tokens")
    args = parser.parse_args(arguments)
    names, lengths = args.runs.split(","), (8, 8) if args.dry_run else (32, 96)
    if args.compile_only:
        programs = compile_ahead(args.model, args.batch, lengths, names)
        report("compiled", f"{args.model} {args.batch} {args.runs}", programs=programs)
    else:
        measure(args.model, args.batch, lengths, names, rounds=1 if args.dry_run else 5)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
